"""Writing safetensors files of any size: header first, then a tensor at a time.

The file's names, shapes and dtypes must be known before its first byte. They come from running the same stream on meta
tensors (`plan`), so that nothing but the tensor at hand is ever in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.files import check_writable, free_bytes, nearest_existing, sync
from srpo_core.weights.tensors import DTYPES

SUFFIX = ".safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
CHUNK = 64 * 2**20
"""Bytes handed to the disk at once."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""How safetensors writes torch's dtypes."""

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def plan(stream: Iterable[tuple[str, Tensor]]) -> Plan:
    """What a stream (of meta tensors, say) will write: {name: (dtype, shape)}, in its order."""
    planned: Plan = {}
    for name, tensor in stream:
        if name in planned:
            raise ConfigError(f"two tensors would be called {name}: the file's names overlap")
        planned[name] = (tensor.dtype, tuple(tensor.shape))
    return planned


def header(planned: Plan, metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: 8 bytes of length, then JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name, (dtype, shape) in planned.items():
        end = start + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def size(planned: Plan, metadata: Mapping[str, str]) -> int:
    """Bytes of the file."""
    return len(header(planned, metadata)) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in planned.values())


def write_file(path: Path, planned: Plan, stream: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write what `stream` gives beside `path`, then rename. TrainingError if the disk refuses.

    The stream must give the planned tensors in the planned order; it is the caller's promise, and checked.
    """
    beside = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(header(planned, metadata))
            expected = iter(planned.items())
            for name, tensor in stream:
                found = (name, (tensor.dtype, tuple(tensor.shape)))
                if found != next(expected, None):
                    raise RuntimeError(f"{path}: {found} was not planned here")
                for part in _bytes(tensor):
                    file.write(part)
            if (missing := next(expected, None)) is not None:
                raise RuntimeError(f"{path}: {missing} was planned and did not come")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise TrainingError(f"{path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_folder(
    folder: Path, planned: Plan, stream: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str], config: str
) -> None:
    """Write a folder in diffusers format (one weights file and its config.json) beside, then rename it to its place."""
    beside = folder.with_name(f".tmp-{folder.name}")
    aside = folder.with_name(f".tmp-{folder.name}-replaced")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        write_file(beside / WEIGHTS, planned, stream, metadata)
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
        sync(folder.parent)
    except OSError as error:
        raise TrainingError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def check_place(path: Path, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """ConfigError unless `path` can be made, or may be overwritten and is an export of ours and none of `sources`."""
    for source in sources:
        if _within(source, path) or _within(path, source):
            raise ConfigError(f"{path} is also read from ({source}): choose another --out")
    check_writable(nearest_existing(path.parent), "--out")
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


def check_space(path: Path, needed: int, way_out: str = "choose another --out or a smaller --dtype") -> None:
    """ConfigError if the disk that `path` will lie on has less than `needed` bytes free.

    What an overwritten file takes is not counted as free: it stays until the new one is whole.
    """
    free = free_bytes(path.parent)
    if free < needed:
        raise ConfigError(
            f"{path} needs {needed / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free: make room, or"
            f" {way_out}"
        )


def _within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, links followed."""
    inner, outer = inner.resolve(), outer.resolve()
    return inner == outer or outer in inner.parents


def _bytes(tensor: Tensor) -> Iterable[memoryview]:
    """A tensor's bytes, little-endian, in pieces: a device's memory is copied a piece at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        yield memoryview(flat[start : start + CHUNK].cpu().numpy())
