"""HPS v2 and v2.1 (arXiv 2306.09341): cosine similarity of an open_clip ViT-H-14 trained on people's preferences.

The authors' files are read as they are; of their package nothing is needed. Their scorer pads images to a square
(fit "pad"), and on GPUs it runs in half precision, whose scores come in steps of 0.0002; here everything is in float32;
with reward.dtype=bfloat16 all but the cosine is in bfloat16, which moves scores by about 0.001 and what two
wordings of a prompt differ by about 2 % (random weights of this shape).
Scores lie around 0.20 to 0.35: no logit scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from srpo_core.config import MoreReward, RewardConfig

from .clip import ClipReward, OpenClip
from .clip_files import ClipFile, examine_clip, fill_clip, new_open_clip
from .paths import reward_path

ARCHITECTURE = "ViT-H-14"
"""open_clip's name of the model that the published weights are for."""


def check(config: RewardConfig | MoreReward) -> None:
    """ConfigError unless `path` holds exactly the tensors of HPS v2."""
    _examine(config)


def load(config: RewardConfig | MoreReward, device: torch.device | str) -> ClipReward:
    """HPS v2 from `path`: the published .pt (only its tensors are read), or a .safetensors file of the same names."""
    model = new_open_clip(_architecture(), quick_gelu=False)
    return ClipReward(OpenClip(fill_clip(model, _examine(config), device)), config.fit)


def _architecture() -> Mapping[str, Any]:
    from open_clip import get_model_config

    return get_model_config(ARCHITECTURE)


def _examine(config: RewardConfig | MoreReward) -> ClipFile:
    """The file, if every name and shape in it is as it must be."""
    file = examine_clip(*reward_path(config, "hpsv2"), quick_gelu=False)
    if not file.is_open_clip:
        raise file.wrong("is a CLIP model in transformers' format, not HPS v2's own file", "try reward.name=clip")
    expected = {
        name: tuple(tensor.shape) for name, tensor in new_open_clip(_architecture(), False).state_dict().items()
    }
    if file.shapes != expected:
        differ = [name for name in expected if file.shapes.get(name) != expected[name]]
        differ += [name for name in file.shapes if name not in expected]
        raise file.wrong(
            f"is a CLIP model in open_clip's format, but not HPS v2 ({ARCHITECTURE}): {len(differ)} tensors differ,"
            f" {differ[0]} first",
            "name HPS_v2.1_compressed.pt, or try reward.name=clip",
        )
    return file
