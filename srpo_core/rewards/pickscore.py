"""PickScore (arXiv 2305.01569): a CLIP ViT-H-14 trained on people's choices; its learned scale times the cosine.

Scores lie around 19 to 24, far from the range of HPS: the published recipe divides by 20 (reward.scale=0.05).
"""

from __future__ import annotations

import torch

from srpo_core.config import MoreReward, RewardConfig

from .clip import ClipReward
from .clip_files import ClipFile, examine_clip, load_clip
from .paths import reward_path

IMAGE_WIDTH = 1280
"""Of ViT-H-14's image tower, by which another CLIP is told from PickScore."""


def check(config: RewardConfig | MoreReward) -> None:
    """ConfigError unless `path` is a CLIP model of PickScore's size."""
    _examine(config)


def load(config: RewardConfig | MoreReward, device: torch.device | str) -> ClipReward:
    """PickScore from `path`: its folder, or its model.safetensors alone."""
    file = _examine(config)
    clip = load_clip(file.path, file.setting, device, quick_gelu=False)
    return ClipReward(clip, config.fit, clip.logit_scale)


def _examine(config: RewardConfig | MoreReward) -> ClipFile:
    file = examine_clip(*reward_path(config, "pickscore"), quick_gelu=False)
    if file.image_width != IMAGE_WIDTH:
        raise file.wrong(
            f"is a CLIP model, but not PickScore: its image tower is {file.image_width} wide, not {IMAGE_WIDTH}",
            "try reward.name=clip",
        )
    return file
