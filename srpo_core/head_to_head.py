"""Two models from the same noise: which scores higher, how often, by how much, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from srpo_core.columns import PART, WORD, Row, Scores
from srpo_core.intervals import Interval, bootstrap_ci, win_rate
from srpo_core.pairs import side_by_side

MIN_PAIRS = 8
"""A bootstrap of fewer differences claims far too much: there is no interval of their mean then."""


@dataclass(frozen=True)
class HeadToHead:
    """One score of n pictures of A and of B, picture i of both from the same noise."""

    name: str
    a: Sequence[float]
    b: Sequence[float]

    def __post_init__(self) -> None:
        if not self.a or len(self.a) != len(self.b):
            raise ValueError(f"pairs need equally many scores, got {len(self.a)} and {len(self.b)}")

    @property
    def differences(self) -> list[float]:
        """B less A, a number per pair."""
        return [b - a for a, b in zip(self.a, self.b, strict=True)]

    @property
    def rate(self) -> Interval:
        """Share of pairs in which B scores higher, equal ones counting half, with its 95 % interval (Wilson's)."""
        return win_rate(self.differences)

    @property
    def mean_difference(self) -> Interval:
        """Mean of B less A with its 95 % bootstrap interval; without one for fewer than MIN_PAIRS pairs."""
        if len(self.a) < MIN_PAIRS:
            return Interval(statistics.fmean(self.differences), math.nan, math.nan)
        return bootstrap_ci(self.differences)

    def winners(self, labels: tuple[str, str]) -> list[str]:
        """The label of the better one, "equal" for none, for every pair."""
        return ["equal" if d == 0 else labels[d > 0] for d in self.differences]

    @property
    def title(self) -> str:
        """What the score is called: of a reward in a mixture by the reward's name."""
        return {"reward": "score", "relative": "relative score"}.get(self.name, self.name.removeprefix(PART))

    def verdict(self, labels: tuple[str, str]) -> str:
        """A sentence: how often B scores higher, and whether that says anything yet."""
        rate, count, title = self.rate, len(self.a), self.title
        won, equal = (sum(test) for test in zip(*((d > 0, d == 0) for d in self.differences), strict=True))
        pictures = "picture" if count == 1 else "pictures"
        told = (
            f"{title[:1].upper()}{title[1:]}: {labels[1]} is higher in {won} of {count} {pictures}"
            f"{f', {equal} equal' if equal else ''}: {rate.estimate:.0%}, 95% interval {_ends(rate, '.0%')}"
        )
        unclear = rate.low <= 0.5 <= rate.high
        return f"{told}; {'not clear yet, draw more pictures' if unclear else 'clear for this prompt'}."


def contests(scores_a: Scores, scores_b: Scores) -> list[HeadToHead]:
    """A contest for every score that both have, in the order of A's; scores under single words have none."""
    names = [name for name in scores_a if name in scores_b and not name.startswith(WORD)]
    return [HeadToHead(name, scores_a[name], scores_b[name]) for name in names]


def names_of(label_a: str, label_b: str) -> tuple[str, str]:
    """Two labels of a line each that can be told apart, "A" and "B" for empty ones."""
    a, b = (" ".join(label.split()) for label in (label_a, label_b))
    a, b = a or "A", b or "B"
    return (a, b) if a != b else (f"{a} 1", f"{b} 2")


def change(images_a: Tensor, images_b: Tensor) -> list[float]:
    """How much pictures [n, 3, H, W] in [0, 1] differ: mean absolute difference, in percent of white."""
    return [float((a - b).abs().mean()) * 100 for a, b in zip(images_a, images_b, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Pictures of two models, [n, 3, H, W] in [0, 1] each, picture i of both from the noise of seeds[i]."""

    labels: tuple[str, str]
    seeds: Sequence[int]
    images: tuple[Tensor, Tensor]
    contests: Sequence[HeadToHead] = ()
    """Of the reward first, then of its parts if it is a mixture; none without a reward."""

    @property
    def first(self) -> HeadToHead | None:
        return self.contests[0] if self.contests else None

    @cached_property
    def changes(self) -> list[float]:
        """`change` of every pair."""
        return change(*self.images)

    def pairs(self) -> Tensor:
        """The pictures side by side, [n, 3, H', W']."""
        scores = (self.first.a, self.first.b) if self.first else None
        return side_by_side(*self.images, self.labels, scores, [f"seed {seed}" for seed in self.seeds])

    def picture_rows(self) -> tuple[list[str], list[Row]]:
        """(columns, a row per pair): its number from 1, seed, both scores, B less A, who wins, and `change`."""
        columns, values = ["picture", "seed"], [self.seeds]
        if self.first:
            columns += [*self.labels, "difference", "wins"]
            values += [self.first.a, self.first.b, self.first.differences, self.first.winners(self.labels)]
        values.append(self.changes)
        return [*columns, "change %"], [[i, *row] for i, row in enumerate(zip(*values, strict=True), start=1)]

    def summary_rows(self) -> tuple[list[str], list[Row]]:
        """(columns, a row per score): B's win rate, 0 to 1, the means of A and B and their difference.

        Beside the rate and the difference stand their 95 % intervals, in words.
        """
        a, b = self.labels
        columns = ["by", f"{b} wins", "95%", a, b, "difference", "its 95%"]
        return columns, [_summary(one) for one in self.contests]

    @property
    def note(self) -> str:
        """What was found, in a sentence or two."""
        if max(self.changes) == 0:
            return (
                f"{self.labels[0]!r} and {self.labels[1]!r} drew the same pictures, bit for bit: is the LoRA connected,"
                " and its strength other than 0?"
            )
        if self.first is None:
            return "No reward is connected: which picture is better is for you to say."
        return " ".join(one.verdict(self.labels) for one in self.contests if one.name in ("reward", "relative"))


def _summary(contest: HeadToHead) -> Row:
    difference, rate = contest.mean_difference, contest.rate
    means = statistics.fmean(contest.a), statistics.fmean(contest.b)
    unsure = _ends(difference, "+.2g") or f"from {MIN_PAIRS} on"
    return [contest.title, rate.estimate, _ends(rate, ".0%"), *means, difference.estimate, unsure]


def _ends(found: Interval, style: str) -> str:
    return "" if math.isnan(found.low) else f"{found.low:{style}} to {found.high:{style}}"
