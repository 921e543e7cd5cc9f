"""Rewards by name. A reward is one file with `load(config, device) -> Reward` and one line here.

`check(config)` in the same file, if there is one, looks at its weights' names and shapes before any model is loaded.
"""

from __future__ import annotations

import importlib
import re

import torch

from srpo_core.config import ConfigError, MoreReward, RewardConfig, nearest
from srpo_core.errors import blamed_on
from srpo_core.interfaces import Reward
from srpo_core.registry import resolve

from .mixture import WeightedReward, combined, numbered

REWARDS = {
    "hpsv2": "srpo_core.rewards.hpsv2:load",
    "pickscore": "srpo_core.rewards.pickscore:load",
    "imagereward": "srpo_core.rewards.imagereward:load",
    "aesthetic": "srpo_core.rewards.aesthetic:load",
    "clip": "srpo_core.rewards.clip:load",
    "miniature": "srpo_core.miniature.models:load_reward",
}


def check_reward(config: RewardConfig) -> None:
    """ConfigError for a reward that is unknown, or whose file is missing or another's, before anything is loaded."""
    for one in (config, *config.more):
        if one.name not in REWARDS and ":" not in one.name:
            name = f"reward.{'name' if one is config else 'more, name'}={one.name!r}"
            raise ConfigError(f"{name}: unknown reward{nearest(one.name, list(REWARDS))}; your own is file.py:function")
        resolve(REWARDS, "reward", one.name)
        if one.name in REWARDS:
            module = importlib.import_module(REWARDS[one.name].partition(":")[0])
            if hasattr(module, "check"):
                module.check(one)


def load_rewards(config: RewardConfig, device: torch.device | str) -> list[WeightedReward]:
    """The reward `config.name` and those of `config.more`, weights included, each under a name of its own.

    ConfigError names the setting that is wrong; TrainingError the line of a user's own code that failed.
    """
    rewards: list[WeightedReward] = []
    for one in (config, *config.more):
        load = resolve(REWARDS, "reward", one.name)
        with blamed_on(f"loading the reward (reward.name={one.name!r})"):
            reward = load(one, device)
        if one.dtype != "float32":
            narrow(reward, one)
        label = re.split(r"[\\/]", one.name)[-1]  # of a user's own file.py:function, without its folders
        name = numbered(label, rewards)
        rewards.append(WeightedReward(name, reward, one.weight, one.margin, one.scale, one.offset))
    return rewards


def narrow(reward: Reward, config: RewardConfig | MoreReward) -> None:
    """Hold and compute a reward of the CLIP kind in `config.dtype`. ConfigError for other kinds."""
    from .clip import ClipReward

    if not isinstance(reward, ClipReward):
        raise ConfigError(
            f"reward.dtype={config.dtype!r}: {config.name} is computed in float32; rewards that can do so otherwise are"
            " hpsv2, pickscore and clip"
        )
    reward.module.to(getattr(torch, config.dtype))


def load_reward(config: RewardConfig, device: torch.device | str) -> Reward:
    """All of a run's rewards as one: the reward itself where there is one, else their mixture."""
    return combined(load_rewards(config, device))
