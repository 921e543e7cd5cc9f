"""A model family and a reward small enough to train in a test: model.family=tiny:load, reward.name=tiny:load_reward.

A real `FluxTransformer2DModel` (one block of each kind) and `AutoencoderTiny` on pictures of 16 x 16, with random
weights; prompts are encoded as noise seeded by their text; the reward compares colours with a direction of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from torch import Tensor

from srpo_core.config import ModelConfig, RewardConfig, RunConfig
from srpo_core.description import make_config
from srpo_core.interfaces import Components, PromptBatch
from srpo_core.models.flux import DTYPES, FluxFlow, ImageAutoencoder
from srpo_core.randomness import generator_for

PROMPTS = {
    "train": ("a red cat", "a blue dog", "two green birds", "a house", "three boats at night"),
    "eval": ("a tree", "a river in the snow", "a white horse"),
}


def tiny_flow(dtype: torch.dtype = torch.float32) -> FluxFlow:
    """Random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    return FluxFlow(module, downscale=2, dtype=dtype)


def tiny_autoencoder() -> ImageAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        )  # fmt: skip
    torch.nn.init.constant_(module.decoder.layers[-1].bias, 0.5)  # grey pictures: at black, the clamp has no gradient
    return ImageAutoencoder(module, recompute=False)


def _numbers(text: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_for(0, 0, 0, text))


def encode_text(prompts: Sequence[str]) -> PromptBatch:
    embeds = torch.stack([_numbers(f"tokens {prompt}", 5, 12) for prompt in prompts])
    pooled = torch.stack([_numbers(f"pooled {prompt}", 8) for prompt in prompts])
    return PromptBatch(tuple(prompts), {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


class ColourReward:
    """Mean over a 4 x 4 grid of the picture against the text's own direction; n * B texts of B pictures."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(images - 0.5, 4).flatten(1)
        texts = torch.stack([_numbers(f"direction {prompt}", features.shape[1]) for prompt in prompts])
        return (features.repeat(len(prompts) // len(images), 1) * texts.to(features)).mean(1) * 10


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A measure: how bright each picture is."""
    return images.mean((1, 2, 3))


def load(config: ModelConfig, device: torch.device | str) -> Components:
    flow = tiny_flow(DTYPES[config.dtype])
    autoencoder = tiny_autoencoder()
    for part in (flow, autoencoder):
        part.module.to(device)
    return Components(flow, autoencoder, encode_text, {"brightness": brightness}, PROMPTS)


def load_even(config: ModelConfig, device: torch.device | str) -> Components:
    """With prompts of four tokens, which two processes can share."""

    def encode(prompts: Sequence[str]) -> PromptBatch:
        whole = encode_text(prompts)
        embeds = {name: one[:, :4] if one.ndim == 3 else one for name, one in whole.embeds.items()}
        return PromptBatch(whole.prompts, embeds)

    return replace(load(config, device), text_encoder=encode)


def load_reward(config: RewardConfig, device: torch.device | str) -> ColourReward:
    return ColourReward()


def tiny_config(run_dir: Path | str, **settings: Any) -> RunConfig:
    """A run of four steps that takes about a second; settings such as `optim__lr=1e-3` come on top."""
    data: dict[str, Any] = {
        "model": {"family": "tiny:load", "dtype": "float32", "recompute": False},
        "data": {"height": 16, "width": 16, "batch_size": 2},
        "rollout": {"num_steps": 3},
        "reward": {"name": "tiny:load_reward", "margin": 5.0},
        "optim": {"steps": 4, "lr": 1e-3, "max_grad_norm": 1.0},
        "output": {
            "dir": str(run_dir), "checkpoint_every": 2, "preview_every": 2, "preview_prompts": 2, "preview_steps": 2,
            "tensorboard": False,
        },
        "parallel": {"device": "cpu"},
    }  # fmt: skip
    for name, value in settings.items():
        section, _, key = name.partition("__")
        if key:
            data.setdefault(section, {})[key] = value
        else:
            data[section] = value
    return make_config(data)


def weights_hash(module: torch.nn.Module) -> str:
    """A fingerprint of all parameters, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
