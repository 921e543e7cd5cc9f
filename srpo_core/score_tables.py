"""Scores of pictures as CSV and JSON files and as a table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from srpo_core.columns import WORD, is_detail
from srpo_core.config import RewardConfig
from srpo_core.files import write_atomic
from srpo_core.scoring import Row, row_means

_FITS = {
    "pad": "whole, with black beside what is not square (--fit crop takes the centre square)",
    "crop": "by their centre square (--fit pad takes them whole, with black beside)",
}
_FIRST_WIDTH = 12
"""Fewest characters of a column of names or prompts that are worth showing."""


def write_tables(rows: Sequence[Row], settings: RewardConfig, out: Path) -> tuple[Path, Path]:
    """Write `out`.csv (a line per picture) and `out`.json (settings, means and rows)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table, record = out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.json")
    write_atomic(table, text.getvalue())
    data = {"reward": settings.model_dump(), "count": len(rows), "mean": row_means(rows), "pictures": list(rows)}
    write_atomic(record, json.dumps(data, indent=1, ensure_ascii=False))
    return table, record


def fit_in_words(settings: RewardConfig) -> str:
    """Which reward, or rewards of a mixture, scored the pictures and how it saw them: a sentence."""
    fits = {one.name: one.fit for one in (settings, *settings.more)}
    if len(set(fits.values())) == 1:
        return f"Scored by {' and '.join(fits)}, which saw the pictures {_FITS[settings.fit]}."
    return "; ".join(f"{name} saw the pictures {_FITS[fit]}" for name, fit in fits.items()) + "."


def print_table(rows: Sequence[Row], settings: RewardConfig, most: int = 20, console: Console | None = None) -> None:
    """Rows and their means on the terminal, as many columns as fit it; control words as means below."""
    console = console or Console(highlight=False)
    average = row_means(rows)
    every = [name for name in average if not name.startswith(WORD)]
    names, first, prompt = _layout(every, rows, console.width)
    table = Table(show_footer=len(rows) > 1)
    table.add_column("picture", footer=f"mean of {len(rows)}", width=first, overflow="ellipsis", no_wrap=True)
    if prompt:
        table.add_column("prompt", width=prompt, overflow="ellipsis", no_wrap=True)
    for name in names:
        table.add_column(_plain(name), footer=f"{average[name]:.4f}", justify="right", no_wrap=True)
    for row in rows[:most]:
        texts = [_plain(_shortened(Path(row["file"]).name, first)), *([_plain(row["prompt"])] if prompt else [])]
        table.add_row(*texts, *(f"{row[name]:.4f}" for name in names))
    console.print(table)
    left_out = [f"{name} {average[name]:.4f}" for name in every if name not in names]
    _say(console, f"... and {len(rows) - most} more; all of them are in the files below." if len(rows) > most else "")
    _say(console, f"Too wide for the table, means: {', '.join(left_out)}" if left_out else "")
    words = {name.removeprefix(WORD): value for name, value in average.items() if name.startswith(WORD)}
    _say(console, f"Mean reward by control word: {', '.join(f'{word} {value:.4f}' for word, value in words.items())}")
    _say(console, f"sgp is the reward as {settings.contrast[0]!r} less that as {settings.contrast[1]!r}.")
    _say(console, fit_in_words(settings))


def _shortened(name: str, width: int) -> str:
    """A file's name in `width` characters: its end tells pictures of one prompt apart, so the middle is left out."""
    return name if len(name) <= width else f"{name[: width - 9]}…{name[-8:]}"


def _plain(text: str) -> Text:
    """Text for the terminal as it is: without markup or emoji codes, and without what steers a terminal."""
    return Text("".join(letter if letter.isprintable() else " " for letter in text))


def _say(console: Console, text: str) -> None:
    if text:
        console.print(_plain(text))


def _layout(names: Sequence[str], rows: Sequence[Row], width: int) -> tuple[list[str], int, int]:
    """The score columns that fit into `width` characters, and the widths of the picture's and the prompt's column.

    Scores come first, a mixture's parts after the others; the prompt gets what is left, 0 where that is too little.
    """
    numbers = {name: max(len(name), *(len(f"{row[name]:.4f}") for row in rows)) + 3 for name in names}
    longest = max(len(f"mean of {len(rows)}"), *(len(Path(row["file"]).name) for row in rows))
    first = min(longest, max(_FIRST_WIDTH, width // 4))
    left = width - first - 4
    kept = set()
    for name in sorted(names, key=is_detail):
        if numbers[name] <= left:
            kept.add(name)
            left -= numbers[name]
    prompt = min(max(len(row["prompt"]) for row in rows), left - 3, 60)
    return [name for name in names if name in kept], first, prompt if prompt >= _FIRST_WIDTH else 0
