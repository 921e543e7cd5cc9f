"""The folder of a run: whether it may be started or resumed there, and its record run.json."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from srpo_core.checkpoint import list_checkpoints
from srpo_core.config import ConfigError, RunConfig, flat
from srpo_core.description import load_run, make_config, place_override
from srpo_core.files import disk_of, free_bytes, nearest_existing, size_text, write_atomic
from srpo_core.metrics import read_metrics

FREE_TO_CHANGE = (
    "output.", "parallel.", "model.recompute", "data.embeddings", "optim.states", "model.trained_memory",
    "model.compile", "model.attention", "rollout.at_once", "rollout.cuda_graph", "align.at_once",
)  # fmt: skip
"""Settings that leave the course of a run as it is but for rounding, so that a resumed run may have other values; a
checkpoint's moments and weights are converted."""


def holds_run(run_dir: Path | str) -> bool:
    """Whether the folder holds a step of a run; a run that failed before its first leaves nothing to protect."""
    return bool(read_metrics(run_dir)) or bool(list_checkpoints(run_dir))


def check_start(config: RunConfig, resume: bool = False) -> None:
    """ConfigError if the run can't start in output.dir, or go on there with these settings. Reads a file or two.

    Where there is no checkpoint, a resumed run starts from the base model, with any settings.
    """
    folder = Path(config.output.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.dir={config.output.dir!r} is a file; name a folder")
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is read-only" if there.is_dir() else "is a file"
        raise ConfigError(f"output.dir={config.output.dir!r} can't be written to: {there} {what}; name another folder")
    if not holds_run(folder):
        return
    if not resume:
        raise ConfigError(
            f"output.dir={config.output.dir!r} already holds a run; go on with it (--resume) or name another output.dir"
        )
    if not list_checkpoints(folder):
        return
    changes = list(changed_settings(load_folder(folder), config))
    if changes:
        lines = "".join(f"\n  {name}: {old!r} there, {new!r} now" for name, old, new in changes)
        if any(name == "optim.steps" for name, *_ in changes):
            lines += (
                f"\noptim.schedule={config.optim.schedule} has lr fall until the last step, so the number of steps"
                " belongs to the run: with optim.schedule=constant one can go on for longer; or start a new run from"
                " this one's LoRA (lora.start)"
            )
        raise ConfigError(
            f"output.dir={config.output.dir!r} holds a run with other settings; go on with its own:{lines}"
        )


def load_folder(run_dir: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's description, read from its folder: output.dir is that folder, wherever it was moved or copied to.

    Absolute paths of things that lay in the folder follow it. ConfigError where there is no run.
    """
    folder = Path(run_dir)
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{run_dir} is no run folder: it holds no run.json")
    config = load_run(str(folder / "run.json"))
    before, record = Path(config.output.dir), config.model_dump()
    if before.resolve() != folder.resolve():
        for name, value in flat(record):
            if isinstance(value, str) and before.is_absolute() and Path(value).is_relative_to(before):
                section, _, key = name.partition(".")
                record[section][key] = str(folder.absolute() / Path(value).relative_to(before))
        record["output"]["dir"] = str(run_dir)
    for override in overrides:
        place_override(record, override)
    return make_config(record)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Inside the context no other process trains in the folder, which is made if need be. ConfigError if one does."""
    lock = FileLock(run_dir / ".lock")  # the system frees it however the process ends
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output.dir={str(run_dir)!r}: another process is training there; name another folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"output.dir={str(run_dir)!r} can't be written to: {error}; name another folder") from None
    try:
        yield
    finally:
        lock.release()


def changed_settings(old: RunConfig, new: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(name, old value, new value) of the settings that would alter the course of a run."""
    before, after = dict(flat(old.model_dump())), dict(flat(new.model_dump()))
    for name, value in after.items():
        free = name.startswith(FREE_TO_CHANGE) or (name == "optim.steps" and new.optim.schedule == "constant")
        if value != before[name] and not free:
            yield name, before[name], value


def write_record(config: RunConfig, device: torch.device) -> None:
    """run.json: the settings, and what they were run with."""
    record = {**config.model_dump(), "made_with": made_with(device)}
    write_atomic(Path(config.output.dir) / "run.json", json.dumps(record, indent=1))


def made_with(device: torch.device) -> dict[str, Any]:
    """Versions and device, for records: {"versions": {package: version}, "python", "device"}."""
    packages = ("torch", "diffusers", "transformers", "peft", "comfyui-srpo")
    versions = {name: _version(name) for name in packages}
    return {"versions": versions, "python": platform.python_version(), "device": device_name(device)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device in words: "cuda (NVIDIA H100)", "cpu"."""
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def check_space(config: RunConfig, checkpoint_bytes: int, result_bytes: int = 0) -> None:
    """ConfigError if a disk lacks room for the checkpoints that a run holds at once, less those there already, or for
    the file of its result, which may lie on another one."""
    folder = Path(config.output.dir)
    free = free_bytes(folder)
    present = len(list_checkpoints(folder))
    at_once = min(config.output.keep_checkpoints + 2, config.optim.steps)  # the newest, the best, and one being written
    needed = max(1, at_once - present) * checkpoint_bytes
    place = None if config.output.result is None else Path(config.output.result).absolute().parent
    together = place is not None and disk_of(place) == disk_of(folder)
    if together:
        needed += result_bytes
    elif place is not None and result_bytes > (room := free_bytes(place)):
        raise ConfigError(
            f"output.result={config.output.result!r}: the file needs about {size_text(result_bytes)}, {size_text(room)}"
            " are free there; make room, name a file on another disk or train a LoRA"
        )
    if needed > free:
        raise ConfigError(
            f"output.dir={config.output.dir!r}: the run's checkpoints{' and its result' if together else ''} need about"
            f" {size_text(needed)} more"
            f" ({size_text(checkpoint_bytes)} each, {at_once} at once), {size_text(free)} are free; make room,"
            " name a folder on another disk, lower output.keep_checkpoints or train a LoRA"
        )
