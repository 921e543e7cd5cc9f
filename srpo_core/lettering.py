"""Text on pictures: plates that are readable on any picture, and strips of labels."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srpo_core.preview import from_pil

Colour = tuple[int, int, int]
DARK, MARKED, INK = (16, 18, 22), (20, 92, 48), (255, 255, 255)
"""Plates, those of marked pictures, and letters: a contrast of 4.9 to 1 at least, by WCAG 2, on any picture."""
PLATE_OPACITY = 0.8
LEAST_SIZE = 8
"""Pixels of the smallest letters that are still read."""
_WIDER_FONTS = (
    "DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "msyh.ttc", "malgun.ttf", "meiryo.ttc", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS, for letters that Pillow's own lacks."""


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Pillow's own font at `size` pixels, or the first of the system's that has every letter of `text`."""
    letters = frozenset(letter for letter in text if letter.isprintable() and not letter.isspace())
    name = _font_with(letters)
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@lru_cache(maxsize=256)
def _font_with(letters: frozenset[str]) -> str | None:
    """The file of the first font that has all `letters`; None for Pillow's own, also where no font has them."""
    if _has(ImageFont.load_default(16), letters):
        return None
    for name in _WIDER_FONTS:
        try:
            found = ImageFont.truetype(name, 16)
        except OSError:
            continue
        if _has(found, letters):
            return name
    return None


def _has(face: ImageFont.FreeTypeFont, letters: frozenset[str]) -> bool:
    """Whether none of the letters comes out as the sign for a missing one."""
    missing = bytes(face.getmask("\U0010ffff"))
    return all(bytes(face.getmask(letter)) != missing for letter in letters)


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes."""
    return int(np.ceil(font(size, text).getlength(text)))


def fitted(text: str, width: int, size: int, least: int | None = None) -> tuple[str, int]:
    """A line and the size of its letters that fit into `width` pixels: down to `least`, then cut off with "...".

    `least` is two thirds of `size` unless it is given, and LEAST_SIZE at least.
    """
    least = max(LEAST_SIZE, size * 2 // 3 if least is None else least)
    while size > least and text_width(text, size) > width:
        size -= 1
    if text_width(text, size) <= width:
        return text, size
    kept = bisect.bisect_right(range(1, len(text)), width, key=lambda count: text_width(f"{text[:count]}...", size))
    return (f"{text[:kept]}..." if kept else ""), size


def letter_size(height: int, width: int) -> int:
    """The size of letters on a picture, in pixels: an eighteenth of its shorter side, at least 10."""
    return max(10, min(height, width) // 18)


def plate(text: str, size: int, most_width: int, colour: Colour = DARK) -> Image.Image:
    """White text on a rounded plate, RGBA, at most `most_width` pixels wide; letters shrink to fit."""
    pad = max(2, size // 4)
    line, size = fitted(text, max(1, most_width - 2 * pad), size)
    face = font(size, line)
    ascent, descent = face.getmetrics()
    shape = (min(most_width, text_width(line, size) + 2 * pad), ascent + descent + pad)
    opacity = round(255 * PLATE_OPACITY)
    mask = Image.new("L", (shape[0] * 4, shape[1] * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), pad * 4, fill=opacity)
    result = Image.new("RGBA", shape, (*colour, 0))
    result.putalpha(mask.resize(shape, Image.Resampling.BOX))
    letters = Image.new("RGBA", shape, (*INK, 0))
    ImageDraw.Draw(letters).text((pad, pad // 2), line, font=face, fill=(*INK, 255))
    return Image.alpha_composite(result, letters)


def with_badges(images: Tensor, texts: Sequence[str], marked: Collection[int] = ()) -> Tensor:
    """Copies of images [B, 3, H, W] in [0, 1] with a line of text on a plate at the lower left, green if `marked`.

    Pixels beside the plate keep their values bit for bit.
    """
    result = images.clone()
    height, width = images.shape[-2:]
    size = letter_size(height, width)
    gap = size // 3
    for i, text in enumerate(texts):
        drawn = plate(text, size, width - 2 * gap, MARKED if i in marked else DARK)
        pixels = torch.from_numpy(np.array(drawn)).permute(2, 0, 1).to(images) / 255
        top = max(0, height - gap - drawn.height)
        pixels = pixels[:, : height - top]
        region = result[i, :, top : top + pixels.shape[1], gap : gap + drawn.width]
        region.copy_(region * (1 - pixels[3]) + pixels[:3] * pixels[3])
    return result


def strip(width: int, height: int, text: str, right: str = "", colour: Colour = DARK) -> Tensor:
    """A bar [3, height, width] in [0, 1] with a line of text at its left, and one at its right that is never cut."""
    picture = Image.new("RGB", (width, height), colour)
    draw, pad, size = ImageDraw.Draw(picture), max(2, height // 4), max(LEAST_SIZE, height * 5 // 9)
    right, right_size = fitted(right, width - 2 * pad, size)
    draw.text((width - pad, height / 2), right, font=font(right_size, right), fill=INK, anchor="rm")
    left_over = width - 2 * pad - (text_width(right, right_size) + 2 * pad if right else 0)
    line, size = fitted(text, max(1, left_over), size)
    draw.text((pad, height / 2), line, font=font(size, line), fill=INK, anchor="lm")
    return from_pil(picture)


def with_scores(images: Tensor, scores: Sequence[float], ends: Sequence[str] = (), sign: bool = False) -> Tensor:
    """Copies of images [B, 3, H, W] in [0, 1] with their scores on them, the highest one green if they differ.

    `ends` are texts behind the scores; `sign` puts a + before positive ones.
    """
    texts = [f"+{text}" if sign and score > 0 else text for text, score in zip(in_figures(scores), scores, strict=True)]
    if ends:
        texts = [f"{text}{end}" for text, end in zip(texts, ends, strict=True)]
    highest = max(scores)
    marked = {i for i, score in enumerate(scores) if score == highest} if min(scores) < highest else ()
    return with_badges(images, texts, marked)


def in_figures(values: Sequence[float]) -> list[str]:
    """Numbers with equally many decimals, so that the largest has four figures: 0.2873, 21.43, -1.250."""
    largest = max((abs(value) for value in values), default=0.0)
    decimals = max(0, 4 - len(f"{largest:.0f}")) if largest >= 1 else 4
    return [f"{value:.{decimals}f}" for value in values]
