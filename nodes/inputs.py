"""Widgets made from the fields of a run's description, so that a setting is described once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from comfy_api.latest import io
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from srpo_core.config import ConfigError, RunConfig, Section
from srpo_core.description import load_run, reason_of
from srpo_core.randomness import SEEDS

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
_CAN_HIDE = "advanced" in inspect.signature(io.Int.Input.__init__).parameters
RECIPE = "flux-dev-lora"
"""The preset whose values widgets show at first."""


def schema(**fields: Any) -> io.Schema:
    """A node's schema, without the search aliases where ComfyUI is too old to know them."""
    return io.Schema(**{name: value for name, value in fields.items() if name != "search_aliases" or name in _FIELDS})


def advanced() -> dict[str, bool]:
    """For an input that the page shows on demand only, where ComfyUI is new enough for that."""
    return {"advanced": True} if _CAN_HIDE else {}


def widget(section: type[Section], name: str, **changes: Any) -> io.Input:
    """The widget of a field: its type, default, limits and description, with `changes` (id, default, tooltip, ...).

    Fields are numbers, booleans, texts, choices (Literal), lists of words and lists of choices; what may be unset is a
    text that may be empty, or a number that may be 0. A text with `options` is a choice too.
    """
    field = section.model_fields[name]
    given = {"id": name, "default": field.default, "tooltip": _sentence(field.description or "")}
    return _widget(field.annotation, field.metadata, given | changes)


def _widget(kind: Any, bounds: Sequence[Any], given: dict[str, Any]) -> io.Input:
    kind, bounds, can_be_unset = _plain(kind, bounds)
    if kind in (int, float):
        given = {"step": 1 if kind is int else 0.01} | given
        if can_be_unset:
            return io.Float.Input(**{"min": 0.0} | given | {"default": given["default"] or 0.0})
        return (io.Int if kind is int else io.Float).Input(**_limits(bounds, given["step"]) | given)
    if kind is bool:
        return io.Boolean.Input(**given)
    if choices := given.get("options") or _choices(kind):
        return io.Combo.Input(**{"options": choices} | given | {"default": _text(given["default"])})
    return io.String.Input(**given | {"default": _text(given["default"])})


def _plain(kind: Any, bounds: Sequence[Any] = ()) -> tuple[Any, list[Any], bool]:
    """(type, bounds, whether it may be unset) of a field's annotation."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        plain, inside, _ = _plain(inner)
        return plain, [*bounds, *inside], True
    if typing.get_origin(kind) is Annotated:
        fields = (mark for mark in parts[1:] if isinstance(mark, FieldInfo))
        return parts[0], [*bounds, *(bound for field in fields for bound in field.metadata)], False
    return kind, list(bounds), False


def _choices(kind: Any) -> list[str]:
    """What a choice offers; of a list of choices all of them together and each alone. Empty for other types."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return list(parts)
    if typing.get_origin(kind) is list and typing.get_origin(parts[0]) is Literal:
        return [_text(list(typing.get_args(parts[0]))), *typing.get_args(parts[0])]
    return []


def _text(value: Any) -> str:
    """Words as a widget shows them; empty for what is unset."""
    return ", ".join(value) if isinstance(value, list) else value or ""


def _limits(metadata: Sequence[Any], step: float) -> dict[str, float]:
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a run by its dotted name, as one widget of a node; or as two, where it is a pair of numbers."""

    name: str
    ids: tuple[str, ...] = ()
    """Of its widgets; its own name if there are none here."""
    ends: tuple[str, ...] = ("the first number", "the second number")
    """What each of two widgets is."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """See `widget`."""

    @property
    def widget_ids(self) -> tuple[str, ...]:
        return self.ids or (self.name.partition(".")[2],)

    def widgets(self, recipe: str = RECIPE) -> list[io.Input]:
        """Its widgets, with a preset's value."""
        section, _, field = self.name.partition(".")
        kind = RunConfig.model_fields[section].annotation
        value = getattr(getattr(_preset(recipe), section), field)
        if not isinstance(value, tuple):
            return [widget(kind, field, **{"id": self.widget_ids[0], "default": value} | self.changes)]
        info = kind.model_fields[field]
        told = _sentence(info.description or "")
        return [
            _widget(part, (), {"id": id, "default": one, "tooltip": f"{told}. This is {end}."} | self.changes)
            for part, id, one, end in zip(typing.get_args(info.annotation), self.ids, value, self.ends, strict=True)
        ]

    def value(self, given: Mapping[str, Any]) -> Any:
        """What the widgets say, as the field takes it."""
        section, _, field = self.name.partition(".")
        kind, _, can_be_unset = _plain(RunConfig.model_fields[section].annotation.model_fields[field].annotation)
        values = [given[id] for id in self.widget_ids]
        if len(values) > 1:
            return tuple(values)
        if can_be_unset:
            return values[0] or None
        return words(values[0]) if typing.get_origin(kind) is list else values[0]


@functools.cache
def _preset(name: str) -> RunConfig:
    return load_run(name)


def run_widgets(settings: Sequence[Setting], recipe: str = RECIPE) -> list[io.Input]:
    """The widgets of settings, in order."""
    return [one for setting in settings for one in setting.widgets(recipe)]


def run_values(settings: Sequence[Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...} of widgets' values. ConfigError names each widget whose value can't be, and why."""
    data: dict[str, dict[str, Any]] = {}
    ids: dict[tuple[str, ...], tuple[str, ...]] = {}
    for setting in settings:
        section, _, field = setting.name.partition(".")
        data.setdefault(section, {})[field] = setting.value(given)
        ids[section, field] = setting.widget_ids
    complaints = []
    for section, values in data.items():
        try:
            RunConfig.model_fields[section].annotation.model_validate(values)
        except ValidationError as error:
            complaints += [_complaint(problem, section, ids) for problem in error.errors()]
    if complaints:
        raise ConfigError("; ".join(complaints))
    return {f"{section}.{field}": value for section, values in data.items() for field, value in values.items()}


def _complaint(problem: Mapping[str, Any], section: str, ids: Mapping[tuple[str, ...], tuple[str, ...]]) -> str:
    reason = reason_of(problem)
    if not problem["loc"]:  # of several values together: the reason names them
        return reason
    field, *place = problem["loc"]
    names = ids[section, field]
    return f"{names[place[0] if len(names) > 1 and place else 0]}={problem['input']!r}: {reason}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def seed(**changes: Any) -> io.Input:
    """A seed, with ComfyUI's control of what comes after a run."""
    given = {"default": 0, "min": 0, "max": SEEDS - 1, "control_after_generate": True, "tooltip": "Seed of the noise."}
    return io.Int.Input("seed", **given | changes)


def words(text: str) -> list[str]:
    """The words or phrases of a text that separates them by commas or lines."""
    return [word for part in re.split(r"[,\n]", text) if (word := part.strip())]
