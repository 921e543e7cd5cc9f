"""What a chart draws of a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srpo_core.columns import is_detail

MOST_POINTS = 2000
"""Of a curve; more are thinned out evenly."""


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a chart draws of a run's metrics: a list per curve, null where a step has no finite number.

    {"steps", "loss", "grad_norm", "score": {branch: ...}, "reward": {branch: ...}} of the trained steps, and
    "preview": {"steps", measure: ...} of those that drew one.
    """
    trained = _thinned([line for line in lines if line["step"] > 0])
    drawn = _thinned([line for line in lines if line.get("preview")])
    told: dict[str, Any] = {"steps": [line["step"] for line in trained]}
    told |= {name: [finite(line.get(name)) for line in trained] for name in ("loss", "grad_norm")}
    told |= {name: _columns(trained, name) for name in ("score", "reward")}
    measures = {name: values for name, values in _columns(drawn, "preview").items() if not is_detail(name)}
    return told | {"preview": {"steps": [line["step"] for line in drawn], **measures}}


def _thinned(lines: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MOST_POINTS lines, evenly spread, the last one among them."""
    stride = -(-len(lines) // MOST_POINTS) or 1
    return lines[(len(lines) - 1) % stride :: stride]


def _columns(lines: Iterable[Mapping[str, Any]], name: str) -> dict[str, list[float | None]]:
    """The curves of a metric that is a dict, by its keys."""
    dicts = [line.get(name) if isinstance(line.get(name), dict) else {} for line in lines]
    return {key: [finite(one.get(key)) for one in dicts] for key in dict.fromkeys(key for one in dicts for key in one)}


def finite(value: Any) -> float | None:
    """A finite number as it is; None for anything else, which JSON has no word for."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None
