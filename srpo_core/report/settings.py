"""The section of settings: every value, what differs from the nearest preset, and what the run was made with."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from srpo_core.config import ConfigError, RunConfig, flat
from srpo_core.description import describe_fields, load_run, preset_names
from srpo_core.report.data import RunData
from srpo_core.report.markup import Html, folded, row, section, table

_PLACE = "output.dir"
"""A setting that differs between any two runs and makes no difference."""


def _values(config: RunConfig) -> dict[str, Any]:
    return dict(flat(config.model_dump(mode="json")))


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [name for name in first if name != _PLACE and first[name] != second.get(name)]


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset that differs in the fewest settings, or "the defaults", and its settings."""
    candidates = [("the defaults", _values(RunConfig()))]
    for name in preset_names():
        try:
            candidates.append((f"preset {name}", _values(load_run(name))))
        except ConfigError:  # a preset of another version
            continue
    return min(candidates, key=lambda item: len(_differing(_values(config), item[1])))


def show(value: Any) -> str:
    """A setting's value in words."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(show(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_section(runs: Sequence[RunData]) -> str:
    """What differs between the runs and from the first run's preset, then all settings and versions, folded."""
    values = [_values(run.config) for run in runs]
    base_name, base = nearest_preset(runs[0].config)
    changed = _differing(values[0], base)
    between = [name for name in values[0] if any(name in _differing(values[0], other) for other in values[1:])]
    parts = []
    if between:
        rows = [row([_code(name), *(show(other[name]) for other in values)]) for name in between]
        parts.append("<h3>What differs between the runs</h3>")
        parts.append(table(["Setting", *(run.name for run in runs)], rows, "plain"))
    count = "One setting differs" if len(changed) == 1 else f"{len(changed)} settings differ"
    of_run = f" of {escape(runs[0].name)}" if len(runs) > 1 else ""
    parts.append(f'<p class="hint">{count}{of_run} from {escape(base_name)}{":" if changed else "."}</p>')
    if changed:
        parts.append(_settings_table({name: values[0][name] for name in changed}, base, base_name, changed))
    parts.append(folded("All settings", _settings_table(values[0], base, base_name, changed)))
    parts.append(_made_with(runs))
    return section("settings", "Settings", "", *parts)


def _code(name: str) -> Html:
    return Html(f"<code>{escape(name)}</code>")


def _settings_table(values: dict[str, Any], base: dict[str, Any], base_name: str, changed: Sequence[str]) -> Html:
    described = {name: text for name, _, _, text in describe_fields()}
    rows = [
        row(
            [_code(name), show(value), show(base.get(name)), described.get(name, "")],
            style="changed" if name in changed and len(changed) < len(values) else "",
        )
        for name, value in values.items()
    ]
    return table(["Setting", "This run", base_name[:1].upper() + base_name[1:], "What it is"], rows, "settings")


def _made_with(runs: Sequence[RunData]) -> str:
    items = [{name.split(".")[-1]: value for name, value in flat(run.made_with)} for run in runs]
    names = dict.fromkeys(name for item in items for name in item)
    rows = [row([name, " / ".join(dict.fromkeys(show(item.get(name)) for item in items))]) for name in names]
    return folded("Made with", table([], rows, "plain")) if rows else ""
