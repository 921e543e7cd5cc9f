"""Writing files so that a reader, or the next run, never finds half of one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

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


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) beside its place, then rename it there; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


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
