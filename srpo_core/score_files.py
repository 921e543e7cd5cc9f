"""The picture files that are scored: found, their prompts read, checked before a model loads, and opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.graph_prompt import is_graph
from srpo_core.photos import as_rgb
from srpo_core.picture_files import SHEET, prompt_of
from srpo_core.prompts import read_prompts

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class PromptedPicture:
    """A picture file and the prompt that it is scored for."""

    path: Path
    prompt: str


def find_pictures(
    paths: Sequence[Path], prompts_file: str | None = None, column: str | None = None
) -> list[PromptedPicture]:
    """The picture files in `paths` (folders are searched, not their subfolders), each with its prompt.

    Prompts are those of `prompts_file` (of its `column`, if it is a table), for the files in order; else the text file
    beside a picture, else what the picture itself says. ConfigError names the first file that is missing, that has no
    prompt or that is no whole picture.
    """
    files = _files(paths)
    if prompts_file is None:
        found = [PromptedPicture(file, _own_prompt(file)) for file in files]
    else:
        prompts = read_prompts(prompts_file, "--prompts", column=column)
        if len(prompts) != len(files):
            raise ConfigError(f"--prompts {prompts_file} holds {len(prompts)} prompts for {len(files)} pictures")
        found = [PromptedPicture(file, prompt) for file, prompt in zip(files, prompts, strict=True)]
    for file in files:
        _check(file)
    return found


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if _is_picture(file))
            if not inside:
                raise ConfigError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    return files


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.name != SHEET


def _own_prompt(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            prompt = " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{beside} can't be read as UTF-8 text: {error}") from error
        if not prompt:
            raise ConfigError(f"{beside} is empty; it must hold the prompt of {path.name}")
        return prompt
    with _opened(path) as image:
        prompt, graph = prompt_of(image.info), is_graph(str(image.info.get("prompt", "")))
    if not prompt:
        reason = "holds a ComfyUI graph that tells of no one prompt" if graph else "has no prompt"
        raise ConfigError(f"{path} {reason}: write one to {beside.name} beside it, or give --prompts FILE")
    return prompt


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except _BROKEN as error:
        raise ConfigError(f"{path} is no readable picture: {error}") from error


def _check(path: Path) -> None:
    """ConfigError unless the picture is whole, as far as that shows without decoding it in full."""
    with _opened(path) as image:
        try:
            if image.format == "PNG":
                image.verify()  # every chunk's checksum
            else:
                image.draft("RGB", (image.width // 8 or 1, image.height // 8 or 1))  # an eighth of a JPEG's work
                image.load()
        except _BROKEN as error:
            raise ConfigError(f"{path} is no readable picture: {error}") from error


def load_image(path: Path) -> Tensor:
    """A picture file as [3, H, W] in [0, 1], upright, its colours as training reads photos.

    ConfigError if it can't be read to its end.
    """
    with _opened(path) as image:
        try:
            pixels = np.array(as_rgb(ImageOps.exif_transpose(image)))
        except _BROKEN as error:
            raise ConfigError(f"{path} is no readable picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
