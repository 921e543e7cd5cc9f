"""The graphs of workflows/, described by their nodes and wires."""
