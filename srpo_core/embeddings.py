"""Prompts' embeddings: made by a text encoder once, and kept on disk where the encoder says who it is.

A cache holds one safetensors file per prompt, named by sha256(fingerprint of the encoder, prompt), with the encoder's
own numbers bit for bit. Runs and processes may share it: a file appears whole, by renaming, and a damaged one counts as
missing. Two processes that encode the same prompt do the work twice and leave one file.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo_core.config import ConfigError, RunConfig
from srpo_core.errors import TrainingError
from srpo_core.files import check_writable, free_bytes
from srpo_core.interfaces import PromptBatch, TextEncoder
from srpo_core.progress import Display
from srpo_core.weights.tensors import WeightsError, open_tensors

BATCH_SIZE = 16
"""Prompts that a text encoder gets at once, unless it names another number as its `batch_size`."""


class EmbeddingCache:
    """The embeddings of one encoder in a folder."""

    def __init__(self, folder: Path | str, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint

    def file(self, prompt: str) -> Path:
        """Where a prompt's embeddings lie, or would."""
        name = hashlib.sha256(f"{self.fingerprint}\0{prompt}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        """A prompt's tensors, without a batch dimension; None if they are missing or their file is damaged."""
        try:
            return load_file(self.file(prompt))
        except (OSError, SafetensorError):
            return None

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of `prompts` that have no whole file, each once, in order. Reads headers only."""
        there = {path.name for folder in self.folder.glob("[0-9a-f][0-9a-f]") for path in _listed(folder)}

        def is_missing(prompt: str) -> bool:
            path = self.file(prompt)
            return path.name not in there or not _whole(path)

        return [prompt for prompt in dict.fromkeys(prompts) if is_missing(prompt)]

    def put(self, batch: PromptBatch) -> None:
        """Keep a batch's embeddings. TrainingError if the disk refuses."""
        for row, prompt in enumerate(batch.prompts):
            path = self.file(prompt)
            beside = path.with_name(f".tmp-{path.stem}-{uuid.uuid4().hex}")
            tensors = {name: tensor[row].detach().cpu().contiguous() for name, tensor in batch.embeds.items()}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, beside, {"prompt": prompt, "encoder": self.fingerprint})
                _place(beside, path)
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"the embeddings {path} can't be written: {error}; data.embeddings names another folder for them"
                ) from error
            finally:
                beside.unlink(missing_ok=True)

    def size(self, prompts: Sequence[str]) -> int:
        """Bytes that the files of `prompts` take, as far as they are there."""
        files = (self.file(prompt) for prompt in dict.fromkeys(prompts))
        return sum(path.stat().st_size for path in files if path.is_file())


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _whole(path: Path) -> bool:
    try:
        open_tensors(path, "data.embeddings")
    except WeightsError:
        return False
    return True


def _place(beside: Path, path: Path) -> None:
    try:
        os.replace(beside, path)
    except PermissionError:  # Windows: another process reads the file that it has put there meanwhile
        if not _whole(path):
            raise


@dataclass(frozen=True)
class StoredPrompts:
    """Prompts whose embeddings are read from a cache when they are selected: a PromptBatch that takes no memory."""

    prompts: tuple[str, ...]
    cache: EmbeddingCache

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts at `indices` with their embeddings, on the CPU. TrainingError if a file was lost meanwhile."""
        rows = []
        for prompt in (self.prompts[index] for index in indices):
            tensors = self.cache.get(prompt)
            if tensors is None:
                raise TrainingError(
                    f"the embeddings of {prompt[:80]!r} were lost or damaged during the run:"
                    f" {self.cache.file(prompt)}; --resume makes them again"
                )
            rows.append(tensors)
        embeds = {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        return PromptBatch(tuple(self.prompts[index] for index in indices), embeds)


def embedding_cache(text_encoder: TextEncoder, config: RunConfig) -> EmbeddingCache | None:
    """The cache of a run's embeddings; None where the encoder has no `fingerprint`. ConfigError for a bad folder."""
    fingerprint = getattr(text_encoder, "fingerprint", None)
    if fingerprint is None:
        return None
    folder = Path(config.data.embeddings or Path(config.output.dir) / "embeddings")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        setting = "data.embeddings" if config.data.embeddings else "output.dir"
        raise ConfigError(f"{setting}: the folder {folder} for prompts' embeddings can't be made: {error}") from error
    return EmbeddingCache(folder, fingerprint)


@torch.no_grad()
def encode(
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    batch_size: int | None = None,
    cache: EmbeddingCache | None = None,
    display: Display | None = None,
) -> PromptBatch | StoredPrompts:
    """All prompts, encoded `batch_size` at a time and held in memory on the CPU, or in the cache where there is one.

    With a cache only what it lacks is encoded, and the text encoder isn't called if that is nothing. `display`, if any,
    counts what is encoded. ConfigError, before the encoder is called, if the cache can't be written to.
    """
    wanted = list(prompts) if cache is None else cache.missing(prompts)
    size = batch_size or getattr(text_encoder, "batch_size", BATCH_SIZE)
    if cache is not None and wanted:
        check_writable(cache.folder, "data.embeddings")  # before an encoder is loaded
    if display is not None and wanted:
        display.phase("encoding prompts", len(wanted))
    parts: list[PromptBatch] = []
    for start in range(0, len(wanted), size):
        part = text_encoder(wanted[start : start + size]).to("cpu")
        if cache is None:
            parts.append(part)
        else:
            cache.put(part)
            if start == 0:
                _check_space(cache, part, len(wanted) - len(part))
        if display is not None:
            display.advance(start + len(part))
    if cache is not None:
        return StoredPrompts(tuple(prompts), cache)
    embeds = {name: torch.cat([part.embeds[name] for part in parts]) for name in parts[0].embeds}
    return PromptBatch(tuple(prompts), embeds)


def _check_space(cache: EmbeddingCache, part: PromptBatch, left: int) -> None:
    """TrainingError if the disk can't hold the prompts that are `left`, judged by those of `part`."""
    each = cache.size(part.prompts) / len(part)
    free = free_bytes(cache.folder)
    if left * each > free:
        raise TrainingError(
            f"the embeddings of {left} more prompts take {left * each / 1e9:.1f} GB, {cache.folder} has"
            f" {free / 1e9:.1f} GB free; data.embeddings names another place (a run by itself encodes only the prompts"
            " that it visits)"
        )
