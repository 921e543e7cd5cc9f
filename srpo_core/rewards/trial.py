"""Rewards tried out on noise, before the long work: what would fail in the first step fails here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError, blamed_on
from srpo_core.preference import ControlWords, two_wordings

from .mixture import WeightedReward


def try_rewards(
    rewards: Sequence[WeightedReward], words: ControlWords, height: int, width: int, device: torch.device | str
) -> None:
    """ConfigError names the reward that fails, or that gives no finite score per text with a gradient to the image."""
    for part in rewards:
        try:
            with blamed_on(f"the reward (reward.name={part.name!r})"):
                _try(part, words, height, width, device)
        except TrainingError as error:
            raise ConfigError(str(error)) from error


def _try(part: WeightedReward, words: ControlWords, height: int, width: int, device: torch.device | str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, height, width, generator=generator).to(device).requires_grad_()
    values = torch.cat(two_wordings(part.reward, image, ["a picture"], *words.pair(0)))
    if not values.requires_grad:
        raise ValueError("its scores have no gradient; compute them from the images, without detach, numpy or PIL")
    (gradient,) = torch.autograd.grad(values.sum(), image, allow_unused=True)
    if gradient is None:
        raise ValueError("its scores don't depend on the images")
    if not (values.isfinite().all() and gradient.isfinite().all()):
        raise ValueError("its scores or their gradient are not finite (NaN or infinite) on a picture of noise")
