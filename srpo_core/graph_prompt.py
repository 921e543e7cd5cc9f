"""The prompt in what ComfyUI writes to its pictures: the graph that drew them, as JSON {node id: {"inputs": ...}}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_SAMPLERS = ("latent_image", "guider")
"""Inputs by which a node that draws is told from others."""
_TEXTS = ("text", "t5xxl", "prompt", "clip_l")
_STRINGS = ("value", "string", "text", "prompt")
"""Inputs that hold the text: of nodes that encode it, and of nodes that only hand it on."""
Graph = Mapping[str, Any]


def is_graph(text: str) -> bool:
    """Whether it is a graph: a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def graph_prompt(text: str) -> str:
    """The one positive prompt of a graph; "" if there is none, or if several texts meet in it."""
    graph = json.loads(text)
    drawing = [node for node in graph.values() if any(name in _inputs(node) for name in _SAMPLERS)]
    try:
        found = {one.strip() for node in drawing for one in _texts(graph, node, set())} - {""}
    except RecursionError:  # a chain longer than any that was drawn by hand
        return ""
    return found.pop() if len(found) == 1 else ""


def _inputs(node: Any) -> Mapping[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _texts(graph: Graph, node: Any, seen: set[str]) -> Iterator[str]:
    """The texts that condition a node toward themselves, upstream as far as it takes."""
    for name, link in _inputs(node).items():
        wanted = name in ("positive", "guider") or name.startswith("conditioning")
        if not wanted or not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        source = graph.get(str(link[0]))
        own = (_string(graph, _inputs(source).get(key)) for key in _TEXTS)
        text = next(filter(None, own), None)
        if text is None:
            yield from _texts(graph, source, seen)
        else:
            yield text


def _string(graph: Graph, value: Any, depth: int = 8) -> str | None:
    """A text, or the text that a link leads to."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not depth:
        return None
    inputs = _inputs(graph.get(str(value[0])))
    return next(filter(None, (_string(graph, inputs.get(key), depth - 1) for key in _STRINGS)), None)
