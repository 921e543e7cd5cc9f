"""FLUX.1-dev's parts at full size without their memory: modules on meta, then tensors that know shape and dtype only.

Fake tensors say they lie on the CPU and go through the whole step with their autocast, recomputation, backward pass and
optimizer; every operation checks shapes and dtypes, none computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from flux_weights import DEV, header_only, original_shapes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from srpo_core.config import ModelConfig
from srpo_core.models.flux import BLOCKS
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.compressed import fill_compressed
from srpo_core.weights.loading import fill

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
DOUBLE, SINGLE, WIDTH, TEXT, POOLED = 19, 38, 3072, 4096, 768
PARAMETERS = 11_901_408_320
"""Of FLUX.1-dev's transformer."""


def transformer(
    folder: Path, config: ModelConfig, double: int = DOUBLE, single: int = SINGLE
) -> FluxTransformer2DModel:
    """On meta, as the family loads it for training, from the header of a file under the original names (bfloat16)."""
    shapes = original_shapes(**DEV | {"double": double, "single": single})
    part = transformer_at(header_only(folder / "flux1-dev.safetensors", shapes), "model.transformer")
    stream, dtype = part.stream(part.file.outline()), getattr(torch, config.dtype)
    if config.frozen_memory != "full":
        return fill_compressed(part.empty(), stream, dtype, "meta", part.file, BLOCKS, config.frozen_memory)
    return fill(part.empty(), stream, dtype, "meta", part.file)


def autoencoder() -> AutoencoderKL:
    """FLUX.1's, on meta."""
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip


def pretend(module: nn.Module) -> nn.Module:
    """The module with fake tensors in place of those on meta, single numbers as real ones of value 1."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type == "meta":
                    table[name] = _stand_in(tensor)
    return module


def _stand_in(tensor: torch.Tensor) -> Any:
    if tensor.ndim == 0:
        fake = torch.ones((), dtype=tensor.dtype)
    else:
        fake = FAKE.fake_tensor_converter.from_meta_and_device(FAKE, tensor.detach(), torch.device("cpu"))
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
