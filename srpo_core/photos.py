"""Photos with captions: found, checked by their headers, and read as the model wants them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from srpo_core.buckets import Size
from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.preview import from_pil

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv")
"""Files with a caption per row, as Hugging Face's imagefolder has them; file_name is relative to their own folder."""
CAPTION_COLUMNS = ("prompt", "caption", "text")
MOST_ENLARGED = 2.0
"""A photo that must grow more than this is refused: its blur would be learned."""
_TURNED = {5, 6, 7, 8}
"""EXIF orientations that swap height and width."""


@dataclass(frozen=True)
class Photo:
    """An image file with its caption and its upright size in pixels."""

    path: Path
    caption: str
    height: int
    width: int

    def enlarged(self, size: Size) -> float:
        """How many times larger it becomes until it covers (height, width); below 1 it shrinks."""
        return max(size[0] / self.height, size[1] / self.width)

    def kept(self, size: Size) -> float:
        """The part of the picture that is left after cropping to the shape of (height, width)."""
        ratio = self.width * size[0] / (self.height * size[1])
        return min(ratio, 1 / ratio)


def find_photos(folder: str, setting: str = "data.photos", column: str | None = None) -> list[Photo]:
    """The images of a folder and the folders in it, by name, hidden ones left out; their headers are read.

    A caption comes from a table (`TABLES`; `column`, or else the first of `CAPTION_COLUMNS` that is there) or, for
    images that no table names, from the text file of the image's name. ConfigError names the folder or file, the reason
    and the way out: no images, one without a caption or unreadable, a table that names what isn't there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{setting}={folder!r}: no such folder")
    files = _files(root)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise ConfigError(f"{setting}={folder!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    captions = _table_captions([path for path in files if path.name in TABLES], setting, column)
    captions |= {path: _caption_beside(path, setting) for path in images if path not in captions}
    missing = [path for path in images if not captions[path]]
    if missing:
        names = ", ".join(str(path.relative_to(root)) for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(
            f"{setting}={folder!r}: {len(missing)} of {len(images)} images have no caption ({names}); write it to a"
            f" text file of the same name, such as {missing[0].stem}.txt, or to a row of metadata.jsonl"
            ' ({"file_name": ..., "text": ...}), or take the image out'
        )
    return [Photo(path, captions[path], *_upright_size(path, setting)) for path in images]


def _files(root: Path) -> list[Path]:
    found = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [root / path for path in sorted(visible, key=Path.as_posix)]


def _caption_beside(image: Path, setting: str) -> str:
    path = image.with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: the caption {path} can't be read as UTF-8 text: {error}") from error


def _table_captions(tables: Sequence[Path], setting: str, column: str | None) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for table in tables:
        for number, row in _rows(table, setting):
            where = f"{setting}: {table}, row {number}"
            name = row.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise ConfigError(f"{where} has no file_name; name the image, relative to the table's folder")
            image = table.parent / name.strip()
            if not _is_file(image) or image.suffix.lower() not in SUFFIXES:
                raise ConfigError(f"{where} names {name!r}, which is no image there; correct the name or drop the row")
            if image in captions:
                raise ConfigError(f"{where} gives a second caption for {name!r}; keep one")
            captions[image] = _caption_in(row, where, column)
    return captions


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _caption_in(row: dict[str, object], where: str, column: str | None) -> str:
    """The row's caption, perhaps empty."""
    name = column if column is not None else next((name for name in CAPTION_COLUMNS if name in row), None)
    if name is None or name not in row:
        wanted = repr(column) if column is not None else "prompt, caption or text"
        raise ConfigError(
            f"{where} has no column {wanted} (it has {', '.join(map(str, row))}); data.prompt_column names the one that"
            " holds captions"
        )
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: {name}={value!r} is no text")
    return " ".join((value or "").split())


def _rows(table: Path, setting: str) -> Iterator[tuple[int, dict[str, object]]]:
    """(number from 1, row) of a CSV or JSON-lines table."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text)), 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                yield number, row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{setting}: the captions' table {table} can't be read: {error}") from error


def _upright_size(path: Path, setting: str) -> Size:
    """(height, width) from the file's header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ConfigError(f"{setting}: {path} can't be read: {error}; repair it or take it out") from error


def load_photo(path: Path, height: int, width: int) -> Tensor:
    """[3, height, width] in [0, 1]: upright, scaled until it just covers the size, cropped around its centre.

    Colours are sRGB; what is transparent becomes white. TrainingError if the file can't be decoded.
    """
    try:
        with Image.open(path) as opened:
            image = as_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise TrainingError(
            f"the photo {path} can't be read: {error}; repair it or take it out of the folder"
        ) from error
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return from_pil(fitted)


def check_whole(photos: Sequence[Photo], setting: str) -> None:
    """Decode every photo to its end. ConfigError names those for which that fails."""

    def complaint(photo: Photo) -> str | None:
        try:
            load_photo(photo.path, 8, 8)
        except TrainingError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(4) as threads:
        broken = [told for told in threads.map(complaint, photos) if told is not None]
    if broken:
        more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ConfigError(f"{setting}: {len(broken)} can't be used:\n  " + "\n  ".join(broken[:5]) + more)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: 16-bit grey is scaled, alpha laid over white, an embedded profile turned to sRGB."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _to_srgb(image, profile) if profile and image.mode in ("RGB", "CMYK") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a profile that can't be used is as good as none
        return image.convert("RGB")


def load_photos(paths: Sequence[Path], height: int, width: int) -> Tensor:
    """[B, 3, height, width] in [0, 1]."""
    return torch.stack([load_photo(path, height, width) for path in paths])
