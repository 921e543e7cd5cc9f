"""A scaled-fp8 copy of a FLUX transformer beside its file: made once, used as long as the file stays the same.

A plain cast to fp8 rounds small weights to a grid that was made for large ones. In scaled fp8 each matrix has its own
scale (`weights.fp8.scaled_fp8`), so that all of it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from srpo_core.config import ConfigError
from srpo_core.export.convert import KEPT
from srpo_core.export.formats import SCALED_FP8, Stream, converted
from srpo_core.export.writer import Plan, check_space, plan, size, write_file
from srpo_core.files import check_writable, fingerprint
from srpo_core.models.flux_files import Part
from srpo_core.weights.tensors import TensorFile, WeightsError, open_tensors

MARK = "srpo_copy_of"
"""Metadata of a copy: the fingerprint of what it was made of."""
_ENDS = re.compile(r"(-\d{5}-of-\d{5})?\.(safetensors(\.index\.json)?|sft)$", re.IGNORECASE)


def copy_path(source: Path) -> Path:
    """Where the copy of a file (or index of shards) lies: model.safetensors -> model-scaled-fp8.safetensors."""
    return source.with_name(f"{_ENDS.sub('', source.name)}-{SCALED_FP8}.safetensors")


def scaled_copy(
    part: Part, setting: str, way_out: str, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """The copy of a transformer's file, which is written if there is none or the file has changed since.

    In memory is one layer at a time. `on_bytes(done, total)` is called after each tensor; what it raises ends the work
    and leaves nothing behind. ConfigError, which names `setting` and ends in `way_out`, before anything is written: for
    another file in the copy's place, a folder that can't be written to, a disk that lacks room. TrainingError if the
    disk refuses on the way.
    """
    copy, mark = copy_path(part.file.path), "-".join(fingerprint(file) for file in part.file.files)
    if _is_copy(copy, mark, setting):
        return copy

    def stream(file: TensorFile) -> Stream:
        return converted(part.stream(file), "comfyui", SCALED_FP8)

    planned = plan(stream(part.file.outline()))
    metadata = {key: value for key, value in part.file.metadata.items() if key in KEPT} | {MARK: mark}
    check_writable(copy.parent, setting, way_out)
    check_space(copy, size(planned, metadata), way_out)
    write_file(copy, planned, _counted(stream(part.file), planned, on_bytes), metadata)
    return copy


def _is_copy(path: Path, mark: str, setting: str) -> bool:
    """Whether the copy with this mark is there. ConfigError if another file is, which is not to be overwritten."""
    if not path.exists():
        return False
    try:
        metadata = open_tensors(path, setting).metadata
    except WeightsError:
        metadata = {}
    if MARK not in metadata:
        raise ConfigError(f"{setting} would write {path}, but another file is there: move it or give it another name")
    return metadata[MARK] == mark


def _counted(stream: Stream, planned: Plan, on_bytes: Callable[[int, int], None]) -> Stream:
    """The stream; `on_bytes` is told of the bytes before each tensor and at the end."""
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in planned.values())
    done = 0
    on_bytes(done, total)
    for name, tensor in stream:
        yield name, tensor
        done += tensor.nbytes
        on_bytes(done, total)
