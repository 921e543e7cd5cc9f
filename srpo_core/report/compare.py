"""What training changed: paired differences of each measure with intervals, for one run or several pooled."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from srpo_core.columns import is_detail
from srpo_core.intervals import DRAWS, Interval, Statistic, bootstrap_runs_ci, mean, paired_effect_size, win_rate
from srpo_core.report.data import PairedScores

_FIRST = ("look", "content", "exact", "relative", "sgp", "reward")
"""Measures that lead, where a run has them."""
MIN_PROMPTS = 8
"""A bootstrap of fewer values claims far too much: there are no intervals then."""


@dataclass(frozen=True)
class Change:
    """One measure before and after training, over the same prompts and noise."""

    name: str
    before: float
    after: float
    difference: Interval
    effect: Interval
    """paired Cohen's d: the mean difference over its standard deviation between prompts"""
    rose: Interval
    """share of prompts on which the measure rose (with shared prompts: its mean over the runs), ties counting half"""
    count: int
    """prompts (times runs)"""

    @property
    def verdict(self) -> str:
        if math.isnan(self.difference.low):
            return "too few prompts to tell"
        if not self.difference.excludes_zero:
            return "no clear change"
        return "clear rise" if self.difference.estimate > 0 else "clear fall"


def measure_order(names: Sequence[str]) -> list[str]:
    """Leading measures first, details of a measure ("reward:pickscore") behind it, else as they come."""
    roots = list(dict.fromkeys([*(n for n in _FIRST if n in names), *map(_root, names)]))
    return sorted(names, key=lambda name: (roots.index(_root(name)), is_detail(name)))


def _root(name: str) -> str:
    return re.split("[/:]", name)[0]


def changes(scores: Sequence[PairedScores]) -> list[Change]:
    """Every measure that all runs have, in reading order; runs pooled over the choice of runs and prompts.

    ValueError for runs with different numbers of prompts.
    """
    common = [name for name in scores[0].names() if all(name in other.names() for other in scores)]
    same_prompts = all(other.prompts == scores[0].prompts for other in scores)
    return [_change(name, scores, same_prompts) for name in measure_order(common)]


def _change(name: str, scores: Sequence[PairedScores], same_prompts: bool) -> Change:
    before = [np.asarray(run.before[name]) for run in scores]
    after = [np.asarray(run.after[name]) for run in scores]
    differences = [new - old for old, new in zip(before, after, strict=True)]
    enough = len(differences[0]) >= MIN_PROMPTS

    def interval(statistic: Statistic, draws: int) -> Interval:
        if enough:
            return bootstrap_runs_ci(differences, same_prompts, statistic, draws=draws)
        return Interval(float(statistic(np.concatenate(differences))), math.nan, math.nan)

    return Change(
        name=name,
        before=float(np.concatenate(before).mean()),
        after=float(np.concatenate(after).mean()),
        difference=interval(mean, DRAWS),
        effect=interval(paired_effect_size, DRAWS // 2),
        rose=win_rate(np.mean(differences, axis=0) if same_prompts else np.concatenate(differences)),
        count=sum(len(run) for run in differences),
    )
