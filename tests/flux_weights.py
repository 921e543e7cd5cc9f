"""FLUX files for tests: the original names and shapes, and files that have only a header and a hole behind it."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.weights.tensors import TensorFile

DEV = {"width": 3072, "double": 19, "single": 38, "text": 4096, "pooled": 768, "channels": 64, "guidance": True}
"""FLUX.1-dev."""
TOY = {"width": 256, "double": 2, "single": 3, "text": 24, "pooled": 20, "channels": 64, "guidance": True}
BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8}


def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def original_shapes(
    width: int, double: int, single: int, text: int, pooled: int, channels: int, guidance: bool, head: int = 128
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer as Black Forest Labs' code defines it."""
    shapes = dict(linear("img_in", width, channels)) | dict(linear("txt_in", width, text))
    embedders = [("time_in", 256), ("vector_in", pooled)] + [("guidance_in", 256)] * guidance
    for name, inputs in embedders:
        shapes |= dict(linear(f"{name}.in_layer", width, inputs)) | dict(linear(f"{name}.out_layer", width, width))
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            shapes |= dict(linear(f"{at}_mod.lin", 6 * width, width)) | dict(linear(f"{at}_attn.qkv", 3 * width, width))
            shapes |= {f"{at}_attn.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
            shapes |= dict(linear(f"{at}_attn.proj", width, width))
            shapes |= dict(linear(f"{at}_mlp.0", 4 * width, width)) | dict(linear(f"{at}_mlp.2", width, 4 * width))
    for i in range(single):
        at = f"single_blocks.{i}"
        shapes |= dict(linear(f"{at}.linear1", 7 * width, width)) | dict(linear(f"{at}.linear2", width, 5 * width))
        shapes |= {f"{at}.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
        shapes |= dict(linear(f"{at}.modulation.lin", 3 * width, width))
    shapes |= dict(linear("final_layer.linear", channels, width))
    return shapes | dict(linear("final_layer.adaLN_modulation.1", 2 * width, width))


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Small numbers that bfloat16 holds exactly, none of them alike by design."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * (0.5 / max(shape[-1], 4) ** 0.5)).bfloat16().float()
        for name, shape in shapes.items()
    }


def header_only(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of any size whose content is a hole that takes no space on the disk."""
    at, header = 0, {"__metadata__": dict(metadata)} if metadata else {}
    for name, shape in shapes.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def _conv(name: str, outputs: int, inputs: int, side: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", outputs, inputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs)
    return shapes | (_conv(f"{name}.nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def _middle(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = _resnet(f"{name}.block_1", width, width) | _resnet(f"{name}.block_2", width, width)
    shapes |= _norm(f"{name}.attn_1.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{layer}", width, width, 1)
    return shapes


def original_vae_shapes(
    widths: tuple[int, ...] = (128, 256, 512, 512), latents: int = 16, layers: int = 2
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ae.safetensors, as Black Forest Labs' code defines it."""
    shapes = _conv("encoder.conv_in", widths[0], 3)
    inputs = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            shapes |= _resnet(f"encoder.down.{i}.block.{j}", inputs, width)
            inputs = width
        if i < len(widths) - 1:
            shapes |= _conv(f"encoder.down.{i}.downsample.conv", width, width)
    shapes |= _middle("encoder.mid", inputs) | _norm("encoder.norm_out", inputs)
    shapes |= _conv("encoder.conv_out", 2 * latents, inputs) | _conv("decoder.conv_in", inputs, latents)
    shapes |= _middle("decoder.mid", inputs)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(layers + 1):
            shapes |= _resnet(f"decoder.up.{i}.block.{j}", inputs, width)
            inputs = width
        if i:
            shapes |= _conv(f"decoder.up.{i}.upsample.conv", width, width)
    return shapes | _norm("decoder.norm_out", inputs) | _conv("decoder.conv_out", 3, inputs)


def bytes_alive(monkeypatch) -> list[int]:
    """From now on, [the most bytes that tensors read of files took at once]."""
    live, peak, read = [0], [0], TensorFile.read

    def watched(self, name):
        tensor = read(self, name)
        if not tensor.is_meta:
            size = tensor.untyped_storage().nbytes()
            live[0] += size
            peak[0] = max(peak[0], live[0])
            weakref.finalize(tensor.untyped_storage(), lambda: live.__setitem__(0, live[0] - size))
        return tensor

    monkeypatch.setattr(TensorFile, "read", watched)
    return peak
