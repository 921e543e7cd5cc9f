"""A graph described by its nodes and wires, and its JSON as ComfyUI's page saves it.

Nodes stand in columns, columns in groups, groups in rows; where things stand follows from their sizes. The first group
holds the words that explain the graph.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .schemas import Json, NodeSchema

PACK = "comfyui-srpo"
"""This pack's name in ComfyUI's registry: the page offers to install it where it is missing."""
ALWAYS, NEVER = 0, 2
"""LiteGraph's modes: a muted node (NEVER) and what hangs on it don't run."""
TITLE, SLOT, WIDGET, BOTTOM, BADGE = 30, 20, 28, 14, 24
"""Pixels: a node's title bar, one socket, one widget, the space below, the badge under nodes that aren't ComfyUI's."""
ROOM = {
    "SRPOLoadCheckpoint": 90, "SRPOLoadLoRA": 70, "SRPOLoadReward": 70,
    "SRPOSampler": 240, "SamplerCustomAdvanced": 220, "BatchImagesNode": 24,
}  # fmt: skip
"""Pixels for what a node shows below its widgets: words, or the picture as it comes about."""
GAP, COLUMN_GAP, PADDING, GROUP_GAP, GROUP_TITLE = 24, 44, 22, 60, 40
NOTE = "MarkdownNote"


@dataclass(frozen=True)
class Wire:
    """An output of a node, to be given to another node's input."""

    node: Node
    slot: int


@dataclass
class Node:
    """One node on its place. `given` holds its inputs by name: a Wire or a widget's value."""

    id: int
    schema: NodeSchema
    given: Json
    title: str | None
    width: float
    height: float
    mode: int
    models: list[Json]
    x: float = 0.0
    y: float = 0.0

    def out(self, name: str | int = 0) -> Wire:
        """An output by its name or number."""
        names = [output.name for output in self.schema.outputs]
        return Wire(self, name if isinstance(name, int) else names.index(name))


@dataclass
class Group:
    """A titled frame around columns of nodes."""

    title: str
    colour: str
    mode: int
    columns: list[list[Node]] = field(default_factory=lambda: [[]])
    frame: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def place(self, x: float, y: float) -> None:
        """Put the frame's corner at (x, y) and the nodes inside."""
        left, bottom = x + PADDING, y
        for column in filter(None, self.columns):
            top = y + GROUP_TITLE + TITLE
            for node in column:
                node.x, node.y = left, top
                top += node.height + GAP + TITLE
            bottom = max(bottom, top - GAP - TITLE)
            left += max(node.width for node in column) + COLUMN_GAP
        self.frame = (x, y, left - COLUMN_GAP + PADDING - x, bottom + PADDING - y)


class Graph:
    """A workflow being written: open a row and a group, add nodes."""

    def __init__(self, name: str, schemas: Mapping[str, NodeSchema]) -> None:
        self.name, self.schemas = name, schemas
        self.nodes: list[Node] = []
        self.rows: list[list[Group]] = [[]]

    def row(self) -> None:
        """What follows stands below everything so far."""
        self.rows.append([])

    def group(self, title: str, colour: str = "#3f789e", mode: int = ALWAYS) -> None:
        """What follows stands in a new frame, right of the last; `mode` is that of its nodes."""
        self.rows[-1].append(Group(title, colour, mode))

    def column(self) -> None:
        """What follows stands in a new column of the same frame."""
        self.rows[-1][-1].columns.append([])

    def add(self, type: str, inputs: Json | None = None, *, title: str | None = None, width: float = 300,
            height: float | None = None, models: list[Json] | None = None) -> Node:  # fmt: skip
        """Add a node below the last. KeyError if it has no such input; an input without value keeps its default."""
        schema = self.schemas[type]
        names = {entry.name for entry in schema.inputs}
        given = dict(inputs or {})
        if unknown := set(given) - names:
            raise KeyError(f"{type} has no input {', '.join(sorted(unknown))}; it has {', '.join(sorted(names))}")
        height = height or usual_height(schema)
        return self._put(schema, given, title, width, height, self.rows[-1][-1].mode, models or [])

    def note(self, text: str, width: float, height: float, title: str = "Read me") -> None:
        """Words in Markdown, which run nothing."""
        self._put(NodeSchema(NOTE, title, False, [], []), {"text": text}, title, width, height, ALWAYS, [])

    def _put(self, *fields: Any) -> Node:
        node = Node(len(self.nodes) + 1, *fields)
        self.nodes.append(node)
        self.rows[-1][-1].columns[-1].append(node)
        return node

    def json(self) -> Json:
        """The graph as the page saves it, laid out."""
        groups = self._place()
        links = self._links()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [_node_json(node, order, links) for order, node in enumerate(self.nodes)],
            "links": links,
            "groups": [
                {"id": i, "title": group.title, "bounding": list(group.frame), "color": group.colour, "font_size": 24,
                 "flags": {}}
                for i, group in enumerate(groups, 1)
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [80, 100]}, "workflowRendererVersion": "LG"},
            "version": 0.4,
        }  # fmt: skip

    def _place(self) -> list[Group]:
        """All groups, put where they belong: the first, with the words, stands left of all rows."""
        words, *first = self.rows[0]
        words.place(0.0, 0.0)
        y = 0.0
        for row in (first, *self.rows[1:]):
            x = words.frame[2] + GROUP_GAP
            for group in row:
                group.place(x, y)
                x += group.frame[2] + GROUP_GAP
            y += max(group.frame[3] for group in row) + GROUP_GAP
        return [words, *first, *(group for row in self.rows[1:] for group in row)]

    def _links(self) -> list[list[Any]]:
        """[id, from node, its output, to node, its input's position, type] of every wire."""
        links: list[list[Any]] = []
        for node in self.nodes:
            for position, entry in enumerate(_in_slot_order(node.schema)):
                wire = node.given.get(entry.name)
                if isinstance(wire, Wire):
                    links.append([len(links) + 1, wire.node.id, wire.slot, node.id, position, entry.type])
        return links


def usual_height(schema: NodeSchema) -> float:
    """Pixels that a node takes below its title, texts of several lines not counted."""
    sockets = max(len(schema.sockets), len(schema.outputs))
    widgets = sum(1 + len(entry.extra) for entry in schema.widgets)
    badge = BADGE if schema.type.startswith("SRPO") else 0
    return sockets * SLOT + widgets * WIDGET + BOTTOM + badge + ROOM.get(schema.type, 0)


def _in_slot_order(schema: NodeSchema) -> list:
    """Inputs as the page numbers them: sockets first, then widgets."""
    return [*schema.sockets, *schema.widgets]


def _node_json(node: Node, order: int, links: list[list[Any]]) -> Json:
    schema = node.schema
    is_note = schema.type == NOTE
    properties: Json = {}
    if not is_note:
        pack = PACK if schema.type.startswith("SRPO") else "comfy-core"
        properties = {"Node name for S&R": schema.type, "cnr_id": pack}
    if node.models:
        properties["models"] = node.models
    found: Json = {
        "id": node.id,
        "type": schema.type,
        "pos": [node.x, node.y],
        "size": [node.width, node.height],
        "flags": {},
        "order": order,
        "mode": node.mode,
        "inputs": [_input_json(node, slot, links) for slot in range(len(schema.inputs))],
        "outputs": [_output_json(node, slot, links) for slot in range(len(schema.outputs))],
        "properties": properties,
        "widgets_values": [node.given["text"]] if is_note else schema.values(_without_wires(node.given)),
    }
    if node.title is not None:
        found["title"] = node.title
    if is_note:
        found |= {"color": "#432", "bgcolor": "#000"}
    return found


def _without_wires(given: Json) -> Json:
    return {name: value for name, value in given.items() if not isinstance(value, Wire)}


def _input_json(node: Node, position: int, links: list[list[Any]]) -> Json:
    entry = _in_slot_order(node.schema)[position]
    found: Json = {"name": entry.name, "type": entry.type}
    if entry.optional and not entry.widget:
        found["shape"] = 7
    if entry.widget:
        found["widget"] = {"name": entry.name}
    link = next((link[0] for link in links if link[3:5] == [node.id, position]), None)
    return {**found, "link": link}


def _output_json(node: Node, slot: int, links: list[list[Any]]) -> Json:
    output = node.schema.outputs[slot]
    found: Json = {"name": output.name, "type": output.type}
    if output.is_list:
        found["shape"] = 6
    return {**found, "links": [link[0] for link in links if link[1:3] == [node.id, slot]] or None}
