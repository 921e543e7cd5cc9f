"""Weights in 8-bit floats: read back as the numbers they stand for, and written as ComfyUI reads them.

Forms read (ComfyUI's QUANTIZATION.md and comfy/utils.py state both scaled ones):
- plain: fp8 tensors that are the weights themselves;
- `scaled_fp8` beside the weights, and for each layer `<layer>.scale_weight` (and `.scale_input`, for activations);
- for each layer `<layer>.weight_scale` (and `.input_scale`), its format in `<layer>.comfy_quant` or in the file's
  metadata.
A scaled weight stands for stored value * scale. Written is the second form, which every ComfyUI since 2024 reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .tensors import TensorFile

MARKER = "scaled_fp8"
FP8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""Safetensors dtypes of 8-bit floats, and what users call them."""
_NUMBERS = ("F64", "F32", "F16", "BF16")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (".scale_weight", ".weight_scale")
_ASIDE = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
CHUNK = 1 << 22
"""Numbers that are computed with at once."""
_METADATA = "_quantization_metadata"


def is_scaled(file: TensorFile) -> bool:
    """Whether layers have scales, in either form."""
    return any(name.endswith(_SCALES) for name in file.info)


def weights_in(file: TensorFile) -> list[str]:
    """The names of a file's own tensors: without the marker, scales and descriptions of formats."""
    return [name for name in file.info if not name.endswith(_ASIDE) and name.split(".")[-1] != MARKER]


def dequantised(
    file: TensorFile, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file's tensors one at a time: scaled ones in `dtype`, rounded once, others as stored.

    Each is moved to `device` (None: where it is) before it is computed with. WeightsError for formats other than fp8
    with one scale for each layer or row.
    """
    check_formats(file)
    for name in weights_in(file):
        tensor = file.read(name)
        if device is not None and not tensor.is_meta:
            tensor = tensor.to(device)
        scale_name = _scale_name(file, name)
        if scale_name is not None:
            tensor = _scaled(tensor, file.read(scale_name).to(tensor.device), dtype)
        yield name, tensor


def check_formats(file: TensorFile) -> None:
    """WeightsError unless all layers are stored as numbers, fp8 or scaled fp8."""
    for layer, format in _formats(file).items():
        if format not in _FORMATS:
            raise file.error(f"{layer} is quantised as {format}", "use a file in bf16, fp16, fp8 or scaled fp8")
    for name in weights_in(file):
        info = file.info[name]
        scale_name = _scale_name(file, name)
        if scale_name is not None:
            scale = file.info[scale_name]
            if info.dtype not in FP8 or scale.dtype not in _NUMBERS:
                raise file.error(f"{name} is quantised as {info.dtype} with scales in {scale.dtype}", "use scaled fp8")
            if scale.numel != 1 and scale.shape not in (info.shape[:1], (*info.shape[:1], 1)):
                raise file.error(f"{scale_name} has shape {scale.shape}: that is no scale for each row of {name}")
        elif info.dtype not in _NUMBERS and info.dtype not in FP8:
            raise file.error(f"{name} is quantised as {info.dtype}", "use a file in bf16, fp16, fp8 or scaled fp8")


def scale_of(file: TensorFile, name: str) -> Tensor | None:
    """The scale, one or [out], of a tensor of a scaled fp8 file; None if it has none."""
    scale_name = _scale_name(file, name)
    return None if scale_name is None else file.read(scale_name)


def _scale_name(file: TensorFile, name: str) -> str | None:
    layer, _, last = name.rpartition(".")
    if last != "weight":
        return None
    return next((f"{layer}{suffix}" for suffix in _SCALES if f"{layer}{suffix}" in file), None)


def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored [out, ...] times its scale, one or [out], multiplied in float32 a few rows at a time."""
    out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.is_meta or not tensor.numel():
        return out
    scale = scale.float().reshape(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape[0], *[1] * (tensor.ndim - 1))
    rows = max(1, CHUNK * tensor.shape[0] // tensor.numel())
    for piece, factors, target in zip(tensor.split(rows), scale.split(rows), out.split(rows), strict=True):
        target.copy_(piece.float().mul_(factors))
    return out


def _formats(file: TensorFile) -> dict[str, str]:
    """Format by layer, as far as layers are described."""
    texts: list[tuple[str, Any]] = []
    try:
        if _METADATA in file.metadata:
            texts += json.loads(file.metadata[_METADATA])["layers"].items()
        for name, info in file.info.items():
            if name.endswith(".comfy_quant") and info.bytes <= 1 << 16:
                texts.append((name.removesuffix(".comfy_quant"), json.loads(file.sample(name, info.bytes))))
        return {layer: str(description["format"]) for layer, description in texts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise file.error(f"its description of quantised layers is damaged ({error!r})") from error


def scaled_fp8(
    stream: Iterator[tuple[str, Tensor]], quantise: Callable[[str, Tensor], bool]
) -> Iterator[tuple[str, Tensor]]:
    """The stream with the tensors that `quantise` picks as e4m3 with one scale each, in the `scaled_fp8` form.

    Weight = stored * scale, scale = largest magnitude / 448: relative error at most 2^-4 (half a step of 3 mantissa
    bits) for values above scale * 2^-6. The two-element marker asks ComfyUI for full-precision products: inputs were
    not calibrated. Names are the original ones; works on meta tensors too.
    """
    top = torch.finfo(torch.float8_e4m3fn).max
    for name, tensor in stream:
        if not quantise(name, tensor):
            yield name, tensor
            continue
        low, high = tensor.aminmax()
        amax = torch.maximum(high, -low).float()
        scale = torch.where(amax > 0, amax / top, torch.ones_like(amax))
        yield name, (tensor.float() / scale).clamp_(-top, top).to(torch.float8_e4m3fn)
        yield f"{name.removesuffix('.weight')}.scale_weight", scale
    yield MARKER, torch.zeros(2, dtype=torch.float8_e4m3fn)  # last: scales behind it would lie askew
