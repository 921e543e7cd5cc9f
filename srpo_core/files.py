"""Writing files so that a reader, or the next run, never finds half of one; where that can't be, it is said early."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from srpo_core.config import ConfigError

_SAMPLE = 1 << 16


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk (folders can't be synced on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file (text as UTF-8) beside its place, then rename it there; its folder is made if need be.

    One that isn't `durable` need not survive a machine that loses its power, and costs no wait for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        if durable:
            sync(beside)
        _replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def _replace(beside: Path, path: Path) -> None:
    """os.replace; Windows refuses it for as long as someone reads the file, which is tried for a second."""
    for _ in range(20 if os.name == "nt" else 0):
        with contextlib.suppress(PermissionError):
            return os.replace(beside, path)
        time.sleep(0.05)
    os.replace(beside, path)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that may not be there yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


def disk_of(folder: Path) -> int:
    """What tells the disk of a folder, which may not be there yet, from others."""
    return nearest_existing(folder).stat().st_dev


def check_writable(folder: Path, setting: str, way_out: str = "name another folder") -> None:
    """Make a folder and write to it, before long work. ConfigError that names `setting` if that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{setting}: {folder} can't be written to ({error.strerror}); {way_out}") from error


def fingerprint(path: Path) -> str:
    """16 hex digits that tell files of weights apart without reading them whole; of a folder: of its .safetensors.

    The SHA-256 of each file's size and of 32 blocks of 64 KiB spread over it, both ends included: training changes
    every block. Two files that differ in a few other bytes only look the same.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for i in range(32):
                stream.seek(max(0, size - _SAMPLE) * i // 31)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def size_text(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
