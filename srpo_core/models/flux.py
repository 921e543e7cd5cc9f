"""The FLUX family through diffusers: packing, position ids, latent scale and shift stay inside this file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.flow import Level, per_sample
from srpo_core.interfaces import Components, PromptBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out")  # fmt: skip
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> tokens [B, h/2 * w/2, 4 C], each a 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for a latent of height x width."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def position_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Ids [h/2 * w/2, 3] of a latent's tokens: (0, row, column)."""
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype) if enabled else contextlib.nullcontext()


class FluxFlow:
    """A `FluxTransformer2DModel` as a TrainableFlow.

    PromptBatch keys: prompt_embeds [B, S, D], pooled_prompt_embeds [B, P]. Levels and latents enter in float32 (levels
    are not rounded to thousandths or to bfloat16); matrix products run in `dtype`.
    """

    block_types: tuple[type[nn.Module], ...] = (FluxTransformerBlock, FluxSingleTransformerBlock)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "mlp": _MLP,
        "all": _ATTENTION + _MLP,
    }

    def __init__(self, module: FluxTransformer2DModel, downscale: int = 8, dtype: torch.dtype = torch.float32) -> None:
        self.module = module
        self.downscale = downscale
        self.dtype = dtype

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: Level) -> Tensor:
        """latents [B, C, h, w] at levels sigma [B] -> the predicted noise - clean [B, C, h, w], float32."""
        height, width = latents.shape[-2:]
        embeds, pooled = prompts.embeds["prompt_embeds"], prompts.embeds["pooled_prompt_embeds"]
        guides = per_sample(guidance, latents) if self.module.config.guidance_embeds else None
        with _autocast(latents.device, self.dtype), self._unrounded(sigma, guides):
            tokens = self.module(
                hidden_states=pack(latents.float()),
                encoder_hidden_states=embeds.float(),
                pooled_projections=pooled.float(),
                timestep=sigma,
                guidance=guides,
                img_ids=position_ids(height, width, latents.device),
                txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
                return_dict=False,
            )[0]
        return unpack(tokens.float(), height, width)

    def _unrounded(self, sigma: Tensor, guidance: Tensor | None) -> RemovableHandle:
        """Hands levels and guidance to their embedding as they are: the model rounds them to its activations' dtype."""
        numbers = (sigma * 1000,) if guidance is None else (sigma * 1000, guidance * 1000)
        return self.module.time_text_embed.register_forward_pre_hook(lambda _, inputs: (*numbers, inputs[-1]))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for an image of height x width pixels. ConfigError names a size that the model can't take."""
        step = self.downscale * 2
        for name, size in (("data.height", height), ("data.width", width)):
            if size % step or size <= 0:
                nearby = max(step, round(size / step) * step)
                raise ConfigError(f"{name}={size}: this model takes multiples of {step}; the nearest is {nearby}")
        return self.module.config.in_channels // 4, height // self.downscale, width // self.downscale


def _checkpoint_blocks(function: nn.Module | Callable[..., Any], *args: Any) -> Any:
    """Recompute a module in the backward pass, a chain of layers layer by layer."""
    if isinstance(function, nn.Sequential):
        (hidden,) = args
        for layer in function:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden
    return checkpoint(function, *args, use_reentrant=False)


class ImageAutoencoder:
    """A frozen `AutoencoderKL` or `AutoencoderTiny` as an Autoencoder, in the flow model's scaled latents."""

    def __init__(self, module: AutoencoderKL | AutoencoderTiny, recompute: bool = True) -> None:
        self.module = module.requires_grad_(False).eval()
        self.scale = float(module.config.scaling_factor)
        self.shift = float(getattr(module.config, "shift_factor", None) or 0.0)
        if recompute:
            module.enable_gradient_checkpointing(_checkpoint_blocks)

    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w], without gradient; the mode of the posterior if there is one."""
        out = self.module.encode((images * 2 - 1).to(self._dtype()))
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1], float32; differentiable, in one piece."""
        decoded = self.module.decode((latents / self.scale + self.shift).to(self._dtype()), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


class FluxTextEncoder:
    """CLIP-L's pooled output and T5's token states, as FLUX is conditioned on them."""

    def __init__(self, clip_tokenizer: Any, clip: nn.Module, t5_tokenizer: Any, t5: nn.Module, max_tokens: int) -> None:
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5
        self.max_tokens = max_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptBatch:
        """Prompts -> prompt_embeds [B, max_tokens, D] and pooled_prompt_embeds [B, P]."""

        def ids(tokenizer: Any, length: int) -> Tensor:
            encoded = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            return encoded.input_ids.to(next(self.t5.parameters()).device)

        pooled = self.clip(ids(self.clip_tokenizer, self.clip_tokenizer.model_max_length)).pooler_output
        embeds = self.t5(ids(self.t5_tokenizer, self.max_tokens)).last_hidden_state
        return PromptBatch(tuple(prompts), {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def load_module(cls: Any, path: str | Path, setting: str, subfolder: str | None = None, **options: Any) -> Any:
    """`cls.from_pretrained` from a local folder, or a ConfigError that names the setting, the path and the reason."""
    root = Path(path)
    folder = root / subfolder if subfolder and (root / subfolder).is_dir() else root
    if not folder.is_dir():
        raise ConfigError(f"{setting}={str(path)!r}: no such folder; it must hold a model in diffusers format")
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # the libraries raise many kinds for a broken file
        raise ConfigError(f"{setting}={str(path)!r}: {folder} can't be loaded: {error}") from error


def load(config: ModelConfig, device: torch.device | str) -> Components:
    """A FLUX model from a diffusers folder: transformer, vae, both text encoders and their tokenizers."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    if config.path is None:
        raise ConfigError("model.path is not set: the flux family needs a folder in diffusers format")
    dtype = DTYPES[config.dtype]
    setting = "model.transformer" if config.transformer else "model.path"
    transformer = load_module(
        FluxTransformer2DModel, config.transformer or config.path, setting, "transformer", use_safetensors=True
    )
    autoencoder_path = Path(config.autoencoder or Path(config.path) / "vae")
    kind = AutoencoderTiny if "AutoencoderTiny" in _config_text(autoencoder_path) else AutoencoderKL
    vae = load_module(kind, autoencoder_path, "model.autoencoder", use_safetensors=True, torch_dtype=dtype).to(device)
    text_encoder = FluxTextEncoder(
        load_module(AutoTokenizer, config.path, "model.path", "tokenizer"),
        load_module(CLIPTextModel, config.path, "model.path", "text_encoder", use_safetensors=True, torch_dtype=dtype)
        .to(device)
        .requires_grad_(False),
        load_module(AutoTokenizer, config.path, "model.path", "tokenizer_2"),
        load_module(
            T5EncoderModel, config.path, "model.path", "text_encoder_2", use_safetensors=True, torch_dtype=dtype
        )
        .to(device)
        .requires_grad_(False),
        max_tokens=512,
    )
    if config.recompute:
        transformer.enable_gradient_checkpointing()
    downscale = 2 ** (len(vae.config.block_out_channels) - 1)
    return Components(
        FluxFlow(transformer.to(device), downscale, dtype), ImageAutoencoder(vae, config.recompute), text_encoder
    )


def _config_text(folder: Path) -> str:
    path = folder / "config.json"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
