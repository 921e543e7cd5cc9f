"""What a graph's JSON needs to know of its nodes: sockets and widgets, in order, as ComfyUI's /object_info has them."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).parent / "schemas.json"
"""The nodes of all graphs, as the newest ComfyUI they were built with describes them."""
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FILES = {
    "unet_name", "clip_name1", "clip_name2", "vae_name", "image", "checkpoint", "lora", "file", "base", "clip_l",
    "t5xxl", "vae", "start",
}  # fmt: skip
"""Inputs that choose a file: their options are what lies on a machine's disk, and no part of a schema."""
KEPT = {"widget", "default"}
"""What a snapshot says of every input."""
CONTROL = "fixed"
"""What the page does to a seed after each run."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A socket, or a widget that has one. `extra` holds the values of widgets that the page puts right behind it."""

    name: str
    type: str
    widget: bool
    optional: bool = False
    default: Any = None
    options: list[Any] | None = None
    minimum: float | None = None
    maximum: float | None = None
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    name: str
    type: str
    is_list: bool = False


@dataclass(frozen=True)
class NodeSchema:
    """Inputs in the order of the node's definition, required ones first: that of the saved widgets."""

    type: str
    display_name: str
    output_node: bool
    inputs: list[Input]
    outputs: list[Output]

    @property
    def widgets(self) -> list[Input]:
        return [entry for entry in self.inputs if entry.widget]

    @property
    def sockets(self) -> list[Input]:
        return [entry for entry in self.inputs if not entry.widget]

    def values(self, given: Json) -> list[Any]:
        """`widgets_values`: the given values or defaults, by position."""
        found: list[Any] = []
        for entry in self.widgets:
            found += [given.get(entry.name, entry.default), *entry.extra]
        return found

    def by_name(self, values: list[Any]) -> Json:
        """The other way: {"steps": 50, ...} of saved widgets. ValueError if their number is another one."""
        count = sum(1 + len(entry.extra) for entry in self.widgets)
        if len(values) != count:
            raise ValueError(f"{self.type} has {count} widget values, saved are {len(values)}")
        found, position = {}, 0
        for entry in self.widgets:
            found[entry.name] = values[position]
            position += 1 + len(entry.extra)
        return found


def parse(type: str, info: Json) -> NodeSchema:
    """A node of /object_info."""
    inputs = []
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            inputs += _inputs(name, spec[0], spec[1] if len(spec) > 1 else {}, kind == "optional")
    lists = info.get("output_is_list") or [False] * len(info["output"])
    outputs = [Output(*entry) for entry in zip(info["output_name"], info["output"], lists, strict=True)]
    return NodeSchema(type, info.get("display_name") or type, bool(info.get("output_node")), inputs, outputs)


def _inputs(name: str, kind: Any, options: Json, optional: bool) -> list[Input]:
    if kind == "COMFY_AUTOGROW_V3":
        template = options["template"]
        ((_, (inner, *_)),) = template["input"]["required"].items()
        return [Input(f"{name}.{template['prefix']}{i}", inner, False) for i in range(2)]
    choices = kind if isinstance(kind, list) else options.get("options")
    kind = "COMBO" if isinstance(kind, list) else kind
    if kind not in WIDGETS or options.get("forceInput"):
        return [Input(name, kind, False, optional)]
    extra = [CONTROL] if options.get("control_after_generate") else []
    if options.get("image_upload"):
        extra.append("image")
    choices = None if name in FILES else choices
    default = options.get("default", _first(kind, choices))
    limits = (options.get("min"), options.get("max")) if kind in ("INT", "FLOAT") else (None, None)
    return [Input(name, kind, True, optional, default, choices, *limits, extra)]


def _first(kind: str, choices: list[Any] | None) -> Any:
    if kind == "COMBO":
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False, "STRING": ""}[kind]


def fetch(server: str, type: str) -> NodeSchema:
    """A node's schema from a running ComfyUI. ValueError if it has no such node."""
    with urllib.request.urlopen(f"{server}/object_info/{type}") as answer:
        info = json.load(answer)
    if type not in info:
        raise ValueError(f"{server} has no node {type}")
    return parse(type, info[type])


def save(schemas: dict[str, NodeSchema], path: Path = SNAPSHOT) -> None:
    """Write a snapshot, without what is at its default."""
    found = {type: _lean(asdict(schema)) for type, schema in schemas.items()}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _lean(schema: Json) -> Json:
    del schema["type"]
    for key in ("inputs", "outputs"):
        schema[key] = [{name: value for name, value in entry.items() if name in KEPT or not _is_absent(value)}
                       for entry in schema[key]]  # fmt: skip
    return schema


def _is_absent(value: Any) -> bool:
    return value is None or value is False or value == []


def load(path: Path = SNAPSHOT) -> dict[str, NodeSchema]:
    """A snapshot's schemas."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        type: NodeSchema(
            type, entry["display_name"], entry["output_node"],
            [Input(**one) for one in entry["inputs"]], [Output(**one) for one in entry["outputs"]],
        )
        for type, entry in found.items()
    }  # fmt: skip
