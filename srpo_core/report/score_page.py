"""Scores of pictures as one self-contained page: means, best and worst, and a table to sort and search."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import Tensor

from srpo_core.columns import PART, WORD
from srpo_core.config import RewardConfig
from srpo_core.files import write_atomic
from srpo_core.intervals import Interval, bootstrap_ci
from srpo_core.preview import to_pil
from srpo_core.report.charts import decimals_for, histogram, interval_chart, number
from srpo_core.report.compare import MIN_PROMPTS
from srpo_core.report.markup import Html, section
from srpo_core.report.words import HELP, label, small
from srpo_core.score_files import PromptedPicture
from srpo_core.score_tables import fit_in_words
from srpo_core.scoring import Row, score_names

_SIDES = ((200, 192), (800, 144), (3000, 96))
_SMALLEST_SIDE = 64
"""(up to so many pictures, side of their thumbnails in pixels): a page of thousands still opens."""


def thumbnail(image: Tensor, side: int) -> str:
    """[3, H, W] in [0, 1] as a JPEG data URI whose longer side has at most `side` pixels."""
    picture = to_pil(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=84, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


class Thumbnails:
    """Data URIs by file, of a size that keeps a page of `count` pictures loadable."""

    def __init__(self, count: int) -> None:
        self.side = next((side for most, side in _SIDES if count <= most), _SMALLEST_SIDE)
        self.uris: dict[str, str] = {}

    def add(self, picture: PromptedPicture, image: Tensor) -> None:
        """Take in a picture as it is scored."""
        self.uris[str(picture.path)] = thumbnail(image, self.side)


def write_score_page(
    rows: Sequence[Row], settings: RewardConfig, thumbnails: Mapping[str, str], out: Path, title: str
) -> Path:
    """Write `out`.html; `thumbnails` are data URIs by the rows' "file". Its path."""
    page = out.with_name(f"{out.name}.html")
    names = score_names(rows)
    leading = next(name for name in ("relative", "reward") if name in names)
    parts = [
        _head(rows, settings, names, title),
        "<main>",
        _ends(rows, leading),
        _words(rows, settings),
        _table(rows, names, thumbnails, page.parent, leading),
        "</main>",
    ]
    style, more_style, script = (
        (resources.files("srpo_core.report") / name).read_text(encoding="utf-8")
        for name in ("style.css", "score.css", "score.js")
    )
    write_atomic(
        page,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: scores</title><style>{style}{more_style}</style></head><body>\n"
        + "\n".join(filter(None, parts))
        + f"<script>{script}</script></body></html>\n",
    )
    return page


def _head(rows: Sequence[Row], settings: RewardConfig, names: Sequence[str], title: str) -> str:
    rewards = [f"{one.name} (fit {one.fit})" for one in (settings, *settings.more)]
    items = [
        f"reward {' + '.join(rewards)}",
        f"liked: {', '.join(settings.liked)}",
        f"disliked: {', '.join(settings.disliked)}",
        f"sgp: {settings.contrast[0]} less {settings.contrast[1]}",
    ]
    chips = "".join(f"<li>{escape(item)}</li>" for item in items)
    count = f"{len(rows)} {'picture' if len(rows) == 1 else 'pictures'}"
    cards = "".join(_card(name, [row[name] for row in rows]) for name in names if not name.startswith((WORD, PART)))
    return (
        f'<header class="top"><p class="eyebrow">SRPO scores</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{count}, each for its own prompt. {escape(fit_in_words(settings))}</p>'
        f'<ul class="chips">{chips}</ul><div class="cards">{cards}</div></header>'
    )


def _card(name: str, values: Sequence[float]) -> str:
    interval = _interval(values)
    decimals = _decimals(values)
    span = f"95% CI [{number(interval.low, decimals)}, {number(interval.high, decimals)}]"
    lines = [span] if math.isfinite(interval.low) else []
    lines.append(f"from {number(min(values), decimals)} to {number(max(values), decimals)}")
    return (
        f'<div class="card" title="{escape(HELP.get(name, ""), quote=True)}"><div class="label">{escape(label(name))}'
        f'</div><div class="big">{number(interval.estimate, decimals)}</div>'
        + "".join(f'<div class="line">{line}</div>' for line in lines)
        + f"{histogram(label(name), values)}</div>"
    )


def _interval(values: Sequence[float]) -> Interval:
    if len(values) < MIN_PROMPTS:
        return Interval(math.fsum(values) / len(values), math.nan, math.nan)
    return bootstrap_ci(values, draws=2000)


def _decimals(values: Sequence[float]) -> int:
    return min(4, decimals_for(max(map(abs, values)), 3))


def _ends(rows: Sequence[Row], leading: str) -> str:
    """Places of the best and the worst pictures; the script fills them, for whatever the table is ordered by."""
    if len(rows) < 2:
        return ""
    blocks = "".join(
        f'<h3>{words} <span class="by">{escape(small(label(leading)))}</span></h3><div class="ends" id="{place}"></div>'
        for place, words in (("best", "Highest"), ("worst", "Lowest"))
    )
    return f'<section class="scripted">{blocks}</section>'


def _words(rows: Sequence[Row], settings: RewardConfig) -> str:
    """Which control words the pictures go with: the reward under each, less the mean over all of them."""
    sides = {word: side for side in ("disliked", "liked") for word in getattr(settings, side)}
    values = np.array([[row[f"{WORD}{word}"] for word in sides] for row in rows])
    above = values - values.mean(1, keepdims=True)
    order = sorted(range(len(sides)), key=lambda i: -above[:, i].mean())
    names = list(sides)
    bars = [(f"{names[i]} ({sides[names[i]]})", _interval(above[:, i].tolist())) for i in order]
    hint = (
        "The reward of each picture for its prompt worded with a control word, less the mean over all control words:"
        " words on the right describe these pictures best."
    )
    chart = interval_chart("Control words, best fitting first", bars, "mean and 95% interval", gutter=160)
    return section("words", "Control words", hint, f'<div class="half">{chart}</div>') if chart else ""


def _table(rows: Sequence[Row], names: Sequence[str], thumbnails: Mapping[str, str], folder: Path, leading: str) -> str:
    decimals = {name: _decimals([row[name] for row in rows]) for name in names}
    ranges = {name: (min(row[name] for row in rows), max(row[name] for row in rows)) for name in names}
    heads = "".join(_head_cell(name) for name in ("picture", *names))
    lines = []
    for row in sorted(rows, key=lambda row: -row[leading]):
        cells = "".join(_number_cell(name, row[name], decimals[name], ranges[name]) for name in names)
        lines.append(f"<tr>{_picture_cell(row, thumbnails.get(row['file']), folder)}{cells}</tr>")
    options = "".join(
        f'<option value="{i}"{" selected" if name == leading else ""}>{escape(_title(name))}</option>'
        for i, name in enumerate(("picture", *names))
    )
    controls = (
        '<div class="controls scripted"><input id="filter" type="search" placeholder="Search prompts and files" '
        'aria-label="Search prompts and files">'
        f'<label>Order by <select id="order">{options}</select></label>'
        '<label><input id="upward" type="checkbox"> lowest first</label>'
        '<label><input id="showwords" type="checkbox"> control words</label>'
        '<span id="count" class="soft" role="status"></span></div>'
    )
    body = (
        f'{controls}<div class="scroll scores"><table id="scores"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    return section("pictures", "Pictures", "", body)


def _title(name: str) -> str:
    return name.removeprefix(WORD) if name.startswith(WORD) else label(name)


def _head_cell(name: str) -> Html:
    style = ' class="word"' if name.startswith(WORD) else ""
    hint = escape(HELP.get(name, ""), quote=True)
    return Html(f'<th{style} title="{hint}"><button type="button">{escape(_title(name))}</button></th>')


def _number_cell(name: str, value: float, decimals: int, span: tuple[float, float]) -> str:
    share = (value - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.0
    style = "word" if name.startswith(WORD) else "num"
    return f'<td class="{style}" style="--v:{share:.2f}">{number(value, decimals)}</td>'


def _picture_cell(row: Row, uri: str | None, folder: Path) -> str:
    file, prompt = Path(row["file"]), str(row["prompt"])
    image = f'<img loading="lazy" src="{uri}" alt="">' if uri else '<span class="none"></span>'
    address = _address(file, folder)
    if address is not None:
        image = f'<a href="{escape(address, quote=True)}">{image}</a>'
    return f'<td class="what"><div>{image}<span><b>{escape(file.name)}</b><br>{escape(prompt)}</span></div></td>'


def _address(file: Path, folder: Path) -> str | None:
    """The picture's address as seen from the page's folder; None across drives."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return None
