"""Pictures of the miniature's world for its tests, drawn from seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from srpo_core.miniature.captions import Scene
from srpo_core.miniature.world import random_layout, random_looks, render


def drawn(scenes: Sequence[Scene], words: Sequence[str], seed: int) -> Tensor:
    """Pictures [N, 3, 128, 128] of scenes in the looks of `words`; layouts and noise depend on the seed alone."""
    layout = random_layout(scenes, random.Random(f"layout {seed}"))
    looks = random_looks(words, random.Random(f"looks {seed}"))
    return render(layout, looks, torch.Generator().manual_seed(seed))
