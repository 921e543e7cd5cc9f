"""FLUX.1-dev's published shapes, for questions of memory and time before any of its files are there."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from srpo_core.config import ModelConfig
from srpo_core.interfaces import Components
from srpo_core.models.flux import DTYPES, FluxFlow, ImageAutoencoder
from srpo_core.models.flux_prompts import EVAL_PROMPTS
from srpo_core.models.flux_text import MAX_TOKENS
from srpo_core.weights.loading import empty_parameters

T5_WIDTH, CLIP_WIDTH = 4096, 768


class FluxShapes(Components):
    """Answers questions of shape only."""

    def __init__(self, config: ModelConfig) -> None:
        self.measures, self.prompts, self.config = {}, {"eval": EVAL_PROMPTS}, config

    def outline(self) -> FluxFlow:
        with empty_parameters():
            return FluxFlow(FluxTransformer2DModel(guidance_embeds=True), 8, DTYPES[self.config.dtype])

    def autoencoder_outline(self) -> ImageAutoencoder:
        with empty_parameters():
            module = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
                use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
            )  # fmt: skip
        return ImageAutoencoder(module, recompute=False)

    def text_outline(self) -> tuple[nn.Module, nn.Module]:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        with torch.device("meta"):
            clip = CLIPTextModel(CLIPTextConfig(hidden_size=CLIP_WIDTH, intermediate_size=3072, num_attention_heads=12))
            t5 = T5EncoderModel(
                T5Config(vocab_size=32128, d_model=T5_WIDTH, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                         feed_forward_proj="gated-gelu")
            )  # fmt: skip
        return clip, t5

    def embeds_outline(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (MAX_TOKENS, T5_WIDTH), "pooled_prompt_embeds": (CLIP_WIDTH,)}


def load(config: ModelConfig) -> FluxShapes:
    """The shapes of a run whose files are not named yet."""
    return FluxShapes(config)
