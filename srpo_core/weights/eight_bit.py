"""Frozen matrices held in 8 bits and expanded one at a time when they are used: half the memory of bfloat16.

What a forward pass expanded stays for the backward pass, unless blocks are recomputed (model.recompute).
"""

from __future__ import annotations

import re
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fp8 import FP8, scale_of
from .loading import Stream, fill
from .tensors import TensorFile

Module = TypeVar("Module", bound=nn.Module)


class Rows(nn.Module):
    """8-bit codes [out, in] as the weights that they stand for: codes * scale (one or [out, 1]), in `dtype`."""

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, codes: Tensor) -> Tensor:
        """[out, in], rounded once, as the weights of an fp8 file are when it is loaded."""
        return (codes.float() * self.scale).to(self.dtype)


def to_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> whole numbers -127 ... 127 as int8 [out, in], and the scale of each row [out, 1], float32.

    Off by half a step at most, 1/254 of the row's largest magnitude: a third of what fp8 costs on weights that spread
    like a normal distribution.
    """
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values / torch.where(scale > 0, scale, 1)).round().to(torch.int8), scale


def fill_8bit(
    module: Module,
    stream: Stream,
    dtype: torch.dtype,
    device: torch.device | str,
    file: TensorFile,
    layers: str = ".*",
) -> Module:
    """`loading.fill` with the matrices of the linear layers whose names match `layers` in 8 bits; all is frozen.

    Matrices that the file itself holds in fp8 under the same names stay as they are.
    """
    matrices = {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(layers, name)
    }
    scales: dict[str, Tensor] = {}

    def compressed() -> Stream:
        for name, tensor in stream:
            if name not in matrices:
                tensor = tensor.to(dtype)
            elif name in file and file.info[name].dtype in FP8:
                scale = scale_of(file, name)
                scales[name] = (torch.ones(1, 1) if scale is None else scale.float().reshape(-1, 1)).to(device)
                tensor = file.read(name)
            else:
                tensor, scale = to_rows(tensor.to(device))
                scales[name] = scale
            yield name, tensor

    fill(module.requires_grad_(False), compressed(), None, device, file)
    for name, scale in scales.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        parametrize.register_parametrization(layer, "weight", Rows(scale, dtype), unsafe=True)
    return module


@torch.no_grad()
def put_weight(layer: nn.Linear, weight: Tensor) -> None:
    """Give a layer another weight [out, in]; where its own is held in 8 bits, it is rounded to 8 bits again."""
    if not parametrize.is_parametrized(layer, "weight"):
        layer.weight.copy_(weight)
        return
    held = layer.parametrizations.weight
    held.original.data, held[0].scale = to_rows(weight)
