"""Rewards by name. A reward is one file with `load(config, device) -> Reward` and one line here."""

from __future__ import annotations

import torch

from srpo_core.config import RewardConfig
from srpo_core.interfaces import Reward
from srpo_core.registry import resolve

REWARDS = {
    "clip": "srpo_core.rewards.clip:load",
    "miniature": "srpo_core.miniature.models:load_reward",
}


def load_reward(config: RewardConfig, device: torch.device | str) -> Reward:
    """The reward `config.name`, weights included. ConfigError names the setting that is wrong."""
    return resolve(REWARDS, "reward", config.name)(config, device)
