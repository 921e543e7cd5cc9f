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
    repository, root = CATALOGUE[entry].repository, places.comfyui_root()
    where = f"{root / 'models' / REWARDS_FOLDER} or " if root is not None else ""
    beside = "" if root is not None else " (nor is there a ComfyUI: COMFYUI_PATH may name its folder)"
    raise ConfigError(
        f"{setting} is not set, and {where}the Hugging Face cache ({repository}) holds no weights of the reward"
        f" {config.name!r}{beside}; {hint(entry)}"
    )
