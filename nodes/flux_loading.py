"""FLUX transformers in files, as MODELs: which dtype they are loaded in, and what is never done to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher

from srpo_core.config import ConfigError
from srpo_core.files import size_text
from srpo_core.weights.fp8 import dequantised
from srpo_core.weights.origin import origin
from srpo_core.weights.recognise import WrongPart, describe
from srpo_core.weights.tensors import SHARD, WeightsError

if TYPE_CHECKING:
    from srpo_core.models.flux_files import Part

AS_STORED, BFLOAT16, FLOAT32, SCALED_FP8, FP8_CAST = WEIGHTS = (
    "as stored", "bfloat16", "float32", "scaled fp8", "fp8 cast",
)  # fmt: skip
"""Choices of the widget `weights`."""
DTYPES = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}
_FLAGS = {
    "--fp8_e4m3fn-unet": "fp8_e4m3fn_unet",
    "--fp8_e5m2-unet": "fp8_e5m2_unet",
    "--fp8_e8m0fnu-unet": "fp8_e8m0fnu_unet",
}
LOADERS = {
    "transformer": "SRPO Load Checkpoint (models/diffusion_models)",
    "checkpoint": "SRPO Load Checkpoint (models/diffusion_models)",
    "lora": "SRPO Load LoRA (models/loras)",
    "autoencoder": "Load VAE (models/vae)",
    "clip": "DualCLIPLoader (models/text_encoders)",
    "t5": "DualCLIPLoader (models/text_encoders)",
    "unknown": "Load Diffusion Model, if ComfyUI knows it",
}
"""The nodes for each kind of file."""
WIDE = {"F32": "float32", "F64": "float64"}
"""Stored dtypes that are never cast to fp8."""


def load_flux(path: Path, weights: str) -> tuple[ModelPatcher, str]:
    """The MODEL in a file, in the form that `weights` asks for, and what was found, in words.

    A shard stands for all of them. ConfigError, before anything is loaded, for other files than whole FLUX
    transformers, and for float32 weights that would be cast to fp8.
    """
    from srpo_core.models.flux_files import transformer_at

    with other_loaders():
        part = transformer_at(_whole(path), "checkpoint")
    notes = [describe(part.contents), origin(part.file.metadata)]
    stored = part.contents.quantisation
    if stored and weights in (SCALED_FP8, FP8_CAST):
        notes.append(f"the file is in {stored} already: loaded as it is")
    elif weights == SCALED_FP8:
        part = _scaled(part)
        notes.append(f"read from its scaled-fp8 copy {part.file.path.name}")
    elif not stored and (weights == FP8_CAST or (weights == AS_STORED and _fp8_flag())):
        _refuse_noise(part, weights)
        notes.append(f"cast to fp8 without scales, which is less exact than {SCALED_FP8!r}")
    model = _load(part, weights)
    size = sum(file.stat().st_size for file in part.file.files)
    notes.append(f"loaded as {_loaded_as(model)}, {size_text(size)}")
    return model, "\n".join(note for note in notes if note)


@contextlib.contextmanager
def other_loaders() -> Iterator[None]:
    """Inside the context, a file of another kind is an error that names the node that loads it."""
    try:
        yield
    except WrongPart as error:
        reason, loader = error.reason, LOADERS[error.contents.part]
        raise WeightsError(
            error.setting, error.path, reason, f"choose another file, or load this with {loader}"
        ) from None


def _whole(path: Path) -> Path:
    """The file, or the index beside it where it is one of several shards."""
    if not SHARD.fullmatch(path.name):
        return path
    index = path.with_name(f"{path.name[: -len('-00001-of-00001.safetensors')]}.safetensors.index.json")
    return index if index.is_file() else path


def _refuse_noise(part: Part, weights: str) -> None:
    """ConfigError for float32 weights, which give noisy pictures when they are cast to fp8 without scales."""
    if part.contents.dtype not in WIDE:
        return
    asked = f"weights={weights!r}" + ("" if weights == FP8_CAST else f" with ComfyUI's {_fp8_flag()}")
    raise ConfigError(
        f"{asked}: {part.file.path} holds {WIDE[part.contents.dtype]} weights, and a plain cast of these to fp8 gives"
        f" noisy pictures; choose weights={SCALED_FP8!r} (as small; made once and kept beside the file) or"
        f" {BFLOAT16!r}"
    )


def _fp8_flag() -> str | None:
    """The option by which ComfyUI was told to load every diffusion model in fp8; None without one."""
    return next((flag for flag, name in _FLAGS.items() if getattr(args, name, False)), None)


def _scaled(part: Part) -> Part:
    """The scaled-fp8 copy of a part's file; it is made if need be, under a progress bar that can be interrupted."""
    from srpo_core.export.scaled_copy import scaled_copy
    from srpo_core.models.flux_files import transformer_at

    bar = comfy.utils.ProgressBar(1)

    def on_bytes(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    copy = scaled_copy(part, f"weights={SCALED_FP8!r}", f"choose weights={BFLOAT16!r}", on_bytes)
    return transformer_at(copy, "checkpoint")


def _load(part: Part, weights: str) -> ModelPatcher:
    try:
        return _load_as(part, weights)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        first = str(error).splitlines()[-1].strip()
        reason = f"has other shapes than ComfyUI's FLUX: {first}"
        raise WeightsError("checkpoint", part.file.path, reason, "choose a model of the FLUX.1 family") from error


def _load_as(part: Part, weights: str) -> ModelPatcher:
    stored = part.contents.quantisation
    options: dict[str, Any] = {}
    if weights in DTYPES:
        options["dtype"] = DTYPES[weights]
    elif weights == FP8_CAST and not stored:
        options["dtype"] = torch.float8_e4m3fn
    elif stored == "scaled fp8" and _fp8_flag():
        options["dtype"] = torch.bfloat16  # ComfyUI would cast biases and embedders to fp8 too
    if weights in DTYPES and stored == "scaled fp8":
        file = part.file.prefix(part.contents.prefix)
        return _from_tensors(dict(dequantised(file, DTYPES[weights])), options)
    if len(part.file.files) > 1:
        return _from_tensors({name: part.file.read(name) for name in part.file.info}, options)
    return comfy.sd.load_diffusion_model(str(part.file.files[0]), model_options=options)


def _from_tensors(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> ModelPatcher:
    model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
    if model is None:
        raise ConfigError("checkpoint: this version of ComfyUI doesn't know the model; update ComfyUI")
    return model


def _loaded_as(model: ModelPatcher) -> str:
    """The dtype of a MODEL's weights, and what it computes in where that is another."""
    config = model.model.model_config
    if config.quant_config is not None:
        return "scaled fp8"
    held = str(model.model.get_dtype()).removeprefix("torch.")
    computes = str(config.manual_cast_dtype or held).removeprefix("torch.")
    return held if computes == held else f"{held}, computed in {computes}"
