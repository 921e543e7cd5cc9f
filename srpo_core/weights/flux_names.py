"""FLUX transformers under two sets of names: the original ones (Black Forest Labs, ComfyUI) and diffusers' own.

A module of the original is one module of diffusers', or several whose rows it stacks: attention's q, k and v, and in
single blocks the first layer of the mlp too. The output norm's two halves, shift and scale, stand in the other order.
Sources: the released files, diffusers' `convert_flux_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srpo_core.config import ConfigError

from .fp8 import dequantised
from .loading import Stream
from .recognise import require
from .tensors import TensorFile

REST = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""The original module whose rows, first half and second half, diffusers keeps in the other order."""
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}
"""Original list of blocks -> diffusers' list and the modules of one block."""
ROWS = {1: (1,), 3: (1, 1, 1), 4: (1, 1, 1, 4)}
"""Shares of a stacked module's rows, by how many modules it stacks (an mlp is 4 times as wide as the model)."""
_BACK = {"": {parts: name for name, parts in REST.items()}} | {
    target: {parts: name for name, parts in table.items()} for target, table in BLOCKS.values()
}
_AXES = {128: (16, 56, 56)}
"""How the released models divide a head's width among the three axes of position ids."""


def diffusers_modules(module: str) -> tuple[str, ...] | None:
    """The diffusers modules that an original module stands for; None if FLUX has no such module."""
    kind, index, rest = _split(module)
    if index is None:
        return REST.get(module)
    target, table = BLOCKS.get(kind, ("", {}))
    parts = table.get(rest)
    return None if parts is None else tuple(f"{target}.{index}.{part}" for part in parts)


def original_module(module: str) -> tuple[str, int, int] | None:
    """(original module, place among its parts, number of parts) of a diffusers module; None if FLUX has no such one."""
    kind, index, rest = _split(module)
    table = _BACK.get(kind if index is not None else "", {})
    for parts, name in table.items():
        if (rest if index is not None else module) in parts:
            place = parts.index(rest if index is not None else module)
            source = next((source for source, (target, _) in BLOCKS.items() if target == kind), "")
            return (f"{source}.{index}.{name}" if index is not None else name), place, len(parts)
    return None


def original_name(name: str) -> str:
    """The original name of a diffusers tensor, or of the stacked one that it is a part of; others' as they are."""
    module, _, kind = name.rpartition(".")
    found = original_module(module)
    if found is None:
        return name
    return f"{found[0]}.{'scale' if found[0].endswith(('query_norm', 'key_norm')) else kind}"


def _split(module: str) -> tuple[str, str | None, str]:
    found = re.fullmatch(r"((?:double|single)_blocks|(?:single_)?transformer_blocks)\.(\d+)\.(.+)", module)
    return (found[1], found[2], found[3]) if found else ("", None, module)


def to_diffusers(
    file: TensorFile, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Stream:
    """A FLUX transformer's tensors under diffusers' names, dequantised, one module of the file at a time.

    The file may be in either set of names, with or without a prefix, or a whole checkpoint. Names that FLUX doesn't
    have come through as they are. `dtype` and `device` are those of `dequantised`. WeightsError if it is no FLUX
    transformer.
    """
    contents = require(file, "transformer", file.setting)
    stream = dequantised(file.prefix(contents.prefix), dtype, device)
    return rename(stream) if contents.layout == "original" else stream


def rename(stream: Stream) -> Stream:
    """Original names -> diffusers' names, stacked modules taken apart (as views of the stacked tensor)."""
    for name, tensor in stream:
        module, _, kind = name.rpartition(".")
        parts = diffusers_modules(module)
        if parts is None or kind not in ("weight", "bias", "scale"):
            yield name, tensor
            continue
        shares = (1, 1) if module == SWAPPED else ROWS[len(parts)]
        if tensor.ndim == 0 or tensor.shape[0] % sum(shares):
            yield name, tensor  # of no FLUX width: reported with the name that it has in the file
            continue
        if module == SWAPPED:
            pieces: tuple[Tensor, ...] = (swap_halves(tensor),)
        else:
            pieces = tensor.split([tensor.shape[0] // sum(shares) * share for share in shares])
        for part, piece in zip(parts, pieces, strict=True):
            yield f"{part}.{'weight' if kind == 'scale' else kind}", piece


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """[out, in] of a transformer's matrices by diffusers' module paths, from its tensors' original names and shapes."""
    outline = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    return {name.removesuffix(".weight"): tuple(t.shape) for name, t in rename(outline) if t.ndim == 2}


def swap_halves(tensor: Tensor) -> Tensor:
    """Rows [shift, scale] <-> [scale, shift]."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def to_original(stream: Stream) -> Stream:
    """Diffusers' names -> original names; stacked modules come out once all their parts have.

    ConfigError for a name that FLUX doesn't have, or parts that never come. Works on meta tensors too.
    """
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in stream:
        module, _, kind = name.rpartition(".")
        found = original_module(module)
        if found is None or kind not in ("weight", "bias"):
            raise ConfigError(f"{name}: a FLUX transformer has no such tensor; its original name is not known")
        source, place, count = found
        target = original_name(name)
        if source == SWAPPED:
            tensor = swap_halves(tensor)
        if count > 1:
            parts = waiting.setdefault(target, {})
            parts[place] = tensor
            if len(parts) < count:
                continue
            tensor = torch.cat([part for _, part in sorted(waiting.pop(target).items())])
        yield target, tensor
    if waiting:
        raise ConfigError(f"these weights lack parts of {next(iter(waiting))}")


def transformer_config(file: TensorFile) -> dict[str, Any]:
    """Keyword arguments of `FluxTransformer2DModel`, read off the shapes.

    Fixed are what FLUX models share: patches of 2 x 2, an mlp 4 times as wide, and the axes of heads of width 128.
    WeightsError for another head width, whose axes no shape tells.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in to_diffusers(file.outline())}
    try:
        width, channels = shapes["x_embedder.weight"]
        head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        config = {
            "patch_size": 1,
            "in_channels": channels,
            "out_channels": None if (out := shapes["proj_out.weight"][0]) == channels else out,
            "num_layers": _count(shapes, "transformer_blocks"),
            "num_single_layers": _count(shapes, "single_transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // max(head, 1),
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise file.error(f"is no whole FLUX transformer (nothing fits {error})", "download it again") from error
    if head not in _AXES:
        reason = f"has heads of width {head}, where FLUX models have 128: their axes can't be read off the weights"
        raise file.error(reason, "name its folder in diffusers format, with its config.json")
    return config | {"axes_dims_rope": _AXES[head]}


def _count(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    found = {int(match[1]) for name in shapes if (match := re.match(rf"{blocks}\.(\d{{1,5}})\.", name))}
    return len(found)
