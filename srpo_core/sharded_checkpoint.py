"""Checkpoints' tensors: whole in one file, or in parts that processes wrote side by side.

    weights.safetensors              all of them
    weights/part-0003.safetensors    what process 3 wrote: rows of tensors under the tensors' own names
    weights/index.json               {name: {"shape", "parts": {file: offsets of what it holds}}}

torch.distributed.checkpoint plans who writes and who reads what, so that a run goes on with any number of processes and
any strategy. Its own files are pickled, which a file from a stranger must not be: these are read as what they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.weights.tensors import DTYPES, TensorFile, TensorInfo, WeightsError, open_tensors

INDEX = "index.json"
_PART = re.compile(r"part-\d{4,}\.safetensors")


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: the file that holds it, and where in the tensor it begins."""

    file: TensorFile
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """A checkpoint's "weights", "ema" or "optimizer": names with shapes, and the pieces that make them up."""

    path: Path
    info: Mapping[str, TensorInfo]
    pieces: Mapping[str, list[Piece]]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype, on the CPU. WeightsError if a file was cut meanwhile."""
        info, pieces = self.info[name], self.pieces[name]
        if len(pieces) == 1:
            return pieces[0].file.read(name)
        whole = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        for piece in pieces:
            block_of(whole, piece.offsets, piece.file.info[name].shape).copy_(piece.file.read(name))
        return whole

    def outline(self, name: str) -> Tensor:
        """What `read` gives, on meta."""
        return torch.empty(self.info[name].shape, dtype=DTYPES[self.info[name].dtype], device="meta")

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors of these names and shapes, whole or spread over processes, each with what it needs alone."""
        if targets:
            from srpo_core.parts_storage import read_parts

            read_parts(self, targets)


def block_of(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """A view of what begins at `offsets`."""
    for side, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(side, offset, size)
    return tensor


def is_saved(folder: Path, name: str) -> bool:
    """Whether a checkpoint has tensors of that name, in either form."""
    return (folder / f"{name}.safetensors").is_file() or (folder / name / INDEX).is_file()


def saved_path(folder: Path, name: str) -> Path:
    """The file that tells what a checkpoint's tensors of that name are."""
    index = folder / name / INDEX
    return index if index.is_file() else folder / f"{name}.safetensors"


def open_saved(folder: Path, name: str) -> Saved:
    """A checkpoint's tensors by their headers. WeightsError if a file is missing, damaged or not as the index says."""
    path = saved_path(folder, name)
    if path.name == INDEX:
        return _open_parts(path)
    file = open_tensors(path, "")
    return Saved(path, file.info, {key: [Piece(file, (0,) * len(i.shape))] for key, i in file.info.items()})


def _open_parts(path: Path) -> Saved:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        names = sorted({name for one in told.values() for name in one["parts"]})
        if not all(map(_PART.fullmatch, names)):
            raise ValueError("it names files that are no parts")
        files = {name: open_tensors(path.parent / name, "") for name in names}
        pieces = {
            key: [Piece(files[name], tuple(offsets)) for name, offsets in one["parts"].items()]
            for key, one in told.items()
        }
        info = {key: TensorInfo(tuple(one["shape"]), pieces[key][0].file.info[key].dtype) for key, one in told.items()}
        for key, one in info.items():
            held = [(piece.offsets, piece.file.info[key]) for piece in pieces[key]]
            fits = all(
                held_info.dtype == one.dtype
                and all(o >= 0 and o + s <= w for o, s, w in zip(offsets, held_info.shape, one.shape, strict=True))
                for offsets, held_info in held
            )
            if not fits or sum(math.prod(held_info.shape) for _, held_info in held) != one.numel:
                raise ValueError(f"the parts of {key} don't make it up")
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError("", path, f"can't be read: {error}") from error
    return Saved(path, info, pieces)
