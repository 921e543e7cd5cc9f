"""Trained weights as other programs read them, with the run's description inside.

A LoRA is one file with keys `transformer.<diffusers module>.lora_A.weight`, `.lora_B.weight` and `.alpha`, which
diffusers and ComfyUI both read. A whole transformer is a folder in diffusers format, or its weights alone in one file,
which ComfyUI loads as a diffusion model. A LoRA becomes a whole transformer by being merged into its base.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from srpo_core.checkpoint import (
    best,
    checkpoint_folder,
    latest,
    list_checkpoints,
    load_weights,
    read_state,
    read_tensors,
)
from srpo_core.config import ConfigError
from srpo_core.description import load_run
from srpo_core.errors import TrainingError
from srpo_core.files import sync
from srpo_core.lora import ADAPTER
from srpo_core.models import load_model

if TYPE_CHECKING:
    from srpo_core.models.flux import ImageAutoencoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIX = ".safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
COMFYUI_FLUX_SCALE, COMFYUI_FLUX_SHIFT = 0.3611, 0.1159
"""ComfyUI hands a FLUX model (latents - shift) * scale of its VAE's latents, whichever VAE that is."""


def lora_tensors(parameters: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A LoRA's parameters, named as in the module or its checkpoint, under the names that diffusers and ComfyUI read.

    Others are left out. `alpha` becomes a scalar beside each layer: readers scale by alpha / rank.
    """
    tensors = {}
    for name, tensor in parameters.items():
        for side in ("lora_A", "lora_B"):
            layer, found, _ = name.partition(f".{side}.{ADAPTER}.weight")
            if found:
                tensors[f"transformer.{layer}.{side}.weight"] = tensor.detach()
                tensors[f"transformer.{layer}.alpha"] = torch.tensor(float(alpha))
    if not tensors:
        raise ConfigError("there is no LoRA among these weights")
    return tensors


def transformer_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module's weights as if it had no LoRA, with the LoRA merged in float32 where it has one."""
    for name, tensor in module.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer_name, merges, _ = name.partition(".base_layer.weight")
        if merges:
            layer = module.get_submodule(layer_name)
            change = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
            tensor = tensor.float() + layer.scaling[ADAPTER] * change.detach()
        yield name.replace(".base_layer.", "."), tensor


def vae_comfyui_tensors(autoencoder: ImageAutoencoder) -> dict[str, Tensor]:
    """An autoencoder of the TAESD layout, under the names by which ComfyUI knows that layout.

    `vae_scale` and `vae_shift` are such that ComfyUI's FLUX models get the latents that `autoencoder` encodes, and its
    decoder those that they return. ConfigError for another layout, which ComfyUI would not recognise.
    """
    from diffusers import AutoencoderTiny

    weights = autoencoder.module.state_dict()
    channels = autoencoder.module.config.latent_channels
    layout = AutoencoderTiny(latent_channels=channels).state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {name: t.shape for name, t in layout.items()}:
        raise ConfigError("this autoencoder can't become a ComfyUI VAE here: only the TAESD layout is supported")
    tensors = {
        "vae_scale": torch.tensor(COMFYUI_FLUX_SCALE / autoencoder.scale),
        "vae_shift": torch.tensor(COMFYUI_FLUX_SHIFT - autoencoder.shift * autoencoder.scale / COMFYUI_FLUX_SCALE),
    }
    for name, tensor in weights.items():
        side, _, index, rest = name.split(".", 3)
        place = int(index) + (side == "decoder")  # ComfyUI's decoder counts its clamp as layer 0
        tensors[f"taesd_{side}.{place}.{rest}"] = tensor
    return tensors


def export_lora(
    parameters: Mapping[str, Tensor],
    alpha: float,
    path: Path | str,
    metadata: Mapping[str, str],
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a LoRA, by its parameters' names in the module or in a checkpoint, to one safetensors file."""
    path = Path(path)
    _check_place(path, overwrite)
    _write_file(path, dict(_cast(lora_tensors(parameters, alpha).items(), dtype)), metadata)
    return path


def export_transformer(
    module: nn.Module, out: Path | str, metadata: Mapping[str, str], dtype: str = "float32", overwrite: bool = False
) -> Path:
    """Write a transformer, its LoRA merged, to a folder in diffusers format, or to one file if `out` is named so.

    The module itself stays as it is.
    """
    out = Path(out)
    _check_place(out, overwrite)
    tensors = dict(_cast(transformer_tensors(module), dtype))
    if out.suffix == SUFFIX:
        _write_file(out, tensors, metadata)
    else:
        _write_folder(out, tensors, metadata, _module_config(module))
    return out


def export_vae_comfyui(
    autoencoder: ImageAutoencoder,
    path: Path | str,
    metadata: Mapping[str, str],
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write an autoencoder of the TAESD layout to one safetensors file that ComfyUI loads as a VAE for FLUX models."""
    path = Path(path)
    _check_place(path, overwrite)
    _write_file(path, dict(_cast(vae_comfyui_tensors(autoencoder).items(), dtype)), metadata)
    return path


def export_run(
    run_dir: Path | str,
    out: Path | str | None = None,
    what: Literal["auto", "lora", "transformer"] = "auto",
    checkpoint: str | int = "last",
    averaged: bool | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a checkpoint of a run ("last", "best" or a step); the file or folder that was written.

    `what` auto is the LoRA of a LoRA run and the transformer of others. `out` is a .safetensors file, or for a
    transformer a folder; unset, it lies in the run's export/. `averaged` None takes the running average where the run
    kept one. `dtype` None is float32 for a LoRA and model.dtype for a transformer. ConfigError says what doesn't fit,
    before anything is loaded.
    """
    run_dir = Path(run_dir)
    record = run_dir / "run.json"
    if not record.is_file():
        raise ConfigError(f"{run_dir} holds no run: there is no run.json")
    config = load_run(str(record))
    folder = find_checkpoint(run_dir, checkpoint)
    state = read_state(folder)
    what = _choose(what, state)
    dtype = dtype or ("float32" if what == "lora" else config.model.dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r} (choices: {', '.join(DTYPES)})")
    averaged = _averaged(folder, averaged)
    default = f"{run_dir.resolve().name}-{state['step']:06d}{SUFFIX if what == 'lora' else ''}"
    path = Path(out) if out is not None else run_dir / "export" / default
    if what == "lora" and path.suffix != SUFFIX:
        raise ConfigError(f"a LoRA is one file: {path} should end in {SUFFIX}")
    _check_place(path, overwrite)
    metadata = describe(record.read_text(encoding="utf-8"), state["step"], averaged)
    if what == "lora":
        tensors = read_tensors(folder, "ema" if averaged else "weights")
        return export_lora(tensors, state["lora"]["alpha"], path, metadata, dtype, overwrite)
    module = load_model(config.model, "cpu").flow.module
    load_weights(folder, module, averaged)
    return export_transformer(module, path, metadata, dtype, overwrite)


def describe(run: str, step: int, averaged: bool) -> dict[str, str]:
    """What an exported file says about itself: the run's run.json, the step, and which weights these are."""
    return {"srpo_run": run, "srpo_step": str(step), "srpo_weights": "averaged" if averaged else "trained"}


def find_checkpoint(run_dir: Path | str, name: str | int) -> Path:
    """A run's checkpoint by "last", "best" or step. ConfigError lists those that there are."""
    steps = [folder.name for folder in list_checkpoints(run_dir)]
    if not steps:
        raise ConfigError(f"{run_dir} has no checkpoint yet")
    if name == "last":
        folder = latest(run_dir)
    elif name == "best":
        folder = best(run_dir)
    elif str(name).isdigit():
        folder = checkpoint_folder(run_dir, int(name))
    else:
        raise ConfigError(f"a checkpoint is last, best or a step, got {name!r}")
    if folder is None or folder.name not in steps:
        raise ConfigError(f"{run_dir} has no checkpoint {name!r}; there are {', '.join(steps)}")
    return folder


def _choose(what: str, state: Mapping[str, Any]) -> str:
    if what == "auto":
        return "lora" if state["lora"] else "transformer"
    if what not in ("lora", "transformer"):
        raise ConfigError(f"exports are auto, lora or transformer, got {what!r}")
    if what == "lora" and not state["lora"]:
        raise ConfigError("this run trained all parameters, not a LoRA: export its transformer")
    return what


def _averaged(folder: Path, averaged: bool | None) -> bool:
    kept = (folder / f"ema{SUFFIX}").is_file()
    if averaged and not kept:
        raise ConfigError(f"{folder} has no running average: the run had optim.ema_decay=0")
    return kept if averaged is None else averaged


def _check_place(path: Path, overwrite: bool) -> None:
    """ConfigError unless `path` is free, or may be overwritten and is an export of ours."""
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"{path} exists already; --overwrite (overwrite=True) replaces it, --out names another place")
    if path.is_dir() != (path.suffix != SUFFIX):
        raise ConfigError(
            f"{path} is a {'folder' if path.is_dir() else 'file'}; it can't be overwritten with the other"
        )
    if path.is_dir() and any(entry.name not in (WEIGHTS, CONFIG) for entry in path.iterdir()):
        raise ConfigError(f"{path} holds other files too; it is not overwritten")


def _cast(tensors: Any, dtype: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        keep = not tensor.is_floating_point() or tensor.ndim == 0  # single numbers, such as a LoRA's alpha
        yield name, tensor.detach().to("cpu", None if keep else DTYPES[dtype]).contiguous()


def _module_config(module: nn.Module) -> str:
    if not hasattr(module, "to_json_string"):
        raise ConfigError(f"a {type(module).__name__} is no diffusers model: it can't be exported as a folder")
    config = json.loads(module.to_json_string())
    return json.dumps({key: value for key, value in config.items() if key != "_name_or_path"}, indent=2)


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside, then rename. TrainingError if the disk refuses."""
    beside = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, {"format": "pt", **metadata})
        sync(beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} could not be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _write_folder(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: str) -> None:
    """Write a folder in diffusers format beside, then rename it to its place."""
    beside = folder.with_name(f".tmp-{folder.name}")
    aside = folder.with_name(f".tmp-{folder.name}-replaced")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        _write_file(beside / WEIGHTS, tensors, metadata)
        (beside / CONFIG).write_text(config + "\n", encoding="utf-8")
        sync(beside / CONFIG)
        if folder.exists():
            os.replace(folder, aside)
        try:
            os.replace(beside, folder)
        except OSError:
            if aside.exists():
                os.replace(aside, folder)
            raise
    except OSError as error:
        raise TrainingError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
