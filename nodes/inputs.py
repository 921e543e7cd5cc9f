"""Widgets made from the fields of a run's description, so that a setting is described once."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from comfy_api.latest import io

from srpo_core.config import Section
from srpo_core.randomness import SEEDS

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """A node's schema, without the search aliases where ComfyUI is too old to know them."""
    return io.Schema(**{name: value for name, value in fields.items() if name != "search_aliases" or name in _FIELDS})


def widget(section: type[Section], name: str, **changes: Any) -> io.Input:
    """The widget of a field: its type, default, limits and description, with `changes` (id, default, tooltip, ...).

    Fields are numbers, booleans, texts, choices (Literal) and lists of words.
    """
    field = section.model_fields[name]
    given: dict[str, Any] = {"id": name, "default": field.default, "tooltip": _sentence(field.description or "")}
    kind = field.annotation
    if kind in (int, float):
        step = changes.get("step", 1 if kind is int else 0.01)
        given |= {"step": step, **_limits(field.metadata, step)}
        return (io.Int if kind is int else io.Float).Input(**given | changes)
    if kind is bool:
        return io.Boolean.Input(**given | changes)
    if typing.get_origin(kind) is typing.Literal:
        return io.Combo.Input(**{"options": list(typing.get_args(kind))} | given | changes)
    if kind == list[str]:
        given["default"] = ", ".join(field.default)
    return io.String.Input(**given | changes)


def _limits(metadata: list[Any], step: float) -> dict[str, float]:
    """A field's bounds as a widget has them: both included."""
    limits = {}
    for bound in metadata:
        match bound:
            case Ge():
                limits["min"] = bound.ge
            case Gt():
                limits["min"] = bound.gt + step
            case Le():
                limits["max"] = bound.le
            case Lt():
                limits["max"] = bound.lt - step
    return limits


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def seed(**changes: Any) -> io.Input:
    """A seed, with ComfyUI's control of what comes after a run."""
    given = {"default": 0, "min": 0, "max": SEEDS - 1, "control_after_generate": True, "tooltip": "Seed of the noise."}
    return io.Int.Input("seed", **given | changes)


def words(text: str) -> list[str]:
    """The words or phrases of a text that separates them by commas or lines."""
    return [word for part in re.split(r"[,\n]", text) if (word := part.strip())]
