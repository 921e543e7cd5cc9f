"""Changes of measures in words and numbers, for cards and table rows."""

from __future__ import annotations

import math

from srpo_core.report.charts import interval_decimals, number
from srpo_core.report.compare import Change
from srpo_core.report.markup import Html, row

COLUMNS = ("Measure", "Before", "After", "Difference", "95% CI", "Effect size d", "95% CI", "Rose on", "95% CI")


def _signed(value: float, decimals: int) -> str:
    text = number(value, decimals)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def _effect(value: float) -> str:
    return number(value, 2 if abs(value) < 10 else 1)


class InWords:
    """One change in words and numbers, as table cells and cards show them."""

    def __init__(self, change: Change) -> None:
        difference, effect, rose = change.difference, change.effect, change.rose
        decimals = interval_decimals(difference)
        self.before, self.after = number(change.before, decimals), number(change.after, decimals)
        self.difference = _signed(difference.estimate, decimals)
        self.size = number(abs(difference.estimate), decimals)
        self.range = self.effect_range = "–"
        if not math.isnan(difference.low):
            self.range = f"[{_signed(difference.low, decimals)}, {_signed(difference.high, decimals)}]"
            self.effect_range = f"[{_effect(effect.low)}, {_effect(effect.high)}]"
        self.effect = _effect(effect.estimate)
        self.rose, self.rose_range = f"{rose.estimate:.0%}", f"[{rose.low:.0%}, {rose.high:.0%}]"

    @property
    def course(self) -> str:
        """What it did, for too few prompts to say more."""
        same = self.before == self.after
        return f"stayed at {self.after}" if same else f"went from {self.before} to {self.after}"


def change_row(change: Change, name: str, first: str = "", style: str = "") -> Html:
    """A change as a row of a table with COLUMNS; `first` and `style` are the classes of its first cell and of it."""
    words = InWords(change)
    cells = [
        name, words.before, words.after, Html(f"<b>{words.difference}</b>"), Html(f"<small>{words.range}</small>"),
        words.effect, Html(f"<small>{words.effect_range}</small>"),
        words.rose, Html(f"<small>{words.rose_range}</small>"),
    ]  # fmt: skip
    return row(cells, style, first)
