"""What exported weights can be: formats, dtypes, and how a stream of tensors becomes one of them.

A transformer in "diffusers" format is a folder, or one file under diffusers' names, which ComfyUI reads too; in
"comfyui" format it is one file under the original names, as black-forest-labs releases it. A LoRA is one file under
diffusers' names: both programs read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from srpo_core.config import ConfigError
from srpo_core.export import writer
from srpo_core.export.writer import SUFFIX, check_place, check_space, plan, size
from srpo_core.weights.flux_names import to_original
from srpo_core.weights.fp8 import scaled_fp8
from srpo_core.weights.loading import Stream

Source = Callable[[bool], Stream]
"""Gives a stream of tensors, or, called with True, of meta tensors with the same names, shapes and dtypes."""
FORMATS = ("diffusers", "comfyui")
SCALED_FP8 = "scaled-fp8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str, what: str, format: str) -> None:
    """ConfigError for a dtype that is unknown or that the format can't hold."""
    if dtype == SCALED_FP8 and what != "transformer":
        raise ConfigError(
            f"--dtype {dtype}: only a transformer can be that, not a {what}; --dtype float16 is small too"
        )
    if dtype == SCALED_FP8 and format != "comfyui":
        raise ConfigError(f"--dtype {dtype}: diffusers has no such format; ComfyUI reads it: add --format comfyui")
    if dtype != SCALED_FP8 and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r} (choices: {', '.join((*DTYPES, SCALED_FP8))})")


def check_format(format: str) -> None:
    """ConfigError for an unknown format."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r} (choices: {', '.join(FORMATS)})")


def check_file(path: Path, what: str) -> None:
    """ConfigError unless the path is named as a single file."""
    if path.suffix != SUFFIX:
        raise ConfigError(f"{what} is one file: {path} should end in {SUFFIX}")


def cast(stream: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Stream:
    """Floating-point tensors in `dtype` (None: their own); single numbers, such as a LoRA's alpha, stay as they are."""
    for name, tensor in stream:
        keep = dtype is None or not tensor.is_floating_point() or tensor.ndim == 0
        yield name, tensor.detach() if keep else tensor.detach().to(dtype)


def converted(stream: Stream, format: str, dtype: str | None) -> Stream:
    """A transformer's tensors under diffusers' names, in a format and dtype; None keeps each tensor's own.

    In scaled fp8 the matrices inside blocks are 8-bit floats with a scale each; biases, norms and what is before and
    behind the blocks are bfloat16.
    """
    if dtype != SCALED_FP8:
        stream = cast(stream, None if dtype is None else DTYPES[dtype])
        return to_original(stream) if format == "comfyui" else stream
    original = to_original(stream)
    rounded = ((name, t if _in_blocks(name, t) else t.to(torch.bfloat16)) for name, t in original)
    return scaled_fp8(rounded, _in_blocks)


def _in_blocks(name: str, tensor: Tensor) -> bool:
    return name.startswith(("double_blocks.", "single_blocks.")) and name.endswith(".weight") and tensor.ndim == 2


def write(
    out: Path,
    source: Source,
    metadata: Mapping[str, str],
    config: Callable[[], str] | None = None,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
) -> Path:
    """Write a source's tensors to one file, or to a folder in diffusers format if `out` is not named as a file.

    `config` gives the folder's config.json. ConfigError, before anything is written, if the place is taken (or one of
    `sources`) or lacks room; TrainingError if the disk refuses.
    """
    check_place(out, overwrite, sources)
    planned = plan(source(True))
    check_space(out, size(planned, metadata))
    if out.suffix == SUFFIX:
        writer.write_file(out, planned, source(False), metadata)
    elif config is None:
        raise ConfigError(f"this is one file: {out} should end in {SUFFIX}")
    else:
        writer.write_folder(out, planned, source(False), metadata, config())
    return out


def tensors_source(tensors: Mapping[str, Tensor]) -> Source:
    """A source of tensors that are in memory."""
    return lambda meta: ((name, t.to("meta") if meta else t) for name, t in tensors.items())


def module_config(module: nn.Module) -> str:
    """The config.json of a diffusers model. ConfigError for another module."""
    if not hasattr(module, "to_json_string"):
        raise ConfigError(f"a {type(module).__name__} is no diffusers model: it can't be exported as a folder")
    config = json.loads(module.to_json_string())
    return json.dumps({key: value for key, value in config.items() if key != "_name_or_path"}, indent=2)
