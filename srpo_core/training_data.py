"""What each micro-batch of a run trains on: prompts to roll out, or photos of one size with their captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from srpo_core.buckets import Size, batch_order, bucket_sizes, nearest_size, photo_turn
from srpo_core.config import ConfigError, DataConfig
from srpo_core.interfaces import PromptBatch
from srpo_core.photos import MOST_ENLARGED, Photo
from srpo_core.prompts import PromptSequence


@dataclass(frozen=True)
class Batch:
    """B prompts, their photos (none where they are rolled out), and the images' size in pixels."""

    prompts: PromptBatch
    photos: tuple[Path, ...]
    height: int
    width: int


@dataclass(frozen=True)
class PhotoBatches:
    """Photos in the order in which a run visits them, a batch a row: their rows of captions start at batch * B."""

    captions: PromptSequence
    batches: Sequence[tuple[Size, Sequence[Path]]]


@dataclass(frozen=True)
class TrainingData:
    """The run's prompts, its photos, or both. Everything is a function of the seed and the micro-batch's number."""

    seed: int
    size: Size
    batch_size: int
    rollouts: PromptSequence | None = None
    photos: PhotoBatches | None = None
    photo_share: float = 1.0

    def on_photos(self, micro: int) -> bool:
        """Whether the run's micro-batch 0, 1, ... trains on photos."""
        return self._turn(micro)[0]

    def _turn(self, micro: int) -> tuple[bool, int]:
        return (False, micro) if self.photos is None else photo_turn(self.seed, self.photo_share, micro)

    def at(self, micro: int, rank: int, ranks: int) -> Batch:
        """The batch of one rank in the run's micro-batch 0, 1, ...; all ranks have photos, or all prompts."""
        on_photos, before = self._turn(micro)
        batch = before * ranks + rank
        if on_photos:
            size, paths = self.photos.batches[batch]
            prompts = self.photos.captions.at(batch * self.batch_size, self.batch_size)
            return Batch(prompts, tuple(paths), *size)
        return Batch(self.rollouts.at(batch * self.batch_size, self.batch_size), (), *self.size)


def needs_prompts(data: DataConfig) -> bool:
    """Whether a run rolls out prompts at all."""
    return data.photos is None or data.photo_share < 1


def sources(data: DataConfig, seed: int, micros: int) -> tuple[int, int]:
    """How many of the first `micros` micro-batches train on photos, and how many roll out prompts."""
    if data.photos is None:
        return 0, micros
    on_photos, before = photo_turn(seed, data.photo_share, micros)  # the counts before the one that isn't there
    return (before, micros - before) if on_photos else (micros - before, before)


def photo_sizes(data: DataConfig, photos: Sequence[Photo]) -> list[Size]:
    """The size at which each photo is trained on. ConfigError names photos that are too small for theirs."""
    sizes = bucket_sizes(data.height, data.width, data.bucket_step)
    if not sizes:
        raise ConfigError(
            f"data.bucket_step={data.bucket_step}: no multiple of it fits into {data.width} x {data.height} pixels; the"
            " model's own step or a few of them, such as 64, suit"
        )
    chosen = [nearest_size(photo.height, photo.width, sizes) for photo in photos]
    growth = [photo.enlarged(size) for photo, size in zip(photos, chosen, strict=True)]
    small = [photo for photo, factor in zip(photos, growth, strict=True) if factor > MOST_ENLARGED]
    if small:
        names = ", ".join(f"{photo.path.name} is {photo.width} x {photo.height}" for photo in small[:3])
        raise ConfigError(
            f"data.photos={data.photos!r}: {len(small)} of {len(photos)} images are too small for {data.width} x"
            f" {data.height}: they would be enlarged more than {MOST_ENLARGED:g} times ({names}"
            f"{', ...' if len(small) > 3 else ''}); take them out, find larger copies, or lower data.height and"
            " data.width"
        )
    return chosen


def photo_notes(photos: Sequence[Photo], sizes: Sequence[Size]) -> list[str]:
    """Lines about the photos for the user: their sizes, what is enlarged, what cropping leaves; none without photos."""
    if not photos:
        return []
    kept = [photo.kept(size) for photo, size in zip(photos, sizes, strict=True)]
    growth = [photo.enlarged(size) for photo, size in zip(photos, sizes, strict=True)]
    count = len(set(sizes))
    notes = [
        f"{len(photos)} photos in {count} {'size' if count == 1 else 'sizes'};"
        f" cropping leaves {sum(kept) / len(kept):.0%} of a picture on average, {min(kept):.0%} at least"
    ]
    if enlarged := sum(factor > 1 for factor in growth):
        notes.append(
            f"warning: photos smaller than they are trained at are enlarged: {enlarged} of {len(photos)}, up to"
            f" {max(growth):.2f} times; a lower data.height and data.width would keep them sharp"
        )
    if min(kept) < 0.5 and count == 1:
        notes.append("warning: some photos lose more than half of the picture; data.bucket_step=64 keeps their shapes")
    return notes


def photo_batches(
    photos: Sequence[Photo],
    sizes: Sequence[Size],
    batch_size: int,
    seed: int,
    count: int,
    encode: Callable[[Sequence[str], Sequence[int]], PromptSequence],
) -> PhotoBatches:
    """The first `count` batches; `encode(captions, order)` is the sequence of the captions in that order."""
    batches = batch_order(sizes, batch_size, seed, count)
    order = [index for _, row in batches for index in row]
    captions = encode([photo.caption for photo in photos], order)
    return PhotoBatches(captions, [(size, [photos[index].path for index in row]) for size, row in batches])
