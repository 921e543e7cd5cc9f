"""Whole transformers: of a module, or of a file with LoRAs merged into it, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from srpo_core.export.formats import (
    SUFFIX,
    Source,
    Stream,
    check_dtype,
    check_file,
    check_format,
    converted,
    module_config,
    write,
)
from srpo_core.lora import ADAPTER, merged
from srpo_core.weights.lora_names import Lora, check_lora


def transformer_tensors(module: nn.Module, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module's weights as if it had no LoRA, with the LoRA merged in float32 where it has one."""
    for name, tensor in module.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer_name, merges, _ = name.partition(".base_layer.weight")
        if meta:
            tensor = tensor.to("meta")
        if merges:
            layer = module.get_submodule(layer_name)
            up, down = layer.lora_B[ADAPTER].weight.to(tensor.device), layer.lora_A[ADAPTER].weight.to(tensor.device)
            tensor = tensor.float() + layer.scaling[ADAPTER] * (up.float() @ down.float()).detach()
        yield name.replace(".base_layer.", "."), tensor


def merge_stream(stream: Stream, loras: Sequence[tuple[Lora, float]], keep_dtype: bool) -> Stream:
    """The stream with LoRAs (and their strengths) added in float32; `keep_dtype` rounds back to each tensor's own."""
    for name, tensor in stream:
        layer = name.removesuffix(".weight")
        changes = [(lora.layers[layer], strength) for lora, strength in loras if layer in lora.layers]
        total = tensor.float() if changes else tensor
        for change, strength in changes:
            total = merged(total, change, strength)
        yield name, total.to(tensor.dtype) if keep_dtype else total


def check_merge(source: Source, loras: Sequence[Lora]) -> None:
    """ConfigError unless all LoRAs fit a source's matrices."""
    shapes = {name.removesuffix(".weight"): tuple(t.shape) for name, t in source(True) if t.ndim == 2}
    for lora in loras:
        check_lora(lora, shapes)


def export_transformer(
    module: nn.Module,
    out: Path | str,
    metadata: Mapping[str, str],
    dtype: str = "float32",
    overwrite: bool = False,
    format: str = "diffusers",
) -> Path:
    """Write a transformer, its LoRA merged, to a folder in diffusers format, or to one file if `out` is named so.

    The module itself stays as it is.
    """

    def source(meta: bool) -> Stream:
        return transformer_tensors(module, meta)

    return write_transformer(source, Path(out), metadata, lambda: module_config(module), format, dtype, overwrite)


def write_transformer(
    source: Source,
    out: Path,
    metadata: Mapping[str, str],
    config: Callable[[], str],
    format: str,
    dtype: str | None,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Path:
    """Write a source under diffusers' names in a format and dtype (None: each tensor's own); see `formats.write`."""
    check_format(format)
    if dtype is not None:
        check_dtype(dtype, "transformer", format)
    if format == "comfyui":
        check_file(out, "a transformer in ComfyUI's format")
    elif out.suffix != SUFFIX:
        config()  # its errors before anything is written

    def as_asked(meta: bool) -> Stream:
        return converted(source(meta), format, dtype)

    return write(out, as_asked, metadata, config, overwrite, sources)
