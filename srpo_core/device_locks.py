"""Which run works on which device: two share one only if they are told to.

A process that trains holds a lock file named after its device, which the system frees however the process ends. One
that was started and doesn't hold its lock yet is known by the note beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.files import write_atomic
from srpo_core.processes import birth, is_running, lineage

FOLDER = "SRPO_LOCKS"
"""Names, in the environment, the folder of the locks; programs that see the same GPUs should have the same one."""
CPU = "cpu"
PATIENCE = 3.0
"""Seconds that a lock is waited for: someone may be looking whether it is free."""
SHARE = "or set parallel.share_gpu=true"


@dataclass(frozen=True)
class Holder:
    """The run that works on a device; pid 0 where no more is known."""

    run_dir: str
    pid: int
    created: str
    """processes.birth of the pid."""

    def __str__(self) -> str:
        return f"process {self.pid} trains on it ({self.run_dir})" if self.pid else "another run trains on it"


def lock_folder() -> Path:
    """Where the locks lie: a folder that all programs of the user share."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "srpo" / "devices"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:  # a home that can't be written to
        return Path(tempfile.gettempdir()) / "srpo-devices"


def device_key(device: torch.device) -> str:
    """What names a device for all programs on this machine."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else f"cuda-{device.index or 0}"


def _file(key: str, suffix: str) -> Path:
    return lock_folder() / f"{re.sub(r'[^A-Za-z0-9-]', '_', key)}{suffix}"


def holder(key: str) -> Holder | None:
    """The run that works on a device or was just started there; None if none does, or if it is this process's own."""
    note = _note(key)
    there = _is_starting(note)
    lock = FileLock(_file(key, ".lock"))
    try:
        lock_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE if note is not None and not there else 0)  # what was killed takes a moment to end
    except Timeout:
        return note or Holder("", 0, "")
    except OSError:  # no lock can be had here, so nobody has one
        return None
    lock.release()
    return note if there else None


def _is_starting(note: Holder | None) -> bool:
    """Whether a device is noted for a process that is still there, and is not this one or one that started it."""
    return note is not None and note.pid not in lineage() and is_running(note.pid, note.created)


def _note(key: str) -> Holder | None:
    try:
        return Holder(**json.loads(_file(key, ".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def reserve(keys: Sequence[str], run_dir: Path, pid: int) -> None:
    """Note that the process `pid` was started to train on devices, until it holds their locks itself."""
    with contextlib.suppress(OSError, psutil.Error):
        note = Holder(str(run_dir), pid, birth(pid))
        for key in keys:
            write_atomic(_file(key, ".json"), json.dumps(asdict(note)), durable=False)


@contextlib.contextmanager
def held(parallel: ParallelConfig, key: str, run_dir: Path) -> Iterator[None]:
    """Inside the context this process trains on the device `key`.

    ConfigError if another run does, unless parallel.share_gpu; runs that were started by hand may share the CPU.
    """
    lock, alone = FileLock(_file(key, ".lock")), key != CPU and not parallel.share_gpu
    try:
        lock_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE if alone else 0)
    except Timeout:
        if alone:
            raise _taken(key, holder(key)) from None
    except OSError:  # a file system without locks: the run is worth more
        pass
    note = _note(key)
    try:
        if lock.is_locked and alone and _is_starting(note):
            raise _taken(key, note)
        if lock.is_locked:
            reserve([key], run_dir, os.getpid())
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                if (note := _note(key)) is not None and note.pid == os.getpid():
                    _file(key, ".json").unlink(missing_ok=True)
            lock.release()


def _taken(key: str, one: Holder | None) -> ConfigError:
    told = str(one) if one is not None else "another run trains on it"
    return ConfigError(f"the device {key} is taken: {told}; wait for it, stop it (srpo stop RUN), {SHARE}")
