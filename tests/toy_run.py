"""The toy world as a model family and a reward: torch is all that a process needs to train them, so it begins soon."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
from toy import CHANNELS, DISLIKED, LIKED, DotReward, ExactFlow, LinearAutoencoder

from srpo_core.config import ModelConfig, RewardConfig
from srpo_core.interfaces import Components, PromptBatch
from srpo_core.randomness import generator_for

PROMPTS = {"train": ("a red cat", "a blue dog", "two green birds"), "eval": ("a tree", "a white horse")}
SETTINGS = {
    "model": {"family": "toy_run:load", "dtype": "float32", "recompute": False},
    "reward": {"name": "toy_run:load_reward", "liked": [LIKED], "disliked": [DISLIKED]},
}


def encode_text(prompts: Sequence[str]) -> PromptBatch:
    """Prompts with clean latents of their own."""
    clean = [torch.randn(CHANNELS, 1, 1, generator=generator_for(0, 0, 0, prompt)) for prompt in prompts]
    return PromptBatch(tuple(prompts), {"clean": torch.stack(clean)})


def load(config: ModelConfig, device: torch.device | str) -> Components:
    return Components(ExactFlow(), LinearAutoencoder(), encode_text, {}, PROMPTS)


def load_reward(config: RewardConfig, device: torch.device | str) -> DotReward:
    return DotReward()


class BrokenFlow(ExactFlow):
    """One whose third call fails on the second of several processes."""

    def velocity(self, *args: Any) -> torch.Tensor:
        if len(self.calls) == 2 and os.environ.get("RANK") == "1":
            raise ValueError("broken")
        return super().velocity(*args)


def load_broken(config: ModelConfig, device: torch.device | str) -> Components:
    return Components(BrokenFlow(), LinearAutoencoder(), encode_text, {}, PROMPTS)


def load_killed(config: ModelConfig, device: torch.device | str) -> Components:
    """As `load`; the second of several processes is killed while they write their first checkpoint in parts."""
    from srpo_core import parts_storage

    if os.environ.get("RANK") == "1":
        parts_storage.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return load(config, device)
