"""The picture of an AlignView: a column per level, for each clean picture a row of both ways, numbers under each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw
from torch import Tensor

from srpo_core.align_view import CLEAN, LOST, AlignView, LevelView, Way, default_range, in_default_range, verdict
from srpo_core.lettering import fitted, font
from srpo_core.preview import to_pil

LONGEST, LEAST_WIDTH = 384, 168
"""Longest side of a picture in the grid, and the width up to which small ones are enlarged by a whole factor."""
GAP, SIDE, HEAD, PROMPT, CAPTION = 8, 152, 78, 26, 42
"""Pixels between cells, of the row labels, of the levels' heads, of a prompt's line and under each picture."""
PAPER, INK, QUIET, RANGE = "#202226", "#f2f2f2", "#a8adb5", "#4aa3ff"
COLOURS = {"clean": "#3fbf8f", "soft": "#e8b04a", "lost": "#e8695c"}
TITLES = {"recovered": ("Recovered", "what training sees"), "one_step": ("One step", "what the model predicts")}
LEGEND = (
    (f"clean: {CLEAN:g} dB and more", "clean"),
    (f"soft: {LOST:g} to {CLEAN:g} dB", "soft"),
    (f"lost: below {LOST:g} dB", "lost"),
)
EXPLAINED = (
    "dB: likeness to the clean picture",
    "detail: its edges that are in place",
    "predicted: share of the model's own",
    "guess in what is recovered",
    "entry: of align.range_start and",
    "align.range_end, 50 steps, shift 3",
)
"""Below the first clean picture."""


def align_grid(view: AlignView) -> Image.Image:
    """The grid as one picture, RGB."""
    return _Grid(view).draw()


@dataclass(frozen=True)
class _Grid:
    view: AlignView

    @cached_property
    def picture(self) -> tuple[int, int]:
        """Width and height of a picture in its cell."""
        height, width = self.view.clean.images.shape[-2:]
        if max(height, width) > LONGEST:
            factor = LONGEST / max(height, width)
        else:
            factor = max(1, min(math.ceil(LEAST_WIDTH / width), LONGEST // max(height, width)))
        return max(1, round(width * factor)), max(1, round(height * factor))

    @cached_property
    def cell(self) -> int:
        """Width of a column: wide enough for numbers under a narrow picture."""
        return max(self.picture[0], LEAST_WIDTH)

    @cached_property
    def row(self) -> int:
        return self.picture[1] + CAPTION + GAP

    @cached_property
    def sheet(self) -> Image.Image:
        columns, pictures = 1 + len(self.view.levels), len(self.view.prompts)
        height = HEAD + pictures * (self.line + 2 * self.row) + GAP
        return Image.new("RGB", (SIDE + columns * (self.cell + GAP) + GAP, height), PAPER)

    @cached_property
    def line(self) -> int:
        """Height of the line above each picture's rows: its prompt, and its number among several."""
        return PROMPT if any(self.view.prompts) or len(self.view.prompts) > 1 else GAP

    @cached_property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.sheet)

    def left(self, column: int) -> int:
        return SIDE + column * (self.cell + GAP)

    def write(self, place: tuple[float, float], text: str, size: int, colour: str = INK) -> None:
        """A line of text."""
        self.pen.text(place, text, fill=colour, font=font(size, text))

    def fit(self, place: tuple[float, float], text: str, width: int, size: int, colour: str = INK) -> None:
        """A line of text, made to fit."""
        self.write(place, *fitted(text, width, size), colour)

    def draw(self) -> Image.Image:
        """Heads, then each picture's rows."""
        self.fit((GAP, 30), f"{self.view.branch} steps", SIDE - 2 * GAP, 17)
        self.fit((self.left(0), 30), "Clean picture", self.cell, 17)
        self.legend(HEAD + self.line + self.row)
        for column, level in enumerate(self.view.levels, start=1):
            self.head(column, level)
        for i, prompt in enumerate(self.view.prompts):
            top = HEAD + i * (self.line + 2 * self.row)
            number = f"picture {i + 1}" if len(self.view.prompts) > 1 else ""
            title = ": ".join(filter(None, (number, " ".join(prompt.split()))))
            width = self.sheet.width - self.left(0) - GAP
            self.write((self.left(0), top + 4), *fitted(title, width, 14, least=14), QUIET)
            self.rows(i, top + self.line)
        return self.sheet

    def head(self, column: int, level: LevelView) -> None:
        """A level, its step and its entry, under a bar if it lies in the published training range."""
        left = self.left(column)
        if in_default_range(level.level):
            after = column < len(self.view.levels) and in_default_range(self.view.levels[column].level)
            self.pen.rectangle((left, 22, left + self.cell + (GAP if after else 0), 25), fill=RANGE)
            if column == 1 or not in_default_range(self.view.levels[column - 2].level):
                start, end = (entry.index for entry in default_range())
                self.fit((left, 5), f"published training range: {start} to {end}", 2 * self.cell, 12, RANGE)
        step = level.step
        self.fit((left, 30), f"level {level.level:g}: entry {level.entry.index}", self.cell, 17)
        told = f"step {step.sigma:.4g} to {step.sigma_next:.4g}, {level.share:.0%} predicted"
        self.fit((left, 54), told, self.cell, 12, QUIET)

    def legend(self, top: int) -> None:
        """What the words and numbers mean, in the empty cell below the first clean picture."""
        height = min(19, self.row // (len(LEGEND) + len(EXPLAINED)))
        for i, (text, colour) in enumerate(
            [*((text, COLOURS[word]) for text, word in LEGEND), *((text, QUIET) for text in EXPLAINED)]
        ):
            self.fit((self.left(0), top + i * height), text, self.cell, min(13, height - 2), colour)

    def rows(self, i: int, top: int) -> None:
        """Picture i: the clean one and its levels' recovered ones, below them the predicted."""
        clean = self.view.clean
        self.paste(clean.images[i], 0, top)
        if clean.reward is not None:
            self.fit((self.left(0), top + self.picture[1] + 8), f"reward {_short(clean.reward[i])}", self.cell, 13)
        for row, (name, titles) in enumerate(TITLES.items()):
            y = top + row * self.row
            for text, offset, size, colour in zip(titles, (-20, 2), (17, 12), (INK, QUIET), strict=True):
                self.fit((GAP, y + self.picture[1] // 2 + offset), text, SIDE - 2 * GAP, size, colour)
            for column, level in enumerate(self.view.levels, start=1):
                self.way(getattr(level, name), i, column, y)

    def way(self, way: Way, i: int, column: int, top: int) -> None:
        """One picture with its verdict and numbers on a strip in the verdict's colour."""
        self.paste(way.images[i], column, top)
        left, below, word = self.left(column), top + self.picture[1], verdict(way.psnr[i])
        self.pen.rectangle((left, below + 2, left + self.cell - 1, below + 5), fill=COLOURS[word])
        self.fit((left, below + 8), f"{word}  {way.psnr[i]:.1f} dB", self.cell, 14, COLOURS[word])
        told = f"detail {max(0.0, way.detail[i]):.0%}"
        if way.reward is not None and self.view.clean.reward is not None:
            change = way.reward[i] - self.view.clean.reward[i]
            told += f", reward {_short(way.reward[i])} ({'+' if change >= 0 else ''}{_short(change)})"
        self.fit((left, below + 25), told, self.cell, 13)

    def paste(self, image: Tensor, column: int, top: int) -> None:
        """A picture in the middle of its column: small ones with their pixels enlarged, large ones made smaller."""
        smaller = image.shape[-1] > self.picture[0]
        how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
        left = self.left(column) + (self.cell - self.picture[0]) // 2
        self.sheet.paste(to_pil(image).resize(self.picture, how), (left, top))


def _short(value: float) -> str:
    value = round(value, 3) + 0.0  # no minus before nothing
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
