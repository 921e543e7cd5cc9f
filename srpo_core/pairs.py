"""Pictures of two models beside each other, with their names, their scores, and which of the two wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srpo_core.lettering import DARK, MARKED, Colour, in_figures, letter_size, strip

LEAST_SIDE = 256
"""Pixels that a pair's pictures are enlarged to, by a whole factor, so that their labels can be read."""
_PAPER, _DIM = (40, 42, 46), (70, 74, 80)


def side_by_side(
    images_a: Tensor,
    images_b: Tensor,
    labels: tuple[str, str] = ("A", "B"),
    scores: tuple[Sequence[float], Sequence[float]] | None = None,
    notes: Sequence[str] | None = None,
) -> Tensor:
    """Pairs of images, [n, 3, H, W] in [0, 1] twice -> [n, 3, H', W']: A left, B right, its label in a bar above each.

    With `scores` the bars hold them too; the higher one's bar and frame are green and it says "wins". `notes` stand in
    a bar below each pair. Small pictures are enlarged by a whole factor, others keep every pixel.
    """
    if images_a.shape != images_b.shape:
        raise ValueError(f"pairs need pictures of one size, got {list(images_a.shape)} and {list(images_b.shape)}")
    images_a, images_b = (_enlarged(images.float().cpu().clamp(0, 1)) for images in (images_a, images_b))
    count = len(images_a)
    told = _scores_told(scores) if scores is not None else [("", "")] * count
    pairs = [
        _pair((images_a[i], images_b[i]), labels, told[i], _winner(scores, i), notes[i] if notes else "")
        for i in range(count)
    ]
    return torch.stack(pairs)


def _enlarged(images: Tensor) -> Tensor:
    factor = max(1, math.ceil(LEAST_SIDE / max(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _winner(scores: tuple[Sequence[float], Sequence[float]] | None, i: int) -> int | None:
    """0 or 1, the side with the higher score of pair i; None where there is none."""
    if scores is None or scores[0][i] == scores[1][i]:
        return None
    return int(scores[1][i] > scores[0][i])


def _scores_told(scores: tuple[Sequence[float], Sequence[float]]) -> list[tuple[str, str]]:
    """What the two bars of every pair say of its scores."""
    count, figures = len(scores[0]), in_figures([*scores[0], *scores[1]])
    ends = {None: ("equal", "equal"), 0: ("wins", ""), 1: ("", "wins")}
    return [
        tuple(f"{end}  {figures[i + side * count]}".strip() for side, end in enumerate(ends[_winner(scores, i)]))
        for i in range(count)
    ]


def _pair(
    images: tuple[Tensor, Tensor], labels: tuple[str, str], told: tuple[str, str], winner: int | None, note: str
) -> Tensor:
    """One pair [3, H', W'] of two pictures [3, H, W]."""
    height, width = images[0].shape[-2:]
    bar, frame = letter_size(height, width) * 9 // 4, max(3, min(height, width) // 128)
    low = bar if note else 0
    canvas = _flat(_PAPER).repeat(1, bar + height + 2 * frame + low, 2 * (width + 2 * frame) + frame)
    for side, image in enumerate(images):
        left, wins = side * (width + 3 * frame), side == winner
        block = canvas[:, : bar + height + 2 * frame, left : left + width + 2 * frame]
        block[:] = _flat(MARKED if wins else _DIM)
        block[:, :bar] = strip(block.shape[-1], bar, labels[side], told[side], MARKED if wins else DARK)
        block[:, bar + frame : bar + frame + height, frame : frame + width] = image
    if note:
        canvas[:, -low:] = strip(canvas.shape[-1], low, note, colour=_PAPER)
    return canvas


def _flat(colour: Colour) -> Tensor:
    """A colour as [3, 1, 1] in [0, 1]."""
    return torch.tensor(colour).view(3, 1, 1) / 255
