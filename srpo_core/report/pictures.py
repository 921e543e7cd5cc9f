"""Pictures inside a page: data URIs under a budget of bytes, so that a page of any run can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_SIDES = (512, 384, 256, 192, 128, 96, 64)


def embed(paths: Sequence[Path], budget: int, max_side: int = _SIDES[0]) -> list[str | None]:
    """A data URI for each picture, None for one that can't be read. All of them together take at most `budget` bytes.

    Small pictures go in as they are while they fit; else all become JPEG, of `max_side` pixels or as few as it takes.
    """
    budget = budget * 3 // 4  # base64
    sides = [max_side, *(side for side in _SIDES if side < max_side)]
    uris: list[str | None] = []
    for encode in (_as_it_is, *(lambda path, side=side: _jpeg(path, side) for side in sides)):
        found = [encode(path) for path in paths]
        if encode is _as_it_is and None in found:
            continue
        if sum(len(data) for _, data in filter(None, found)) <= budget:
            return [_uri(*item) if item else None for item in found]
        uris = [None] * len(paths)
    return uris


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _as_it_is(path: Path) -> tuple[str, bytes] | None:
    """A PNG of at most 256 pixels; None for any other file."""
    try:
        with Image.open(path) as image:
            if image.format != "PNG" or max(image.size) > 256:
                return None
        return "png", path.read_bytes()
    except (OSError, ValueError):
        return None


def _jpeg(path: Path, side: int) -> tuple[str, bytes] | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
    except (OSError, ValueError):
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=88, optimize=True)
    return "jpeg", out.getvalue()
