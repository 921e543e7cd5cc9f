"""Random numbers as pure functions of what they are for: a resumed run needs no generator's state.

Generators live on the CPU, so that a run's numbers don't depend on its device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

SEEDS = 2**64
"""Seeds are from 0 to SEEDS - 1, and count on from the last one to 0."""


def generator_for(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one purpose of one step on one rank; other arguments give unrelated numbers."""
    digest = hashlib.sha256(f"{seed} {step} {rank} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fixed_noise(seed: int, count: int, shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal noise [count, *shape], float32 on the CPU; row i depends on seed, i and purpose alone."""
    return torch.stack([torch.randn(*shape, generator=generator_for(seed, i, 0, purpose)) for i in range(count)])
