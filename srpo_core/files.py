"""Writing files so that a reader, or the next run, never finds half of one."""

from __future__ import annotations

import os
from pathlib import Path


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
