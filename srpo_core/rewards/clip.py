"""CLIP models, whatever library they are made for, and cosine similarity of image and text as a reward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from srpo_core.config import MoreReward, RewardConfig
from srpo_core.transfer import sent

from .images import Fit, normalise, square
from .recompute import recompute

if TYPE_CHECKING:
    from open_clip import CLIP

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
KEPT_TEXTS = 4096
"""Texts whose features a reward keeps: 4 kB each, at most."""


class Clip(Protocol):
    """Two towers into one space. Frozen; the image tower is differentiable in the images."""

    module: nn.Module
    """All of its weights."""
    logit_scale: float
    """The learned factor on cosines, already exponentiated."""

    def image_features(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D], of any length."""
        ...

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, D], of any length, without gradient."""
        ...


class TransformersClip:
    """A transformers `CLIPModel` as a Clip; with `less_memory` the image tower is recomputed layer by layer."""

    def __init__(
        self,
        module: CLIPModel,
        tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
        less_memory: bool = False,
    ) -> None:
        self.module = module.requires_grad_(False).eval()
        self.tokenize, self.mean, self.std = tokenize, mean, std
        self.size = module.config.vision_config.image_size
        self.logit_scale = float(module.logit_scale.exp())
        if less_memory:
            recompute(module.vision_model.encoder.layers)

    def image_features(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        pixels = normalise(square(_wide(images), self.size, fit), self.mean, self.std)
        return _tensor(self.module.get_image_features(pixel_values=pixels.to(self.module.dtype)))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        device = self.module.device
        tokens = {name: sent(tensor, device) for name, tensor in self.tokenize(texts).items()}
        return _tensor(self.module.get_text_features(**tokens))


def _tensor(output: Any) -> Tensor:
    """What `get_image_features` or `get_text_features` returns: since transformers 5 an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: bfloat16 is too coarse for resizing, and scores would come in steps of 0.001."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class OpenClip:
    """An open_clip `CLIP` as a Clip, with open_clip's tokenizer; the image tower is recomputed block by block."""

    def __init__(self, module: CLIP, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD) -> None:
        from open_clip import SimpleTokenizer

        self.module = module.requires_grad_(False).eval()
        self.mean, self.std = mean, std
        self.tokenize = SimpleTokenizer(context_length=module.context_length)
        size = module.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.logit_scale = float(module.logit_scale.exp())
        recompute(module.visual.transformer.resblocks)

    def image_features(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        pixels = normalise(square(_wide(images), self.size, fit), self.mean, self.std)
        return self.module.encode_image(pixels.to(self.module.logit_scale.dtype))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        tokens = sent(self.tokenize(list(texts)), self.module.logit_scale.device)
        return self.module.encode_text(tokens)


class ClipReward:
    """Cosine similarity of image and text in [-1, 1], times `scale`; a Reward."""

    def __init__(self, clip: Clip, fit: Fit = "crop", scale: float = 1.0) -> None:
        self.clip, self.fit, self.scale = clip, fit, scale
        self.module = clip.module
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]; prompt i belongs to image i % B."""
        if not len(images) or len(prompts) % len(images):
            raise ValueError(f"{len(prompts)} prompts don't divide among {len(images)} images")
        image = F.normalize(_wide(self.clip.image_features(images, self.fit)), dim=-1)
        text = torch.stack(self._directions(prompts, image))
        return (image.repeat(len(prompts) // len(images), 1) * text).sum(-1) * self.scale

    def _directions(self, texts: Sequence[str], like: Tensor) -> list[Tensor]:
        """Each text's features [D] of length 1, where `like` is; what was asked for lately is kept."""
        kept = self._texts
        if kept and next(iter(kept.values())).device != like.device:
            kept.clear()  # the model was moved
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        if new:
            kept.update(zip(new, F.normalize(_wide(self.clip.text_features(new)), dim=-1).unbind(), strict=True))
        found = {text: kept[text] for text in dict.fromkeys(texts)}
        for text in found:
            kept.move_to_end(text)
        while len(kept) > KEPT_TEXTS:
            kept.popitem(last=False)
        return [found[text] for text in texts]


def check(config: RewardConfig | MoreReward) -> None:
    """ConfigError unless `path` is a CLIP model, by its names, shapes and configuration."""
    from .clip_files import examine_clip
    from .paths import reward_path

    examine_clip(*reward_path(config, "clip"))


def load(config: RewardConfig | MoreReward, device: torch.device | str) -> ClipReward:
    """Cosine similarity by the CLIP model in `path`: [-1, 1], as HPS has it; papers' "CLIP score" is 100 times that."""
    from .clip_files import load_clip
    from .paths import reward_path

    path, setting = reward_path(config, "clip")
    return ClipReward(load_clip(path, setting, device), config.fit)
