"""Weights files made into others: another format or dtype, LoRAs merged in, a LoRA extracted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from srpo_core.config import ConfigError
from srpo_core.export.extract import Errors, extract
from srpo_core.export.formats import DTYPES, Source, Stream, check_dtype, check_file, check_format, module_config
from srpo_core.export.lora import write_lora
from srpo_core.export.transformer import check_merge, merge_stream, write_transformer
from srpo_core.export.writer import check_place
from srpo_core.lora import ChosenLora
from srpo_core.models.flux_files import Part, transformer_at
from srpo_core.weights.lora_names import read_lora
from srpo_core.weights.recognise import recognise
from srpo_core.weights.tensors import open_tensors

SOURCE = "SOURCE"
"""The argument that names what is read, in messages."""
KEPT = ("srpo_run", "srpo_step", "srpo_weights", "srpo_merged")
"""Metadata that stays true of a file in another format."""


def convert(
    source: Path | str,
    out: Path | str,
    format: str | None = None,
    dtype: str | None = None,
    merge: Sequence[ChosenLora] = (),
    overwrite: bool = False,
) -> Path:
    """Write a transformer's file or folder in a format and dtype, with LoRAs added; or a LoRA under diffusers' names.

    `dtype` None keeps each tensor's own, and is bfloat16 for a source in 8 bits. In memory are the LoRAs and one layer
    at a time. ConfigError, before anything is written, for what doesn't fit.
    """
    source, out = Path(source), Path(out)
    format = format or "diffusers"
    check_format(format)
    if _is_lora(source):
        if merge:
            raise ConfigError(f"--merge: {source} is a LoRA; a LoRA is merged into a checkpoint: name that first")
        lora = read_lora(source, SOURCE)
        kept = _kept(open_tensors(source, SOURCE).metadata)
        return write_lora(lora, out, kept, dtype, overwrite, (source,))
    part = transformer_at(source, SOURCE)
    loras = [(read_lora(chosen.path, "--merge"), chosen.strength) for chosen in merge]
    if dtype is None and part.contents.quantisation:
        dtype = "bfloat16"

    def merged(meta: bool) -> Stream:
        return merge_stream(_stream(part)(meta), loras, keep_dtype=dtype is None)

    check_merge(_stream(part), [lora for lora, _ in loras])
    metadata = _kept(part.file.metadata)
    if merge:
        earlier = [metadata["srpo_merged"]] if "srpo_merged" in metadata else []
        added = [f"{chosen.path.name}:{chosen.strength:g}" for chosen in merge]
        metadata["srpo_merged"] = ", ".join(earlier + added)
    sources = (source, *(chosen.path for chosen in merge))
    return write_transformer(
        merged, out, metadata, lambda: module_config(part.outline), format, dtype, overwrite, sources
    )


def extract_lora(
    tuned: Path | str,
    base: Path | str,
    rank: int,
    out: Path | str,
    dtype: str | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, Errors]:
    """Write the LoRA of a rank that turns `base` into `tuned` as nearly as it can; the file and what it misses.

    `device` None is the GPU where there is one. `dtype` None is float32. ConfigError before long work.
    """
    tuned, base, out = Path(tuned), Path(base), Path(out)
    check_file(out, "a LoRA")
    dtype = dtype or "float32"
    check_dtype(dtype, "lora", "diffusers")
    check_place(out, overwrite, (tuned, base))
    parts = transformer_at(tuned, SOURCE), transformer_at(base, "--extract")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lora, errors = extract(*parts, rank, device, on_layer, DTYPES[dtype])
    metadata = {"srpo_extracted": json.dumps({"from": tuned.name, "base": base.name, "rank": rank} | errors.record())}
    return write_lora(lora, out, metadata, dtype, overwrite, (tuned, base)), errors


def _is_lora(path: Path) -> bool:
    return path.is_file() and recognise(open_tensors(path, SOURCE)).part == "lora"


def _stream(part: Part) -> Source:
    return lambda meta: part.stream(part.file.outline() if meta else None)


def _kept(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key in KEPT}
