"""The page: sections in reading order, each a function from runs to HTML ("" where a run has nothing for it)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources

from srpo_core.columns import is_detail
from srpo_core.report.changes import COLUMNS, InWords, change_row
from srpo_core.report.charts import interval_chart
from srpo_core.report.compare import MIN_PROMPTS, Change, changes
from srpo_core.report.control_words import without_words, words_section
from srpo_core.report.curves import curves_section
from srpo_core.report.data import PairedScores, RunData
from srpo_core.report.gallery import evaluation_section, method_section, previews_section
from srpo_core.report.markup import section, table
from srpo_core.report.settings import settings_section
from srpo_core.report.words import HELP, label, small

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a page may do, whoever wrote the prompts on it: be looked at."""
Compared = tuple[PairedScores, str]
"""Scores before and after, and where they come from."""


def render(runs: Sequence[RunData]) -> str:
    """The whole page for one run or several of the same settings."""
    compared = [run.compared() for run in runs]
    found = [item for item in compared if item is not None]
    pooled = _pooled([scores for scores, _ in found])
    sections = [
        _headline(runs, [source for _, source in found], pooled),
        evaluation_section(runs, label),
        _measures(runs, compared, pooled),
        words_section(runs, pooled),
        curves_section(runs, label),
        previews_section(runs),
        method_section(next((run for run in runs if run.method_check), runs[0])),
        settings_section(runs),
    ]
    title = "SRPO: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    style = (resources.files("srpo_core.report") / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>\n"
        + "\n".join(filter(None, [sections[0], "<main>", *sections[1:], _footer(runs), "</main>"]))
        + "</body></html>\n"
    )


def _pooled(scores: Sequence[PairedScores]) -> list[Change]:
    """Changes over all runs; none where there are no scores or runs can't be pooled."""
    if not scores or len({len(run.prompts) for run in scores}) > 1:
        return []
    return changes(scores)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _state(run: RunData) -> str:
    total = run.config.optim.steps
    if not run.steps:
        return "no step logged yet"
    return f"{run.last_step} steps" if run.finished else f"step {run.last_step} of {total}"


def _chips(runs: Sequence[RunData]) -> str:
    config = runs[0].config
    seconds = sum(sum(run.series("seconds", "total")[1]) for run in runs)
    trained = f"LoRA rank {config.lora.rank}" if config.lora.rank else "all parameters"
    items = [
        *(f"{run.name}: {_state(run)}" if len(runs) > 1 else _state(run) for run in runs),
        f"model {config.model.family}",
        f"reward {' + '.join(one.name for one in (config.reward, *config.reward.more))}",
        f"{trained}, lr {config.optim.lr:g}",
        f"{config.data.width} × {config.data.height}",
    ]
    if seconds:
        items.append(_duration(seconds) + (" in all" if len(runs) > 1 else ""))
    if runs[0].made_with.get("device"):
        items.append(str(runs[0].made_with["device"]))
    return f'<ul class="chips">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _headline(runs: Sequence[RunData], sources: Sequence[str], pooled: Sequence[Change]) -> str:
    name = runs[0].name if len(runs) == 1 else ", ".join(run.name for run in runs)
    parts = [
        '<header class="top"><p class="eyebrow">SRPO training report</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{_summary(runs, sources, pooled)}</p>',
        _chips(runs),
        _notices(runs, sources, pooled),
    ]
    leading = [change for change in pooled if not is_detail(change.name)]
    leading = leading[: 6 if any(change.name == "sgp" for change in leading) else 5]
    if leading:
        six = " six" if len(leading) == 6 else ""
        parts.append(f'<div class="cards{six}">{"".join(_card(change) for change in leading)}</div>')
    return "".join(parts) + "</header>"


def _summary(runs: Sequence[RunData], sources: Sequence[str], pooled: Sequence[Change]) -> str:
    if not pooled:
        if sources:
            return "These runs were evaluated on different numbers of prompts and are not pooled: each stands below."
        return "Nothing to compare yet: the run has no final evaluation and no two previews."
    where = "held-out prompts" if all(source == "final evaluation" for source in sources) else "preview prompts"
    prompts = pooled[0].count // len(sources)
    text = f"{prompts} {where}" + (f" in each of {len(sources)} runs" if len(sources) > 1 else "")
    said = []
    for change in [c for c in pooled if not is_detail(c.name)][:4]:
        words = InWords(change)
        happened = {
            "clear rise": f"rose by {words.size}",
            "clear fall": f"fell by {words.size}",
            "no clear change": "shows no clear change",
        }.get(change.verdict, words.course)
        said.append(f"<b>{escape(small(label(change.name)))}</b> {happened}")
    joined = ", ".join(said[:-1]) + " and " + said[-1] if len(said) > 1 else said[0]
    few = " (too few for intervals)" if prompts < MIN_PROMPTS else ""
    return f"On {text}{few}, drawn before and after training from the same noise, {joined}."


def _notices(runs: Sequence[RunData], sources: Sequence[str], pooled: Sequence[Change]) -> str:
    lines = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        if not run.finished:
            lines.append(f"{prefix}this run is not finished ({_state(run)}).")
        lines.extend(prefix + note for note in run.notes)
    others = sorted({source for source in sources if source != "final evaluation"})
    if others:
        lines.append(f"No final evaluation; the numbers compare the {' and '.join(others)}.")
    if len(sources) < len(runs) and sources:
        lines.append(f"Only {len(sources)} of {len(runs)} runs have scores to compare.")
    return f'<div class="notice">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""


def _card(change: Change) -> str:
    words = InWords(change)
    direction = {"clear rise": "up", "clear fall": "down"}.get(change.verdict, "")
    verdict = f'<span class="verdict {direction}">{change.verdict}</span>'
    return (
        f'<div class="card" title="{escape(HELP.get(change.name, ""), quote=True)}">'
        f'<div class="label">{escape(label(change.name))}{verdict}</div>'
        f'<div class="big">{words.difference}</div>'
        + (f'<div class="line">95% CI {words.range}</div>' if words.range != "–" else "")
        + f'<div class="line">from {words.before} to {words.after}</div>'
        f'<div class="line">effect size {words.effect} {words.effect_range.strip("–")}</div></div>'
    )


_HOW = (
    "Each prompt is drawn before and after training from the same noise ({count} pairs), so differences are paired. "
    "Intervals of differences and effect sizes are percentile bootstraps; those of the share of prompts on which a "
    "measure rose are Wilson's, ties counting half."
)
_POOLING = " Runs are pooled by a bootstrap over runs and prompts; each run stands below."
_EFFECT = (
    "Mean paired difference over its standard deviation between prompts; about 0.2 is small, 0.5 medium, 0.8 large."
)


def _measures(runs: Sequence[RunData], compared: Sequence[Compared | None], pooled: Sequence[Change]) -> str:
    apart = {run.name: changes([item[0]]) for run, item in zip(runs, compared, strict=True) if item is not None}
    if not apart:
        return ""
    rows = []
    for change in without_words(pooled):
        detail = is_detail(change.name)
        style = "head" if len(apart) > 1 and not detail else ""
        rows.append(change_row(change, label(change.name), "sub" if detail else "", style))
        if len(apart) > 1 and not detail:
            rows += [change_row(c, run, "run") for run, found in apart.items() for c in found if c.name == change.name]
    if not pooled:
        rows = [change_row(c, f"{label(c.name)}, {run}") for run, found in apart.items() for c in without_words(found)]
    shown = without_words(pooled or next(iter(apart.values())))
    chart = interval_chart(
        "Effect size with its 95% interval",
        [(label(c.name), c.effect) for c in shown if not is_detail(c.name)],
        _EFFECT,
    )
    count = sum(len(item[0].prompts) for item in compared if item is not None)
    how = _HOW.format(count=count) + (_POOLING if len(apart) > 1 and pooled else "")
    left = f'<div><p class="hint">{how}</p>{_meanings([change.name for change in shown])}</div>'
    return section("measures", "What changed", "", f'<div class="split">{left}{chart}</div>', table(COLUMNS, rows))


def _meanings(names: Sequence[str]) -> str:
    known = [f"<li><b>{escape(label(name))}</b>: {HELP[name]}</li>" for name in names if name in HELP]
    return f'<ul class="hint">{"".join(known)}</ul>' if known else ""


def _footer(runs: Sequence[RunData]) -> str:
    folders = ", ".join(f"<code>{escape(str(run.folder))}</code>" for run in runs)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    source = "Every number comes from metrics.jsonl and evaluation.json there."
    return f"<footer>Made from {folders} on {now}. {source}</footer>"
