"""The best of n pictures by their scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from srpo_core.config import ConfigError
from srpo_core.randomness import SEEDS


def best_of(scores: Sequence[float], keep: int) -> list[int]:
    """The places of the `keep` highest scores, best first, of equal ones the earlier first; all where there are fewer.

    ConfigError for keep < 1, for no scores, and for one that is no finite number.
    """
    if keep < 1:
        raise ConfigError(f"keep={keep}: keep 1 picture or more")
    if not scores:
        raise ConfigError("scores: there are none; connect the scores of SRPO Score Images")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ConfigError(f"scores: that of picture {i + 1} is {score}, no finite number; pictures can't be ranked")
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]


def best_note(scores: Sequence[float], keep: int) -> str:
    """What choosing gained, in a sentence."""
    count, kept = len(scores), min(keep, len(scores))
    mean = statistics.fmean(scores)
    asked = f" ({keep} asked for)" if keep > count else ""
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1)) if count > 1 else 0.0
    above = f", {(max(scores) - mean) / spread:.1f} standard deviations above the mean" if spread > 0 else ""
    return f"{kept} of {count} kept{asked}. Highest {max(scores):.4g}, mean {mean:.4g}{above}."


def best_rows(order: Sequence[int], scores: Sequence[float], seeds: Sequence[int]) -> tuple[list[str], list[list]]:
    """(columns, a row per kept picture): its rank, its number in the batch from 1, its score and its seed."""
    rows = [[rank + 1, order[rank] + 1, scores[rank], seeds[rank]] for rank in range(len(order))]
    return ["rank", "picture", "score", "seed"], rows


def seeds_of(first: Sequence[int], batches: Sequence[int]) -> list[int]:
    """The seed of every picture of batches with so many pictures: they count on from the first.

    `first` is one seed, from which all count on, or one for each batch. ConfigError for another number of them.
    """
    if len(first) not in (1, len(batches)):
        raise ConfigError(f"seed: {len(first)} first seeds for {len(batches)} batches of images; give one, or one each")
    counts = batches if len(first) > 1 else [sum(batches)]
    return [(seed + i) % SEEDS for seed, count in zip(first, counts, strict=True) for i in range(count)]


def kept_shape(shapes: Sequence[Sequence[int]]) -> None:
    """ConfigError unless the pictures that are kept have one shape, [H, W, C] each, as a batch needs."""
    if len(set(map(tuple, shapes))) > 1:
        sizes = ", ".join(dict.fromkeys(f"{width} x {height}" for height, width, *_ in shapes))
        raise ConfigError(f"images: the best {len(shapes)} have different sizes ({sizes}); keep 1, or choose per size")
