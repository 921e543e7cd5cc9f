"""CLIP similarity as a reward: any transformers `CLIPModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from srpo_core.config import ConfigError, RewardConfig

from .images import normalise, resize_crop

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def features(output: Any) -> Tensor:
    """Unit features [N, D] of what `get_image_features` or `get_text_features` returns.

    That is the tensor itself, or since transformers 5 an output that holds it.
    """
    return F.normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=-1)


class ClipReward:
    """Cosine similarity in [-1, 1] of image and text; a Reward."""

    def __init__(
        self,
        model: CLIPModel,
        tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.mean, self.std = tokenize, mean, std

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]; prompt i belongs to image i % B."""
        if not len(images) or len(prompts) % len(images):
            raise ValueError(f"{len(prompts)} prompts don't divide among {len(images)} images")
        pixels = normalise(resize_crop(images.float(), self.model.config.vision_config.image_size), self.mean, self.std)
        image = features(self.model.get_image_features(pixel_values=pixels))
        with torch.no_grad():
            tokens = {name: tensor.to(images.device) for name, tensor in self.tokenize(prompts).items()}
            text = features(self.model.get_text_features(**tokens))
        return (image.repeat(len(prompts) // len(images), 1) * text).sum(-1)


def load(config: RewardConfig, device: torch.device | str) -> ClipReward:
    """The CLIP model in the folder `reward.path` (transformers format: config, safetensors, tokenizer)."""
    from transformers import AutoTokenizer

    from srpo_core.models.flux import load_module

    if config.path is None:
        raise ConfigError("reward.path is not set: the clip reward needs a folder in transformers format")
    model = load_module(CLIPModel, config.path, "reward.path", use_safetensors=True)
    tokenizer = load_module(AutoTokenizer, config.path, "reward.path")

    def tokenize(prompts: Sequence[str]) -> Mapping[str, Tensor]:
        encoded = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}

    return ClipReward(model.to(device), tokenize)
