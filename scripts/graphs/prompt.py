"""A saved graph in the form that ComfyUI's /prompt takes."""

from __future__ import annotations

from collections.abc import Mapping

from .layout import ALWAYS, NOTE
from .schemas import Json, NodeSchema


def prompt_of(workflow: Json, schemas: Mapping[str, NodeSchema]) -> Json:
    """A saved graph in the form that ComfyUI's /prompt takes: what the page sends, muted nodes left out."""
    active = {node["id"]: node for node in workflow["nodes"] if node["mode"] == ALWAYS and node["type"] != NOTE}
    origin = {link[0]: link for link in workflow["links"]}
    prompt: Json = {}
    for id, node in active.items():
        inputs = schemas[node["type"]].by_name(node["widgets_values"])
        for entry in node["inputs"]:
            if entry["link"] is not None and origin[entry["link"]][1] in active:
                _, source, slot, *_ = origin[entry["link"]]
                inputs[entry["name"]] = [str(source), slot]
        prompt[str(id)] = {"class_type": node["type"], "inputs": inputs}
    return prompt
