"""Photos with captions, in place of rollouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def find_photos(folder: str) -> list[tuple[Path, str]]:
    """(image, caption) pairs of a folder, by name; a caption is the text file of the image's name.

    ConfigError if there is no such folder, no image in it, or an image without a caption.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"data.photos={folder!r}: no such folder")
    images = sorted(
        path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not images:
        raise ConfigError(f"data.photos={folder!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    captions = [_caption(path) for path in images]
    missing = [path.name for path, caption in zip(images, captions, strict=True) if not caption]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(
            f"data.photos={folder!r}: {len(missing)} of {len(images)} images have no caption ({names});"
            f" write it to a text file of the same name, such as {Path(missing[0]).stem}.txt"
        )
    return list(zip(images, captions, strict=True))


def _caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.photos: the caption {path} can't be read as UTF-8 text: {error}") from error


def load_photo(path: Path, height: int, width: int) -> Tensor:
    """[3, height, width] in [0, 1]: upright, scaled until it just covers the size, cropped around its centre."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainingError(
            f"the photo {path} can't be read: {error}; repair it or take it out of the folder"
        ) from error
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def load_photos(paths: list[Path], height: int, width: int) -> Tensor:
    """[B, 3, height, width] in [0, 1]."""
    return torch.stack([load_photo(path, height, width) for path in paths])
