"""The section about control words: the reward under each of them, over the steps and before against after."""

from __future__ import annotations

from collections.abc import Sequence

from srpo_core.columns import WORD
from srpo_core.report.changes import COLUMNS, change_row
from srpo_core.report.charts import Series, interval_chart, line_chart
from srpo_core.report.compare import Change
from srpo_core.report.data import RunData
from srpo_core.report.markup import folded, section, table

_HINT = (
    "The reward of the pictures for their prompts worded with each control word. Training moves toward the liked words "
    "and away from the disliked ones: rewards under liked words should rise against those under disliked words."
)
_SIDES = ("liked", "disliked")


def without_words(found: Sequence[Change]) -> list[Change]:
    """The changes that are not those of single control words."""
    return [change for change in found if not change.name.startswith(WORD)]


def words_section(runs: Sequence[RunData], pooled: Sequence[Change]) -> str:
    """ "" for runs whose rewards by word were not recorded."""
    by_word = {change.name.removeprefix(WORD): change for change in pooled if change.name.startswith(WORD)}
    lines = _over_steps(runs)
    if not by_word and not lines:
        return ""
    sides = [(word, side) for side in _SIDES for word in getattr(runs[0].config.reward, side) if word in by_word]
    named = [(by_word[word], f"{word} ({side})") for word, side in sides]
    charts = [
        line_chart("Previews: reward under the control words, change from the start", lines,
                   note="bold: mean of the liked and of the disliked words" if len(runs) == 1 else "means over words"),
        interval_chart("Change of the reward under each word", [(name, change.difference) for change, name in named],
                       "after training less before, with its 95% interval", gutter=160),
    ]  # fmt: skip
    rows = [change_row(change, name) for change, name in named]
    numbers = folded("Numbers", table(("Wording", *COLUMNS[1:]), rows)) if rows else ""
    return section("words", "Control words", _HINT, f'<div class="charts two">{"".join(charts)}</div>', numbers)


def _over_steps(runs: Sequence[RunData]) -> list[Series]:
    """Means of each side's words, bold; of a single run also each word's line."""
    lines = []
    for i, run in enumerate(runs):
        for j, side in enumerate(_SIDES):
            found = [(word, *run.series("preview", f"{WORD}{word}")) for word in getattr(run.config.reward, side)]
            found = [(word, xs, [y - ys[0] for y in ys]) for word, xs, ys in found if len(xs) > 1]
            if not found or any(xs != found[0][1] for _, xs, _ in found):
                continue
            single = len(runs) == 1
            style = {"colour": (2, 1)[j] if single else i, "dash": side == "disliked"}
            if single:
                lines += [Series(word, xs, ys, faint=True, **style) for word, xs, ys in found]
            mean = [sum(values) / len(values) for values in zip(*(ys for _, _, ys in found), strict=True)]
            lines.append(
                Series(f"{side} words" if single else f"{run.name}, {side}", found[0][1], mean, marks=True, **style)
            )
    return lines
