"""The miniature's small models: a FLUX transformer, a TAESD-layout autoencoder, a CLIP and a judge.

The CLIP is text encoder and reward. Weights ship in the folder `weights` beside this file (bfloat16 safetensors, made
by scripts/build_miniature.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from srpo_core.config import ConfigError, ModelConfig, RewardConfig
from srpo_core.interfaces import Components, Measure, PromptBatch
from srpo_core.models.flux import BLOCKS, DTYPES, FluxFlow, ImageAutoencoder, load_module
from srpo_core.models.flux_files import autoencoder_at, transformer_at
from srpo_core.rewards.clip import ClipReward, TransformersClip
from srpo_core.weights.compressed import fill_compressed

from . import WEIGHTS
from .captions import MAX_TOKENS, VOCABULARY, random_scenes, tokenize
from .judge import Judge, JudgeMeasures
from .looks import look

SIZE = 128
"""Side of the pictures that the models were trained on, in pixels."""
WIDTH = 192
"""Width of the text states and of CLIP's features."""
MEAN = STD = (0.5, 0.5, 0.5)
SHIPPED = "miniature weights"
"""What messages call the weights that no setting names."""


def new_transformer() -> FluxTransformer2DModel:
    """A FLUX transformer of 9.2 M parameters with random weights; ComfyUI reads its shape off such weights."""
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


def new_autoencoder() -> AutoencoderTiny:
    """The TAESD layout with 16 latent channels, random weights; latents are the flow model's own (scale 1, shift 0)."""
    return AutoencoderTiny(latent_channels=16)


def new_clip() -> CLIPModel:
    """A CLIP of 4.6 M parameters with random weights."""
    end = len(VOCABULARY) - 1
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4,
        "num_attention_heads": 3, "max_position_embeddings": MAX_TOKENS, "projection_dim": WIDTH,
        "pad_token_id": 0, "bos_token_id": VOCABULARY.index("<start>"), "eos_token_id": end,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6, "num_attention_heads": 3,
        "image_size": SIZE, "patch_size": 16, "projection_dim": WIDTH,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def tokens(prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Token ids [B, MAX_TOKENS] as CLIP's keyword argument."""
    return {"input_ids": torch.tensor([tokenize(prompt) for prompt in prompts])}


class MiniatureTextEncoder:
    """The CLIP's text tower as a TextEncoder: its token states and its projected feature."""

    def __init__(self, clip: CLIPModel) -> None:
        self.text_model = clip.text_model.requires_grad_(False).eval()
        self.projection = clip.text_projection.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptBatch:
        """Prompts -> prompt_embeds [B, MAX_TOKENS, WIDTH] and pooled_prompt_embeds [B, WIDTH]."""
        device = self.projection.weight.device
        out = self.text_model(**{name: tensor.to(device) for name, tensor in tokens(prompts).items()})
        pooled = self.projection(out.pooler_output)
        return PromptBatch(tuple(prompts), {"prompt_embeds": out.last_hidden_state, "pooled_prompt_embeds": pooled})


def load_clip(device: torch.device | str = "cpu", folder: Path = WEIGHTS) -> CLIPModel:
    """The shipped CLIP in float32."""
    return load_module(CLIPModel, folder / "clip", SHIPPED, use_safetensors=True).float().to(device)


def load_judge(device: torch.device | str = "cpu", folder: Path = WEIGHTS) -> Judge:
    """The shipped judge in float32. ConfigError if its file is missing or broken."""
    path = folder / "judge.safetensors"
    judge = Judge()
    try:
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except Exception as error:  # safetensors raises its own kinds for a broken file
        raise ConfigError(f"{SHIPPED}: {path} can't be loaded: {error}") from error
    return judge.to(device).requires_grad_(False).eval()


def load_reward(config: RewardConfig, device: torch.device | str) -> ClipReward:
    """The shipped CLIP (or another in the folder `reward.path`) as a reward."""
    folder = WEIGHTS if config.path is None else Path(config.path)
    return ClipReward(TransformersClip(load_clip(device, folder), tokens, MEAN, STD), config.fit)


def load(config: ModelConfig, device: torch.device | str) -> Components:
    """The miniature's parts.

    `model.path` may name another folder of the same layout, `model.transformer` a trained transformer.
    """
    folder = WEIGHTS if config.path is None else Path(config.path)
    setting = "model.transformer" if config.transformer else SHIPPED
    part = transformer_at(config.transformer or folder / "transformer", setting)
    if config.frozen_memory == "full":
        transformer = part.load(torch.float32, device)
    else:
        held = config.frozen_memory
        transformer = fill_compressed(
            part.empty(), part.stream(), DTYPES[config.dtype], device, part.file, BLOCKS, held
        )
    setting = "model.autoencoder" if config.autoencoder else SHIPPED
    vae = autoencoder_at(config.autoencoder or folder / "vae", setting).load(torch.float32, device)
    if config.recompute:
        transformer.enable_gradient_checkpointing()
    judge = JudgeMeasures(load_judge(device, folder))
    return Components(
        FluxFlow(transformer, dtype=DTYPES[config.dtype]),
        ImageAutoencoder(vae, config.recompute),
        MiniatureTextEncoder(load_clip(device, folder)),
        measures={
            **{name: _look_measure(name) for name in ("look", "texture", "light", "natural_colour")},
            "content": judge.content, "exact": judge.exact, "judge_liked": judge.judge_liked,
        },
        prompts={
            "train": [scene.caption() for scene in random_scenes(4096, seed=1)],
            "eval": list(dict.fromkeys(scene.caption() for scene in random_scenes(512, seed=2, held_out=True))),
        },
        side=SIZE,
    )  # fmt: skip


def _look_measure(name: str) -> Measure:
    return lambda images, prompts: look(images)[name]
