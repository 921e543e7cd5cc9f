"""Tensors in safetensors files, by name, read one at a time into memory of their own.

A header is checked whole before anything is believed of it: length, JSON, dtypes, and that the tensors fill the file
exactly, one after the other (the format's own rule). Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from srpo_core.config import ConfigError

from .not_weights import AGAIN, what_else, what_else_in_folder

SHARD = re.compile(r".+-\d{5}-of-(?!00001)\d{5}\.safetensors", re.IGNORECASE)
"""How a file is called that holds only some tensors of a model."""

MAX_HEADER = 100_000_000
"""Bytes; the limit that the safetensors library sets too."""
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""Torch's dtypes by safetensors' names; packed formats below 8 bits have none."""


class WeightsError(ConfigError):
    """A file of weights can't be used. The message names the setting, the file, the reason and the way out."""

    def __init__(self, setting: str, path: Path | str, reason: str, way_out: str = "") -> None:
        self.setting, self.path, self.reason, self.way_out = setting, Path(path), reason, way_out
        place = f"{setting}={str(path)!r}" if setting else str(path)
        super().__init__(f"{place}: {reason}" + (f"; {way_out}" if way_out else ""))


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and its safetensors dtype: "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", ..."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int


class TensorFile:
    """Named tensors in one file or in shards, read one at a time. `setting` is the one that names the file."""

    def __init__(
        self,
        path: Path,
        setting: str,
        metadata: Mapping[str, str],
        info: Mapping[str, TensorInfo],
        places: Mapping[str, _Place],
        meta: bool = False,
    ) -> None:
        self.path, self.setting = path, setting
        self.metadata: dict[str, str] = dict(metadata)
        self.info: dict[str, TensorInfo] = dict(info)
        self._places = dict(places)
        self._meta = meta

    def __contains__(self, name: str) -> bool:
        return name in self.info

    @property
    def files(self) -> list[Path]:
        """The files that its tensors lie in, in order."""
        return sorted({place.path for place in self._places.values()})

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name` in memory of its own, in its stored dtype. WeightsError if the file was cut meanwhile.

        `rows` (first, end) reads only these of its first side.
        """
        info, place = self.info[name], self._places[name]
        if rows is not None:
            row = TensorInfo(info.shape[1:], info.dtype)
            place = _Place(place.path, place.offset + rows[0] * row.bytes)
            info = TensorInfo((rows[1] - rows[0], *row.shape), info.dtype)
        if info.dtype not in DTYPES:
            raise self.error(f"{name} is stored as {info.dtype}, which can't be read here", "use a file in fp8 or more")
        if self._meta:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        data = torch.empty(info.bytes, dtype=torch.uint8)
        try:
            with open(place.path, "rb", buffering=0) as file:
                file.seek(place.offset)
                _read_into(file, memoryview(data.numpy()))
        except OSError as error:
            raise WeightsError(self.setting, place.path, f"{name} can't be read: {error}") from error
        return data.view(DTYPES[info.dtype]).view(info.shape)

    def sample(self, name: str, count: int) -> bytes:
        """The first `count` stored bytes of a tensor, or all if it is smaller."""
        place = self._places[name]
        try:
            with open(place.path, "rb") as file:
                file.seek(place.offset)
                return file.read(min(count, self.info[name].bytes))
        except OSError as error:
            raise WeightsError(self.setting, place.path, f"{name} can't be read: {error}") from error

    def prefix(self, prefix: str) -> TensorFile:
        """The tensors whose names start with `prefix`, which is cut off."""
        names = {name.removeprefix(prefix): name for name in self.info if name.startswith(prefix)}
        info = {short: self.info[name] for short, name in names.items()}
        places = {short: self._places[name] for short, name in names.items()}
        return TensorFile(self.path, self.setting, self.metadata, info, places, self._meta)

    def only(self, names: Iterable[str]) -> TensorFile:
        """The tensors of these names alone."""
        info = {name: self.info[name] for name in names}
        return TensorFile(self.path, self.setting, self.metadata, info, self._places, self._meta)

    def outline(self) -> TensorFile:
        """The same names and shapes, read as tensors on the meta device (`sample` still reads the file)."""
        return TensorFile(self.path, self.setting, self.metadata, self.info, self._places, meta=True)

    def error(self, reason: str, way_out: str = "") -> WeightsError:
        """An error about this file, in the words of its setting."""
        return WeightsError(self.setting, self.path, reason, way_out)


def _read_into(file: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done : done + (1 << 30)])
        if not count:
            raise OSError("the file ends too early")
        done += count


def open_tensors(path: Path | str, setting: str) -> TensorFile:
    """Tensors of a .safetensors file, of a sharded *.index.json, or of a folder that holds one of either.

    Only headers are read. WeightsError, in the words of `setting`, for anything that is not whole or is something else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _choose(path, setting)
        if not path.is_file():
            raise WeightsError(setting, path, "no such file or folder", "check the path")
        if SHARD.fullmatch(path.name):
            raise WeightsError(setting, path, "is one of several shards", "name its folder, or the index beside it")
        return _open_index(path, setting) if path.suffix == ".json" else _open_file(path, setting)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(setting, path, f"can't be read: {error}") from error


def _choose(folder: Path, setting: str) -> Path:
    """The one file of weights, or the one index of shards, that a folder holds."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # hidden ones are no models
    indexes = [path for path in files if fnmatch(path.name.lower(), "*.safetensors.index*.json")]
    singles = [path for path in files if path.name.lower().endswith(".safetensors")]
    for names in ([p for p in indexes if ".index.json" in p.name], indexes):
        if len(names) == 1:
            return names[0]
    usual = [p for p in singles if p.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    for names in (usual, singles):
        if len(names) == 1:
            return names[0]
    if singles and all(SHARD.fullmatch(path.name) for path in singles) and not indexes:
        raise WeightsError(setting, folder, "holds shards without their index", "copy *.safetensors.index.json too")
    if indexes or singles:
        listed = ", ".join(p.name for p in (indexes or singles)[:5])
        raise WeightsError(setting, folder, f"holds several files of weights ({listed})", "name one of them")
    raise WeightsError(setting, folder, *what_else_in_folder(folder))


def _open_file(path: Path, setting: str) -> TensorFile:
    with open(path, "rb") as file:
        size = path.stat().st_size
        start = file.read(512)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:9] != b"{":
            raise WeightsError(setting, path, *what_else(path, start))
        if length > min(size - 8, MAX_HEADER):
            raise WeightsError(setting, path, *_too_long(length, size))
        file.seek(8)
        header = _parse(file.read(length), path, setting)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(setting, path, "its header's metadata is not text", AGAIN)
    info, offsets = _check_entries(header, size - 8 - length, path, setting)
    places = {name: _Place(path, 8 + length + offset) for name, offset in offsets.items()}
    return TensorFile(path, setting, metadata, info, places)


def _too_long(length: int, size: int) -> tuple[str, str]:
    if length > MAX_HEADER:
        return f"its header claims {length} bytes: it is corrupt, or no safetensors file", AGAIN
    return f"it is cut short: its header alone takes {length} bytes, the file has {size}", AGAIN


def _parse(text: bytes, path: Path, setting: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(setting, path, f"its header is corrupt ({error})", AGAIN) from error
    if not isinstance(header, dict):
        raise WeightsError(setting, path, "its header is corrupt (no table)", AGAIN)
    return header


def _check_entries(
    header: Mapping[str, Any], size: int, path: Path, setting: str
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Shapes and offsets of all tensors, which must fill `size` bytes one after the other."""
    entries = []
    for name, entry in header.items():
        info, begin, end = _check_entry(name, entry, path, setting)
        entries.append((begin, end, name, info))
    entries.sort(key=lambda entry: entry[:2])
    at = 0
    for begin, end, name, _ in entries:
        if begin != at:
            raise WeightsError(setting, path, f"its header is corrupt ({name} overlaps or leaves a gap)", AGAIN)
        at = end
    if at != size:
        state = "it is cut short" if at > size else "it is too long"
        raise WeightsError(setting, path, f"{state}: its tensors take {at} bytes, the file holds {size}", AGAIN)
    if not entries:
        raise WeightsError(setting, path, "holds no tensors", "name a file with weights in it")
    by_name = {name: (info, begin) for begin, _, name, info in entries}
    return {name: by_name[name][0] for name in header}, {name: by_name[name][1] for name in header}


def _check_entry(name: str, entry: Any, path: Path, setting: str) -> tuple[TensorInfo, int, int]:
    def corrupt(what: str) -> WeightsError:
        return WeightsError(setting, path, f"its header is corrupt ({what} of {name[:200]!r})", AGAIN)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(f"dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise corrupt("shape or offsets")
    bits = math.prod(shape) * BITS[dtype]
    if (
        math.prod(max(side, 1) for side in shape) >= 2**56
    ):  # an empty tensor may claim any sides, torch may not hold them
        raise corrupt("shape")
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise corrupt(f"size {offsets} for {dtype} {shape}")
    return TensorInfo(tuple(shape), dtype), offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    """A list of integers that a file's or tensor's size could hold."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _open_index(path: Path, setting: str) -> TensorFile:
    """The tensors that an index names, each in its shard beside it."""
    if path.stat().st_size > MAX_HEADER:
        raise WeightsError(setting, path, "is too large for an index of shards")
    weight_map = _parse(path.read_bytes(), path, setting).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError(setting, path, "is no index of shards (no weight_map)", "name a .safetensors file")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\:\x00]+\.safetensors", shard):
            raise WeightsError(setting, path, f"names a shard {shard!r}, which is no .safetensors file beside it")
        if not (path.parent / shard).is_file():
            raise WeightsError(setting, path, f"its shard {shard} is missing", f"put it into {path.parent}")
        shards[shard] = _open_file(path.parent / shard, setting)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise WeightsError(setting, path, f"{shard} does not hold {name}, as the index says", AGAIN)
    info = {name: shards[shard].info[name] for name, shard in weight_map.items()}
    places = {name: shards[shard]._places[name] for name, shard in weight_map.items()}
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return TensorFile(path, setting, metadata, info, places)
