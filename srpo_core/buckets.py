"""Sizes for photos of many shapes, and batches of one size each, in an order that depends on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from srpo_core.randomness import generator_for

Size = tuple[int, int]
"""(height, width) in pixels."""
WIDEST = 21 / 9
"""Buckets reach from 9:21 to 21:9; photos beyond lose what sticks out."""


def bucket_sizes(height: int, width: int, step: int) -> list[Size]:
    """The (height, width) in multiples of `step` with aspect ratios from 9:21 to 21:9, by aspect ratio.

    None holds more pixels than height x width, and none could be a step larger in either direction without that: so
    memory is known. With step 0 there is the one size (height, width). Empty if no multiple is small enough.
    """
    if not step:
        return [(height, width)]
    area = height * width
    fitting = set()
    for side in range(step, math.isqrt(int(area * WIDEST)) + step, step):
        other = area // side // step * step
        fitting |= {(side, other), (other, side)} if other else set()
    shaped = [size for size in fitting if 1 / WIDEST <= size[1] / size[0] <= WIDEST]
    largest = [a for a in shaped if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in shaped)]
    return sorted(largest, key=lambda size: (size[1] / size[0], size))


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to height x width, by the ratio of the two ratios."""
    shape = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


def batch_order(sizes: Sequence[Size], batch_size: int, seed: int, count: int) -> list[tuple[Size, list[int]]]:
    """The first `count` batches (size, indices of photos) over photos that were given `sizes`; a batch has one size.

    Epochs over all photos are shuffled anew, each size's photos in one row after the other's epoch: what fills no batch
    waits for the next epoch's. So after n epochs every photo was seen n times but for those that wait, and a batch of a
    size with few photos holds one twice. Within an epoch the batches of all sizes are shuffled.
    """
    waiting: dict[Size, list[int]] = {size: [] for size in dict.fromkeys(sizes)}
    batches: list[tuple[Size, list[int]]] = []
    epoch = 0
    while len(batches) < count:
        for i in torch.randperm(len(sizes), generator=generator_for(seed, epoch, 0, "prompt order")).tolist():
            waiting[sizes[i]].append(i)
        full = [size for size, row in waiting.items() for _ in range(len(row) // batch_size)]
        for i in torch.randperm(len(full), generator=generator_for(seed, epoch, 0, "bucket order")).tolist():
            row = waiting[full[i]]
            batches.append((full[i], row[:batch_size]))
            del row[:batch_size]
        epoch += 1
    return batches[:count]


def photo_turn(seed: int, share: float, micro: int) -> tuple[bool, int]:
    """Whether micro-batch 0, 1, ... trains on photos, and how many before it trained on the same source.

    The rarer source has one turn, drawn at random, in each stretch of micro-batches between two whole multiples of its
    share: among the first n it has had n * share of them, give or take less than one, whatever n.
    """
    exact = Fraction(str(share))
    photos_rarer = exact <= Fraction(1, 2)
    rarer = exact if photos_rarer else 1 - exact
    if not rarer:
        return True, micro
    stretch = math.floor(micro * rarer)
    first, behind = math.ceil(stretch / rarer), math.ceil((stretch + 1) / rarer)
    drawn = int(torch.randint(first, behind, (), generator=generator_for(seed, stretch, 0, "photos or rollouts")))
    before = stretch + (drawn < micro)
    return ((micro == drawn) == photos_rarer), before if micro == drawn else micro - before
