"""A run's weights, written out with the run's description inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from srpo_core.checkpoint import (
    best,
    checkpoint_folder,
    latest,
    list_checkpoints,
    load_weights,
    read_state,
    read_tensors,
)
from srpo_core.config import ConfigError, ModelConfig, RunConfig
from srpo_core.description import load_run
from srpo_core.export.formats import SUFFIX, Source, Stream, cast, check_dtype, check_file, check_format, module_config
from srpo_core.export.lora import export_lora, trained_lora
from srpo_core.export.transformer import check_merge, merge_stream, transformer_tensors, write_transformer
from srpo_core.export.writer import check_place
from srpo_core.models import find_transformer, load_model
from srpo_core.models.flux_files import Part
from srpo_core.sharded_checkpoint import is_saved, open_saved
from srpo_core.weights.lora_names import Lora, read_lora

What = Literal["auto", "lora", "transformer", "vae"]


def export_run(
    run_dir: Path | str,
    out: Path | str | None = None,
    what: What = "auto",
    checkpoint: str | int = "last",
    averaged: bool | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    format: str | None = None,
    config: RunConfig | None = None,
) -> Path:
    """Export a checkpoint of a run ("last", "best" or a step); the file or folder that was written.

    `what` auto is the LoRA of a LoRA run and the transformer of others; `vae` the run's autoencoder. `out` is a
    .safetensors file, or in diffusers format a folder too; unset, it lies in the run's export/. `averaged` None takes
    the running average where the run kept one. `dtype` None is float32 for a LoRA and model.dtype for others. `format`
    None is comfyui for a VAE and diffusers for others. `config` None is read from run.json. ConfigError says what
    doesn't fit, before anything is loaded.
    """
    run_dir = Path(run_dir)
    record = run_dir / "run.json"
    if not record.is_file():
        raise ConfigError(f"{run_dir} holds no run: there is no run.json")
    config = config or load_run(str(record))
    folder = find_checkpoint(run_dir, checkpoint)
    state = read_state(folder)
    what = _choose(what, state)
    dtype = dtype or ("float32" if what == "lora" else config.model.dtype)
    format = format or ("comfyui" if what == "vae" else "diffusers")
    check_format(format)
    check_dtype(dtype, what, format)
    averaged = _averaged(folder, averaged)
    path = Path(out) if out is not None else run_dir / "export" / _name(run_dir, state["step"], what, format, dtype)
    _check_path(path, what, format, overwrite, [*_files_of(config.model), run_dir / "checkpoints"])
    metadata = describe(record.read_text(encoding="utf-8"), state["step"], averaged)
    if what == "lora":
        tensors = read_tensors(folder, "ema" if averaged else "weights")
        return export_lora(tensors, state["lora"]["alpha"], path, metadata, dtype, overwrite)
    if what == "vae":
        from srpo_core.export.vae import export_vae

        return export_vae(load_model(config.model, "cpu").autoencoder, path, metadata, dtype, overwrite, format)
    source, settings = run_source(config, folder, state, averaged)
    return write_transformer(source, path, metadata, settings, format, dtype, overwrite)


def _check_path(path: Path, what: str, format: str, overwrite: bool, read: Sequence[Path]) -> None:
    if what == "lora" or format == "comfyui":
        check_file(path, "a LoRA" if what == "lora" else f"a {what} in ComfyUI's format")
    check_place(path, overwrite, read)


def _files_of(model: ModelConfig) -> list[Path]:
    """The files and folders that the base model is read from, which no export may take the place of."""
    named = [model.path, model.transformer, model.autoencoder, model.clip, model.t5, model.lora]
    places = [Path(place) for place in named if place is not None]
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    whole = [place for place in places if (place / parts[0]).is_dir()]
    return [place for place in places if place not in whole] + [place / part for place in whole for part in parts]


def run_source(
    config: RunConfig, folder: Path, state: Mapping[str, Any], averaged: bool
) -> tuple[Source, Callable[[], str]]:
    """A checkpoint's whole transformer as a source, and what gives its config.json.

    Of a family whose transformer can be read by itself, it is never in memory: a run of all parameters has it in the
    checkpoint, that of a LoRA run is merged from the base's files on the way.
    """
    part = find_transformer(config.model)
    if part is None:
        module = load_model(config.model, "cpu").flow.module
        for parameter in module.parameters() if state["lora"] else ():
            parameter.data = parameter.data.to(getattr(torch, config.model.dtype))  # as frozen ones were in training
        load_weights(folder, module, averaged)
        return lambda meta: transformer_tensors(module, meta), lambda: module_config(module)
    name = "ema" if averaged else "weights"
    if not state["lora"]:
        saved = open_saved(folder, name)

        def source(meta: bool) -> Stream:
            return ((name, saved.outline(name) if meta else saved.read(name)) for name in saved.info)

    else:
        trained = trained_lora(read_tensors(folder, name), state["lora"]["alpha"])
        source = _merged_source(config.model, part, trained)
    return source, lambda: module_config(part.outline)


def _merged_source(config: ModelConfig, part: Part, lora: Lora) -> Source:
    """The base, rounded to model.dtype as in training, with model.lora (rounded again) and the trained LoRA added."""
    base_loras = [(read_lora(config.lora, "model.lora"), config.lora_strength)] if config.lora else []

    def source(meta: bool) -> Stream:
        stream = cast(part.stream(part.file.outline() if meta else None), getattr(torch, config.dtype))
        return merge_stream(merge_stream(stream, base_loras, keep_dtype=True), [(lora, 1.0)], keep_dtype=False)

    check_merge(source, [lora, *(lora for lora, _ in base_loras)])
    return source


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
    if what not in ("lora", "transformer", "vae"):
        raise ConfigError(f"exports are auto, lora, transformer or vae, got {what!r}")
    if what == "lora" and not state["lora"]:
        raise ConfigError("this run trained all parameters, not a LoRA: export its transformer")
    return what


def _averaged(folder: Path, averaged: bool | None) -> bool:
    kept = is_saved(folder, "ema")
    if averaged and not kept:
        raise ConfigError(f"{folder} has no running average: the run had optim.ema_decay=0")
    return kept if averaged is None else averaged


def _name(run_dir: Path, step: int, what: str, format: str, dtype: str) -> str:
    """What an export is called where the user doesn't say: "run-000100", with what else tells it from others."""
    name = f"{run_dir.resolve().name}-{step:06d}"
    if what == "lora":
        return f"{name}{SUFFIX}"
    if what == "vae":
        return f"{name}-vae{SUFFIX if format == 'comfyui' else ''}"
    return f"{name}-{dtype}{SUFFIX}" if format == "comfyui" else name
