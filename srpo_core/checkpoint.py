"""Checkpoints: folders `checkpoints/step-000020` that are there whole or not at all.

weights.safetensors     the trained parameters, by their names in the module
ema.safetensors         their running average, if the run keeps one
optimizer.safetensors   `<parameter>/<state>`
state.json              {"format", "step", "best", "lora", "metrics", "trained_on", "processes"}

Where processes held parts of the model, folders `weights`, ... of their parts take the files' places: whoever reads a
checkpoint needs no other processes, and sees no difference (sharded_checkpoint.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from srpo_core.config import LoraConfig
from srpo_core.errors import TrainingError
from srpo_core.files import sync
from srpo_core.lora import add_lora, has_lora
from srpo_core.parallel import World
from srpo_core.sharded_checkpoint import Saved, is_saved, open_saved, saved_path
from srpo_core.sharding import is_part
from srpo_core.weights.tensors import DTYPES, WeightsError

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


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint's "weights", "ema" or "optimizer", whole, on the CPU. TrainingError if a file is damaged."""
    with _readable(folder, name) as saved:
        return {key: saved.read(key) for key in saved.info}


def stream_tensors(folder: Path, name: str, keys: Iterable[str]) -> Iterator[Tensor]:
    """Some of what `read_tensors` reads, one at a time."""
    with _readable(folder, name) as saved:
        yield from map(saved.read, keys)


def read_shapes(folder: Path, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what `read_tensors` reads."""
    with _readable(folder, name) as saved:
        return {key: (info.shape, DTYPES[info.dtype]) for key, info in saved.info.items()}


@contextlib.contextmanager
def _readable(folder: Path, name: str) -> Iterator[Saved]:
    """A checkpoint's tensors; inside the context, a file that can't be read is a TrainingError."""
    try:
        yield open_saved(folder, name)
    except WeightsError as error:
        raise _unreadable(saved_path(folder, name), error.reason) from error


def _unreadable(path: Path, error: Exception | str) -> TrainingError:
    folder = path.parent.parent if path.parent.name in ("weights", "ema", "optimizer") else path.parent
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
    name = "ema" if averaged or (averaged is None and is_saved(folder, "ema")) else "weights"
    copy_tensors(folder, name, dict(module.named_parameters()))


@torch.no_grad()
def copy_tensors(
    folder: Path, name: str, targets: Mapping[str, Tensor], exactly: bool = False, left_out: Collection[str] = ()
) -> None:
    """Copy a checkpoint's tensors, but those `left_out`, into those of the same names; `exactly`: each has to be there.

    Of tensors that are spread over processes each reads its part alone.
    """
    with _readable(folder, name) as saved:
        info = {key: each for key, each in saved.info.items() if key not in left_out}
        problems = [f"{key} {list(i.shape)}" for key, i in info.items() if _shape(targets, key) != i.shape]
        problems += [f"{key} is missing" for key in targets if exactly and key not in info]
        if problems:
            raise TrainingError(
                f"{saved.path} doesn't fit the model ({len(problems)} tensors, such as {problems[0]});"
                " check model.family, model.path and the lora settings"
            )
        for key in info:
            if not is_part(targets[key]):
                targets[key].copy_(saved.read(key))  # one at a time
        saved.read_into({key: targets[key] for key in info if is_part(targets[key])})


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def save(run_dir: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint: beside its place, synced, then renamed. TrainingError if the disk refuses; others stay.

    `tensors` maps file names ("weights", ...) to their tensors; `state` is what state.json adds to format and step.
    """
    folder = checkpoint_folder(run_dir, step)
    lora = state.get("lora")  # told as diffusers tells it: the file is a LoRA of its own, with the right alpha
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": lora["alpha"]})} if lora else None
    with _refusals_told(run_dir, step):
        beside = _begin(folder)
        for name, named in tensors.items():
            path = beside / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in named.items()}, path, metadata)
            sync(path)
        _complete(folder, step, state)
    return folder


def save_parts(
    world: World, run_dir: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """`save` where processes hold parts: all call it, each writes its own, and the main one completes the checkpoint.

    The folder has to be the same on all machines.
    """
    folder = checkpoint_folder(run_dir, step)
    with world.together(), _refusals_told(run_dir, step):
        if world.is_main:
            beside = _begin(folder)
            for name in tensors:
                (beside / name).mkdir()
    from srpo_core.parts_storage import write_parts

    with _refusals_told(run_dir, step):
        for name, named in tensors.items():
            write_parts(_beside(folder) / name, named)
    with world.together(), _refusals_told(run_dir, step):
        if world.is_main:
            _complete(folder, step, state)
    return folder


def _beside(folder: Path) -> Path:
    return folder.with_name(f".tmp-{folder.name}")


def _begin(folder: Path) -> Path:
    """An empty folder beside a checkpoint's place."""
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def _complete(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Give what was written beside a checkpoint's place its state and its name."""
    beside = _beside(folder)
    path = beside / "state.json"
    path.write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1), encoding="utf-8")
    sync(path)
    sync(beside)
    _remove(folder)
    os.replace(beside, folder)
    sync(folder.parent)


@contextlib.contextmanager
def _refusals_told(run_dir: Path | str, step: int) -> Iterator[None]:
    """Inside the context what keeps a checkpoint from being written is a TrainingError, and nothing is left of it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_beside(checkpoint_folder(run_dir, step)), ignore_errors=True)
        raise _refused(run_dir, step, error) from error


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
