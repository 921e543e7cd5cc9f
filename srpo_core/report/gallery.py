"""Sections of pictures: before and after, previews over the steps, and the method check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from srpo_core.columns import is_detail
from srpo_core.report.charts import decimals_for, number
from srpo_core.report.compare import measure_order
from srpo_core.report.data import PairedScores, Preview, RunData
from srpo_core.report.markup import folded, row, section, table
from srpo_core.report.pictures import embed

MAX_PAIRS = 24
_EVALUATION_BUDGET, _PREVIEW_BUDGET, _CLAIM_BUDGET = 3_300_000, 1_200_000, 700_000


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices spread evenly over range(count), both ends included."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def evaluation_section(runs: Sequence[RunData], label: Callable[[str], str]) -> str:
    """Pairs of pictures of the final evaluation with prompt and scores; the first run's open, others folded."""
    shown = [run for run in runs if run.evaluation is not None]
    if not shown:
        return ""
    most = MAX_PAIRS if len(shown) == 1 else max(6, MAX_PAIRS // len(shown))
    blocks = []
    for i, run in enumerate(shown):
        pairs = _pairs(run, run.evaluation, most, _EVALUATION_BUDGET // len(shown), label)
        blocks.append(folded(run.name, pairs, opened=i == 0) if len(shown) > 1 else pairs)
    counts = [len(run.evaluation.prompts) for run in shown]
    if max(counts) <= most:
        chosen = "all held-out prompts" if len(set(counts)) > 1 else f"all {counts[0]} held-out prompts"
    else:
        chosen = f"{most} of {max(counts)} held-out prompts, evenly spaced, not picked"
    return section(
        "pictures", "Before and after", f"The same prompt and noise, before and after training: {chosen}.", *blocks
    )


def _pairs(run: RunData, scores: PairedScores, most: int, budget: int, label: Callable[[str], str]) -> str:
    indices = spread(len(scores.prompts), most)
    uris = iter(embed([path for index in indices for path in run.pictures(index)], budget))
    names = [name for name in measure_order(scores.names()) if not is_detail(name)][:4]
    decimals = {name: decimals_for(max(map(abs, scores.before[name] + scores.after[name])), 3) for name in names}
    cards = []
    for index in indices:
        prompt = scores.prompts[index]
        images = "".join(
            f"<figure>{_image(next(uris), f'{side}: {prompt}')}<figcaption>{side}</figcaption></figure>"
            for side in ("before", "after")
        )
        lines = ""
        for name in names:
            before, after = (number(side[name][index], decimals[name]) for side in (scores.before, scores.after))
            lines += f"<span>{escape(label(name))}</span><span>{before} → {after}</span>"
        text = f'<div class="text">{escape(prompt)}<div class="scores">{lines}</div></div>'
        cards.append(f'<div class="pair"><div class="two">{images}</div>{text}</div>')
    ratio = f"{run.config.data.width} / {run.config.data.height}"
    return f'<div class="pairs" style="--ratio: {ratio}">{"".join(cards)}</div>'


def _image(uri: str | None, text: str) -> str:
    if uri is None:
        return '<div class="missing">picture missing</div>'
    return f'<img loading="lazy" src="{uri}" alt="{escape(text, quote=True)}">'


def previews_section(runs: Sequence[RunData]) -> str:
    """Contact sheets over the steps, at most six a run; the first run's open, others folded."""
    shown = [(run, [preview for preview in run.previews if preview.image is not None]) for run in runs]
    shown = [(run, previews) for run, previews in shown if previews]
    if not shown:
        return ""
    blocks = []
    for i, (run, previews) in enumerate(shown):
        sheets = _sheets([previews[j] for j in spread(len(previews), 6)], _PREVIEW_BUDGET // len(shown))
        blocks.append(folded(run.name, sheets, opened=i == 0) if len(runs) > 1 else sheets)
    return section("previews", "Previews over the steps", "The same prompts and noise all along.", *blocks)


def _sheets(previews: Sequence[Preview], budget: int) -> str:
    uris = embed([preview.image for preview in previews], budget, max_side=768)
    figures = "".join(
        f"<figure>{_image(uri, f'Step {preview.step}')}<figcaption>Step {preview.step}</figcaption></figure>"
        for preview, uri in zip(previews, uris, strict=True)
    )
    return f'<div class="sheets">{figures}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_cell(part) for part in value) + "]"
    return "–" if value is None else str(value)


def _claim_table(rows: Any) -> str:
    rows = [found for found in rows if isinstance(found, dict)] if isinstance(rows, list) else []
    columns = list(dict.fromkeys(str(key) for found in rows for key in found))
    return table(columns, [row(_cell(found.get(column)) for column in columns) for found in rows]) if columns else ""


def method_section(run: RunData) -> str:
    """Claims of the method measured on this run's models: title, finding, rows and perhaps a picture each."""
    if not run.method_check:
        return ""
    named = [claim.get("image") for claim in run.method_check]
    named = [name if name and Path(str(name)).name == str(name) else None for name in named]  # in the run folder only
    uris = iter(embed([run.folder / str(name) for name in named if name], _CLAIM_BUDGET, max_side=1024))
    blocks = []
    for claim, name in zip(run.method_check, named, strict=True):
        title = str(claim.get("title", "Claim"))
        picture = _image(next(uris), title) if name else ""
        finding = f"<p>{escape(str(claim.get('finding', '')))}</p>"
        blocks.append(
            f'<div class="claim"><h3>{escape(title)}</h3>{finding}{_claim_table(claim.get("rows"))}{picture}</div>'
        )
    return section("method", "Method check", "What the method claims, measured here, whatever it says.", *blocks)
