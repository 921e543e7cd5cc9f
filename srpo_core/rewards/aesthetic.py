"""LAION's aesthetic predictor v2 as a reward: five linear layers on CLIP ViT-L/14's unit image features; about 1 to 10.

It doesn't read prompts. Two wordings have equal values r, a relative score (1 + k) * r - r is k * r in both branches,
and the inversion branch, which turns the gradient around, takes back what the denoise branch gives. It is meant for
scores, and for training beside a reward that reads, with align.branches=[denoise].
Source: christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth, on OpenAI's CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srpo_core import places
from srpo_core.catalogue import hint
from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.weights.tensors import WeightsError

from .clip import Clip
from .clip_files import IN_FOLDERS, ClipFile, examine_clip, load_clip
from .files import read_shapes, read_weights, seems
from .head import ScoreHead
from .images import Fit
from .paths import reward_path

FILE_NAMES = ("sac+logos+ava1-l14-linearMSE.pth", "sac+logos+ava1-l14-linearMSE.safetensors")
CLIP_FOLDER = "clip-vit-large-patch14"


class Aesthetic:
    """A Reward that looks at the image only."""

    reads_prompts = False

    def __init__(self, clip: Clip, head: ScoreHead, fit: Fit = "crop") -> None:
        self.clip, self.head, self.fit = clip, head.requires_grad_(False).eval(), fit
        self.module = nn.ModuleList([clip.module, head])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts, which are not read -> [n * B]; prompt i belongs to i % B."""
        if not len(images) or len(prompts) % len(images):
            raise ValueError(f"{len(prompts)} prompts don't divide among {len(images)} images")
        features = F.normalize(self.clip.image_features(images, self.fit), dim=-1)
        return self.head(features).repeat(len(prompts) // len(images))


def check(config: RewardConfig | MoreReward) -> None:
    """ConfigError unless head and CLIP are there, and fit each other by names and shapes."""
    _examine(config)


def load(config: RewardConfig | MoreReward, device: torch.device | str) -> Aesthetic:
    """The predictor in float32. `path` is the head's file or its folder; CLIP lies there too, or where downloads go."""
    path, setting, head, clip = _examine(config)
    tensors = read_weights(path, setting)
    head.load_state_dict(
        {name: tensors[name].to(device, torch.float32, copy=True) for name in head.state_dict()}, assign=True
    )
    return Aesthetic(load_clip(clip.path, setting, device, quick_gelu=True), head, config.fit)


def _examine(config: RewardConfig | MoreReward) -> tuple[Path, str, ScoreHead, ClipFile]:
    """The head's path, the setting that names it, the head on meta, and its CLIP; no tensor is read."""
    path, setting = reward_path(config, "aesthetic")
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path)
        if path.is_dir():
            raise WeightsError(setting, path, f"holds neither {' nor '.join(FILE_NAMES)}", hint("aesthetic"))
    head = _outline(path, setting)
    clip = examine_clip(_clip_path(path, setting), setting, quick_gelu=True)
    width = clip.shapes["visual.proj"][1] if clip.is_open_clip else clip.shapes["visual_projection.weight"][0]
    if width != head.width:
        raise clip.wrong(
            f"gives features of {width} numbers, {path.name} takes {head.width}: it is another CLIP", hint("clip-l14")
        )
    if not _quick_gelu(clip):
        raise clip.wrong("is not OpenAI's CLIP (its activation is GELU), which the predictor reads", hint("clip-l14"))
    return path, setting, head, clip


def _outline(path: Path, setting: str) -> ScoreHead:
    """The head that a file fills, on meta. WeightsError unless it has exactly the tensors for it."""
    shapes = read_shapes(path, setting)
    try:
        with torch.device("meta"):
            head = ScoreHead(shapes)
    except (KeyError, ValueError) as error:
        kind, lacks = seems(shapes), isinstance(error, KeyError)
        what = (f"it seems to be {kind}" if kind else f"it lacks {error.args[0]}") if lacks else str(error)
        raise WeightsError(setting, path, f"is not the aesthetic predictor v2: {what}", hint("aesthetic")) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if wanted != shapes:
        differ = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise WeightsError(setting, path, f"is not the aesthetic predictor v2: {differ[0]} differs", hint("aesthetic"))
    return head


def _clip_path(head: Path, setting: str) -> Path:
    """The CLIP that goes with a head: in its folder, in a folder of CLIP's name beside it, or where downloads go."""
    for folder in (head.parent / CLIP_FOLDER, head.parent):
        if any((folder / name).is_file() for name in IN_FOLDERS):
            return folder
    found = places.find("clip-l14")
    if found is None:
        raise ConfigError(
            f"{setting}={str(head)!r}: its CLIP ViT-L/14 is neither beside it (as {CLIP_FOLDER}) nor"
            f" where downloads go; {hint('clip-l14')}"
        )
    return found


def _quick_gelu(clip: ClipFile) -> bool:
    """Whether the activation is that of OpenAI's models, as it is unless a configuration says otherwise."""
    if not clip.config:
        return True
    if clip.is_open_clip:
        return bool(clip.config.get("model_cfg", {}).get("quick_gelu", False))
    return clip.config.get("vision_config", {}).get("hidden_act", "quick_gelu") == "quick_gelu"
