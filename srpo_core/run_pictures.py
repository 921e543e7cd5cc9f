"""The fixed prompts of a run's previews before training and now, beside each other: as tensors and as one picture."""

from __future__ import annotations

import bisect
import functools
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.lettering import DARK, Colour, fitted, font, in_figures, strip, text_width
from srpo_core.preview import split_sheet, to_pil

SCORE = "relative"
"""The score that stands on the pictures: what SRPO trains."""
LEAST_SIDE = 96
"""Pixels across a picture, for which there are fewer in a row than were asked for."""
_PAPER, _NOW, _QUIET = (32, 34, 38), (30, 74, 122), (200, 204, 210)
_GAP, _SEAM = 10, 2
_QUALITY = 90
_BROKEN = (OSError, ValueError, SyntaxError, KeyError, TypeError)
"""What a file raises that is no picture, no JSON, or not the one that was expected."""
Size = tuple[int, int]
"""Height and width of a picture in pixels."""


class NoPreview(ConfigError):
    """The run has no preview, or none of the step that was asked for."""


@dataclass(frozen=True)
class Preview:
    """A step's pictures [n, 3, H, W] in [0, 1] of n prompts, and their relative scores where they were scored."""

    step: int
    prompts: list[str]
    images: Tensor
    scores: list[float] | None

    def select(self, rows: list[int]) -> Preview:
        """Some of its prompts."""
        scores = None if self.scores is None else [self.scores[i] for i in rows]
        return Preview(self.step, [self.prompts[i] for i in rows], self.images[rows], scores)


def preview_steps(run_dir: Path) -> list[int]:
    """The steps whose previews are written, in order."""
    try:
        names = set(os.listdir(run_dir / "previews"))
    except OSError:
        return []
    found = (re.fullmatch(r"step-(\d{6,9})\.json", name) for name in names)
    return sorted(int(match[1]) for match in found if match and f"step-{match[1]}.png" in names)


def _sheet(run_dir: Path, step: int) -> Path:
    return run_dir / "previews" / f"step-{step:06d}.png"


def read_preview(run_dir: Path, step: int, size: Size) -> Preview:
    """A step's preview, of pictures of that size. NoPreview if it is missing, or not whole yet."""
    path = _sheet(run_dir, step)
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        prompts = [str(prompt) for prompt in told["prompts"]]
        with Image.open(path) as sheet:
            images = split_sheet(sheet, len(prompts), *size)
        scores = told.get(SCORE)
        scored = isinstance(scores, list) and len(scores) == len(prompts)
        return Preview(step, prompts, images, [float(score) for score in scores] if scored else None)
    except _BROKEN as error:
        raise NoPreview(f"the preview of step {step} can't be read: {error}") from error


def preview_pair(run_dir: Path, size: Size, step: int | None = None) -> tuple[Preview, Preview]:
    """(before, now): the oldest preview and that of `step` (the newest), of the prompts that both have.

    Both are the same where there is one only. `size` is data.height and data.width. NoPreview if there is none.
    """
    steps = preview_steps(run_dir)
    if step is not None and step not in steps:
        raise NoPreview(f"there is no preview of step {step}" + (f"; there are {_told(steps)}" if steps else ""))
    for one in reversed(steps if step is None else [step]):
        try:
            now = read_preview(run_dir, one, size)
        except NoPreview:
            if step is not None:
                raise
            continue  # it is being written
        return _with_oldest(run_dir, size, [other for other in steps if other <= one], now)
    raise NoPreview("there is no preview yet")


def _told(steps: list[int]) -> str:
    return ", ".join(map(str, steps if len(steps) < 12 else [*steps[:5], "...", *steps[-5:]]))


def _with_oldest(run_dir: Path, size: Size, steps: list[int], now: Preview) -> tuple[Preview, Preview]:
    """The oldest preview that has a prompt of `now` at its place, where it had the same noise."""
    for step in steps:
        try:
            before = now if step == now.step else read_preview(run_dir, step, size)
        except NoPreview:
            continue
        rows = [i for i, (a, b) in enumerate(zip(before.prompts, now.prompts, strict=False)) if a == b]
        if rows and before.images.shape[1:] == now.images.shape[1:]:
            return before.select(rows), now.select(rows)
    return now, now


def preview_jpeg(run_dir: Path, size: Size, step: int | None, columns: int, width: int) -> bytes:
    """The picture of before_now, `width` pixels wide, as JPEG; kept while the previews stay as they are."""
    places = ((run_dir / "previews").glob("step-*.*")) if (run_dir / "previews").is_dir() else ()
    stamp = tuple(sorted((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in places))
    return _kept_jpeg(run_dir, stamp, size, step, columns, width)


@functools.lru_cache(maxsize=16)
def _kept_jpeg(
    run_dir: Path, stamp: tuple[object, ...], size: Size, step: int | None, columns: int, width: int
) -> bytes:
    before, now = preview_pair(run_dir, size, step)
    out = io.BytesIO()
    before_now(before, now, columns, width).save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def before_now(before: Preview, now: Preview, columns: int, width: int) -> Image.Image:
    """Pairs of pictures, `columns` of them in a row of `width` pixels: before left, now right, their prompt below.

    A bar above each says which step it is of and how it scores. One preview alone has no right half.
    """
    sides = [before] if now.step == before.step else [before, now]
    columns = max(1, min(columns, len(before.prompts), width // (LEAST_SIDE * len(sides))))
    side = max(1, ((width - _GAP) // columns - _GAP - _SEAM * (len(sides) - 1)) // len(sides))
    size = max(11, min(18, side // 16))
    captions = [wrapped(prompt, side * len(sides) + _SEAM * (len(sides) - 1), size) for prompt in before.prompts]
    lines = max(len(caption) for caption in captions)
    pairs = [_pair(sides, i, side, size, captions[i], lines) for i in range(len(captions))]
    step_x, step_y = pairs[0].width + _GAP, pairs[0].height + _GAP
    canvas = Image.new("RGB", (columns * step_x + _GAP, -(-len(pairs) // columns) * step_y + _GAP), _PAPER)
    for i, pair in enumerate(pairs):
        canvas.paste(pair, (_GAP + i % columns * step_x, _GAP + i // columns * step_y))
    return canvas


def _pair(sides: list[Preview], row: int, width: int, size: int, caption: list[str], lines: int) -> Image.Image:
    """One prompt's pictures, each `width` pixels wide, with their bars and a caption, in letters of `size` pixels."""
    tall, wide = sides[0].images.shape[-2:]
    height, bar, below = max(1, round(tall * width / wide)), size * 2, lines * size * 5 // 4 + size * 2 // 3
    pair = Image.new("RGB", ((width + _SEAM) * len(sides) - _SEAM, bar + height + below), _PAPER)
    for i, (one, told) in enumerate(zip(sides, _scores(sides, row), strict=True)):
        left, label = i * (width + _SEAM), f"step {one.step}" if one.step else "before"
        pair.paste(_bar(width, bar, label, told, _NOW if i else DARK), (left, 0))
        picture = to_pil(one.images[row]).resize((width, height), Image.Resampling.LANCZOS)
        pair.paste(picture, (left, bar))
    draw, face = ImageDraw.Draw(pair), font(size, "".join(caption))
    for i, line in enumerate(caption):
        draw.text((1, bar + height + size // 3 + i * size * 5 // 4), line, font=face, fill=_QUIET)
    return pair


def _bar(width: int, height: int, label: str, score: str, colour: Colour) -> Image.Image:
    """A bar with a label, and at its right the score with its name where there is room for that, or without it."""
    named = f"{SCORE} {score}" if score else ""
    size = height * 5 // 9
    fits = text_width(label, size) + text_width(named, size) + height <= width
    return to_pil(strip(width, height, label, named if fits else score, colour))


def _scores(sides: list[Preview], row: int) -> list[str]:
    """The score of each side as text; empty where a side has none."""
    if any(one.scores is None for one in sides):
        return [""] * len(sides)
    values = [one.scores[row] for one in sides]
    return [f"+{text}" if value > 0 else text for text, value in zip(in_figures(values), values, strict=True)]


def wrapped(text: str, width: int, size: int, most: int = 2) -> list[str]:
    """A text in at most `most` lines of `width` pixels, broken at spaces where there are some; the last may be cut."""
    rest, lines = " ".join(text.split()), []
    while rest and len(lines) < most:
        if len(lines) == most - 1 or text_width(rest, size) <= width:
            return [*lines, fitted(rest, width, size, least=size)[0]]
        fit = bisect.bisect_right(range(1, len(rest) + 1), width, key=lambda count: text_width(rest[:count], size))
        cut = rest.rfind(" ", 0, fit + 1)
        cut = cut if cut > 0 else max(1, fit)
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines
