"""FLUX at toy size with random weights: its parts as modules, and a whole folder in diffusers format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from srpo_core.interfaces import PromptBatch

TEXT_WIDTH, POOLED_WIDTH, LATENT_CHANNELS = 24, 20, 4


def randomise(module: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Weights of a known scale, so that no part of the network is idle (norms keep their scale of 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * (4 / fan_in) ** 0.5)
    return module.eval()


def tiny_transformer(seed: int = 0, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return randomise(model, seed, 0.5)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomise(model, seed, 0.5)


def tiny_taesd(seed: int = 0) -> AutoencoderTiny:
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return randomise(model, seed, 0.5)


def random_prompts(batch_size: int = 2, seed: int = 0, tokens: int = 5) -> PromptBatch:
    generator = torch.Generator().manual_seed(seed)
    return PromptBatch(
        tuple(f"prompt {i}" for i in range(batch_size)),
        {
            "prompt_embeds": torch.randn(batch_size, tokens, TEXT_WIDTH, generator=generator),
            "pooled_prompt_embeds": torch.randn(batch_size, POOLED_WIDTH, generator=generator),
        },
    )


def random_latents(batch_size: int = 2, height: int = 8, width: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, LATENT_CHANNELS, height, width, generator=generator)


def tiny_pipeline(**parts: object) -> FluxPipeline:
    """A pipeline with shift 3 around tiny models; text encoders and tokenizers only where given."""
    defaults = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        "vae": tiny_vae(),
        "transformer": tiny_transformer(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    pipeline = FluxPipeline(**defaults | parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clip_tokenizer(folder: Path) -> None:
    """Every byte a token, in CLIP's own files."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _t5_tokenizer(folder: Path) -> None:
    """Letters as pieces, in T5's own files."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "extra_ids": 0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_tiny_flux(folder: Path) -> Path:
    """A diffusers folder with all the parts of FLUX at toy size."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    _clip_tokenizer(folder / "tokenizer")
    _t5_tokenizer(folder / "tokenizer_2")
    clip = CLIPTextConfig(
        vocab_size=514,
        hidden_size=POOLED_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    t5 = T5Config(vocab_size=32, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    randomise(CLIPTextModel(clip), 1, 0.5).save_pretrained(folder / "text_encoder")
    randomise(T5EncoderModel(t5), 2, 0.5).save_pretrained(folder / "text_encoder_2")
    tiny_transformer().save_pretrained(folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder
