"""Where a reward's weights are: the path that its settings name, else where they are usually kept."""

from __future__ import annotations

from pathlib import Path

from srpo_core import places
from srpo_core.catalogue import CATALOGUE, REWARDS_FOLDER, hint
from srpo_core.config import ConfigError, MoreReward, RewardConfig


def path_setting(config: RewardConfig | MoreReward) -> str:
    """What messages call a reward's `path`."""
    return "reward.path" if isinstance(config, RewardConfig) else f"reward.more, path of {config.name!r}"


def reward_path(config: RewardConfig | MoreReward, entry: str) -> tuple[Path, str]:
    """(path, setting) of a reward's weights: `path` if it is set, else where the catalogue's `entry` lies.

    ConfigError, if there is none, names the places that were searched.
    """
    setting = path_setting(config)
    if config.path is not None:
        return Path(config.path), setting
    found = places.find(entry)
    if found is not None:
        return found, setting
    folders = places.comfyui_folders(REWARDS_FOLDER)
    beside = "" if folders else " (nor is there a ComfyUI: COMFYUI_PATH may name its folder)"
    where = " or ".join([*map(str, folders), f"the Hugging Face cache ({CATALOGUE[entry].repository})"])
    raise ConfigError(
        f"{setting} is not set, and {where} holds no weights of the reward {config.name!r}{beside}; {hint(entry)}"
    )
