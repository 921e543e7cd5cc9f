"""How sure a number is: bootstrap intervals of paired differences, effect sizes, win rates. Seeded and vectorised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[[Array], Array]
"""From values [..., N] to [...]."""
DRAWS = 10_000
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval; nan ends where the data can't tell."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean(samples: Array) -> Array:
    """Mean over the last axis."""
    return samples.mean(-1)


def paired_effect_size(differences: Array) -> Array:
    """Cohen's d of paired differences [..., N]: their mean over their standard deviation (N - 1).

    0 where all differences are 0, an infinity of the mean's sign where they are equal but not 0.
    """
    if differences.shape[-1] < 2:
        return np.full(differences.shape[:-1], math.nan)
    centre, spread = differences.mean(-1), differences.std(-1, ddof=1)
    spread = np.where(spread > 1e-12 * np.abs(differences).max(-1), spread, 0.0)  # rounding of equal values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((spread == 0) & (centre == 0), 0.0, centre / spread)


def bootstrap_ci(
    values: Sequence[float] | Array,
    statistic: Statistic = mean,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of statistic([..., N]) -> [...] over N independent values.

    A single value has no interval. ValueError for none, or for values that are not finite.
    """
    return bootstrap_runs_ci([values], True, statistic, level, draws, seed)


def bootstrap_runs_ci(
    runs: Sequence[Sequence[float] | Array],
    same_prompts: bool,
    statistic: Statistic = mean,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic of all values of R runs with N values each, over the choice of runs and of prompts.

    Runs are drawn with replacement; then prompts: the same draw for every run where value i of each belongs to the same
    prompt (`same_prompts`), else a draw per run. With few runs the interval is somewhat narrow: R runs show (R - 1) / R
    of the variance between runs. ValueError for runs of different lengths.
    """
    if len({len(run) for run in runs}) > 1:
        raise ValueError(f"runs to pool hold equally many values, got {[len(run) for run in runs]}")
    table = np.stack([_finite(run) for run in runs])
    count, length = table.shape
    with np.errstate(invalid="ignore"):
        estimate = float(statistic(table.reshape(-1)))
    if length == 1:
        return Interval(estimate, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // table.size)
    results = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        rows = rng.integers(0, count, (size, count, 1))
        columns = rng.integers(0, length, (size, 1 if same_prompts else count, length))
        results.append(statistic(table[rows, columns].reshape(size, -1)))
    low, high = np.quantile(np.concatenate(results), [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return Interval(estimate, float(low), float(high))


def wilson(successes: float, count: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a rate; `successes` may hold halves (ties)."""
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a rate needs 0 <= successes <= count and count >= 1, got {successes} of {count}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half))


def win_rate(differences: Sequence[float] | Array, level: float = 0.95) -> Interval:
    """Share of differences above 0, ties counting half, with Wilson's interval."""
    differences = _finite(differences)
    return wilson(float((differences > 0).sum() + (differences == 0).sum() / 2), len(differences), level)


def _finite(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"an interval needs a list of values, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("an interval needs finite values")
    return array
