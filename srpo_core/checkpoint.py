"""Checkpoints: folders `checkpoints/step-000020` that are there whole or not at all.

weights.safetensors     the trained parameters, by their names in the module
ema.safetensors         their running average, if the run keeps one
optimizer.safetensors   `<parameter>/<state>`
state.json              {"format", "step", "best", "lora", "metrics", "trained_on", "processes"}
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from srpo_core.config import LoraConfig
from srpo_core.errors import TrainingError
from srpo_core.files import sync
from srpo_core.lora import add_lora, has_lora
from srpo_core.weights.tensors import WeightsError, open_tensors

FORMAT = 1
_NAME = re.compile(r"step-\d{6,}")


def checkpoint_folder(run_dir: Path | str, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """The run's checkpoints, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=checkpoint_step)


def latest(run_dir: Path | str) -> Path | None:
    """The run's newest checkpoint."""
    return next(reversed(list_checkpoints(run_dir)), None)


def describe_latest(run_dir: Path | str) -> str:
    """The newest checkpoint in words, for the message of a run that failed."""
    newest = latest(run_dir)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def best(run_dir: Path | str) -> Path | None:
    """The checkpoint with the best preview so far; None before the first preview of a trained model."""
    newest = latest(run_dir)
    record = read_state(newest)["best"] if newest is not None else None
    folder = checkpoint_folder(run_dir, record["step"]) if record else None
    return folder if folder is not None and folder.is_dir() else None


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. TrainingError if it can't be read or is of another format."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']!r}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return state


def read_tensors(folder: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files ("weights", "ema", "optimizer"). TrainingError if it is damaged."""
    path = folder / f"{name}.safetensors"
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception | str) -> TrainingError:
    folder = path.parent
    older = [other.name for other in list_checkpoints(folder.parent.parent) if other != folder]
    way_out = f"to go on from {older[-1]}" if older else "to start over from the base model"
    return TrainingError(f"the checkpoint file {path} can't be read: {error}; remove the folder {folder} {way_out}")


def load_weights(folder: Path, module: nn.Module, averaged: bool | None = None) -> None:
    """Put a checkpoint's trained weights into a module of the family that it was trained from.

    `averaged` chooses the running average or the weights themselves; None means the average where there is one. The
    LoRA of a LoRA checkpoint is added to a module that has none. TrainingError if a file is damaged or doesn't fit.
    """
    state = read_state(folder)
    if state["lora"] and not has_lora(module):
        settings = state["lora"]
        add_lora(module, LoraConfig(rank=settings["rank"], alpha=settings["alpha"]), settings["targets"])
    has_average = (folder / "ema.safetensors").is_file()
    name = "ema" if averaged or (averaged is None and has_average) else "weights"
    copy_tensors(folder, name, dict(module.named_parameters()))


@torch.no_grad()
def copy_tensors(folder: Path, name: str, targets: Mapping[str, Tensor], exactly: bool = False) -> None:
    """Copy "weights" or "ema" of a checkpoint into tensors of the same names; `exactly`: none may be left out."""
    path = folder / f"{name}.safetensors"
    try:
        file = open_tensors(path, "")
        problems = [f"{key} {list(i.shape)}" for key, i in file.info.items() if _shape(targets, key) != i.shape]
        problems += [f"{key} is missing" for key in targets if exactly and key not in file]
        if problems:
            raise TrainingError(
                f"{path} doesn't fit the model ({len(problems)} tensors, such as {problems[0]});"
                " check model.family, model.path and the lora settings"
            )
        for key in file.info:
            targets[key].copy_(file.read(key))  # one at a time
    except WeightsError as error:
        raise _unreadable(path, error.reason) from error


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def save(run_dir: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint: beside its place, synced, then renamed. TrainingError if the disk refuses; others stay.

    `tensors` maps file names ("weights", ...) to their tensors; `state` is what state.json adds to format and step.
    """
    folder = checkpoint_folder(run_dir, step)
    beside = folder.with_name(f".tmp-{folder.name}")
    lora = state.get("lora")  # told as diffusers tells it: the file is a LoRA of its own, with the right alpha
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": lora["alpha"]})} if lora else None
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, named in tensors.items():
            path = beside / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in named.items()}, path, metadata)
            sync(path)
        path = beside / "state.json"
        path.write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1), encoding="utf-8")
        sync(path)
        sync(beside)
        _remove(folder)
        os.replace(beside, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _refused(run_dir, step, error) from error
    return folder


def _refused(run_dir: Path | str, step: int, error: Exception) -> TrainingError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else str(error)
    return TrainingError(
        f"the checkpoint of step {step} could not be written to {Path(run_dir) / 'checkpoints'}: {reason};"
        f" {describe_latest(run_dir)};"
        " make room, or lower output.keep_checkpoints, and go on with --resume"
    )


def prune(run_dir: Path | str, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints but the `keep` newest and the best, and what an aborted save left behind."""
    folders = list_checkpoints(run_dir)
    for folder in folders[:-keep]:
        if checkpoint_step(folder) != best_step:
            _remove(folder)
    for leftover in (Path(run_dir) / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer has its name."""
    if folder.is_dir():
        aside = folder.with_name(f".tmp-{folder.name}-removed")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
