"""The FLUX family through diffusers: packing, position ids, latent scale and shift stay inside this file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srpo_core.attention import Attention
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.flow import Level, per_sample
from srpo_core.interfaces import Components, PromptBatch
from srpo_core.keeping import recompute_blocks
from srpo_core.models.flux_files import Part, find_autoencoder, find_transformer
from srpo_core.models.flux_prompts import EVAL_PROMPTS
from srpo_core.models.flux_text import MAX_TOKENS, FluxTextEncoder, TextFiles, find_text, text_outline
from srpo_core.parallel import World
from srpo_core.weights.compressed import fill_compressed
from srpo_core.weights.loading import Stream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out")  # fmt: skip
BLOCKS = r"(single_)?transformer_blocks\..+"
"""Where the layers are that model.frozen_memory is about: all but the first and last ones."""
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
    enabled = dtype != torch.float32 and device.type != "meta"
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
    recordable = True

    def __init__(self, module: FluxTransformer2DModel, downscale: int = 8, dtype: torch.dtype = torch.float32) -> None:
        self.module = module
        self.downscale = downscale
        self.dtype = dtype
        self.attention = Attention()

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: Level) -> Tensor:
        """latents [B, C, h, w] at levels sigma [B] -> the predicted noise - clean [B, C, h, w], float32."""
        height, width = latents.shape[-2:]
        embeds, pooled = prompts.embeds["prompt_embeds"], prompts.embeds["pooled_prompt_embeds"]
        guides = per_sample(guidance, latents) if self.module.config.guidance_embeds else None
        with _autocast(latents.device, self.dtype), self.attention.here(), self._unrounded(sigma, guides):
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
        if height % step or width % step or min(height, width) <= 0:
            near_height, near_width = (max(step, round(size / step) * step) for size in (height, width))
            raise ConfigError(
                f"data.height={height}, data.width={width}: this model takes multiples of {step}; the nearest are"
                f" {near_height} and {near_width}"
            )
        return self.module.config.in_channels // 4, height // self.downscale, width // self.downscale

    def check_context(self, context: int, sizes: Iterable[tuple[int, int]]) -> None:
        """ConfigError unless `context` processes can share pictures of these sizes (height, width) in pixels."""
        from srpo_core.models.flux_context import check_context, check_tokens, nearest_size

        check_context(self.module, context)
        check_tokens(MAX_TOKENS, "prompts", context)
        for height, width in sizes:
            _, rows, columns = (side // 2 for side in self.latent_shape(height, width))
            if rows * columns % context == 0:
                continue
            near_rows, near_columns = (2 * self.downscale * side for side in nearest_size(rows, columns, context))
            pictures = f"pictures of {width} x {height} (data.width, data.height)"
            way_out = f"; the nearest that can be shared is {near_columns} x {near_rows}"
            check_tokens(rows * columns, pictures, context, way_out)

    def share_tokens(self, world: World) -> None:
        """Have groups of world.context processes share each picture's tokens, from here on in every call."""
        from srpo_core.models.flux_context import share_tokens

        share_tokens(self.module, world)


class ImageAutoencoder:
    """A frozen `AutoencoderKL` or `AutoencoderTiny` as an Autoencoder, in the flow model's scaled latents."""

    def __init__(self, module: AutoencoderKL | AutoencoderTiny, recompute: bool | str = True) -> None:
        self.module = module.requires_grad_(False).eval()
        self.scale = float(module.config.scaling_factor)
        self.shift = float(getattr(module.config, "shift_factor", None) or 0.0)
        if recompute:
            module.enable_gradient_checkpointing(recompute_blocks)

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


class FluxComponents(Components):
    """FLUX's parts, each loaded when it is first read; constructing it reads headers and configurations only.

    ConfigError names the setting whose file is missing, broken or of another model, and parts that don't fit together.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self.measures, self.prompts = {}, {"eval": EVAL_PROMPTS}
        self._config, self._device = config, torch.device(device)
        self._transformer = find_transformer(config)
        self._autoencoder = find_autoencoder(config)
        self._text = find_text(config)
        _check_fit(self._transformer, self._autoencoder, self._text)

    @property
    def _downscale(self) -> int:
        """Pixels to a latent's side."""
        return 2 ** (len(self._autoencoder.outline.config.block_out_channels) - 1)

    def outline(self) -> FluxFlow:
        """The flow with its parameters on meta."""
        return FluxFlow(self._transformer.outline, self._downscale, DTYPES[self._config.dtype])

    def autoencoder_outline(self) -> ImageAutoencoder:
        """The autoencoder with its parameters on meta."""
        return ImageAutoencoder(self._autoencoder.outline, recompute=False)

    def text_outline(self) -> tuple[nn.Module, nn.Module]:
        """CLIP-L and T5 with their parameters on meta."""
        return text_outline(self._text)

    def embeds_outline(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one prompt's embeddings."""
        t5_width, clip_width = self._text.widths
        return {"prompt_embeds": (MAX_TOKENS, t5_width), "pooled_prompt_embeds": (clip_width,)}

    @cached_property
    def flow(self) -> FluxFlow:
        """The transformer, in model.dtype or, with `full_precision`, in float32."""
        return _flow(self._transformer, self._config, self._device, self.full_precision, self._downscale)

    def empty_flow(self) -> tuple[FluxFlow, Stream]:
        """The transformer on meta, and its weights in model.dtype or, with `full_precision`, in float32."""
        dtype = torch.float32 if self.full_precision else DTYPES[self._config.dtype]
        stream = self._transformer.stream(None, dtype, self._device)
        flow = _with_recompute(self._transformer.empty(), self._config, self._downscale)
        return flow, ((name, tensor.to(self._device, dtype)) for name, tensor in stream)

    @cached_property
    def autoencoder(self) -> ImageAutoencoder:
        """The autoencoder in model.dtype."""
        module = self._autoencoder.load(DTYPES[self._config.dtype], self._device)
        return ImageAutoencoder(module, self._config.recompute)

    @cached_property
    def text_encoder(self) -> FluxTextEncoder:
        """CLIP-L and T5, which load at their first prompt."""
        return FluxTextEncoder(self._text, DTYPES[self._config.dtype], self._device, self._config.t5_memory)


def check(config: ModelConfig) -> None:
    """ConfigError unless the model's files are there and fit together, by their headers."""
    FluxComponents(config, "cpu")


def load(config: ModelConfig, device: torch.device | str) -> FluxComponents:
    """A FLUX model from folders in diffusers format, single files or a ComfyUI checkpoint: see ModelConfig."""
    return FluxComponents(config, device)


def load_flow(config: ModelConfig, device: torch.device | str, full_precision: bool = False) -> FluxFlow:
    """The transformer alone, in model.dtype or float32: neither autoencoder nor text encoders need to be there."""
    return _flow(find_transformer(config), config, device, full_precision)


def _flow(
    part: Part[FluxTransformer2DModel],
    config: ModelConfig,
    device: torch.device | str,
    full_precision: bool,
    downscale: int = 8,
) -> FluxFlow:
    dtype = DTYPES[config.dtype]
    if config.frozen_memory != "full" and not full_precision:
        memory = config.frozen_memory
        module = fill_compressed(part.empty(), part.stream(), dtype, device, part.file, BLOCKS, memory)
    else:
        module = part.load(torch.float32 if full_precision else dtype, device)
    return _with_recompute(module, config, downscale)


def _with_recompute(module: FluxTransformer2DModel, config: ModelConfig, downscale: int) -> FluxFlow:
    if config.recompute:
        module.enable_gradient_checkpointing()
    return FluxFlow(module, downscale, DTYPES[config.dtype])


def _check_fit(
    transformer: Part[FluxTransformer2DModel], autoencoder: Part[AutoencoderKL | AutoencoderTiny], text: TextFiles
) -> None:
    """ConfigError unless the parts' widths are those that the transformer was made for."""
    wanted, latents = transformer.outline.config, autoencoder.outline.config.latent_channels
    if wanted.in_channels != 4 * latents:
        takes = wanted.in_channels // 4
        reason = f"has {latents} latent channels, the transformer {transformer.file.path} takes {takes}"
        raise autoencoder.file.error(reason, "name FLUX's own autoencoder (ae.safetensors) in model.autoencoder")
    t5_width, clip_width = text.widths
    for file, name, width, needed in (
        (text.t5, "T5", t5_width, wanted.joint_attention_dim),
        (text.clip, "CLIP", clip_width, wanted.pooled_projection_dim),
    ):
        if width != needed:
            reason = f"is a {name} of width {width}, the transformer {transformer.file.path} takes {needed}"
            raise file.error(reason, f"name the {name} that FLUX uses in model.{name.lower()}")
