"""What prompts and photos a user gave, in a few words."""

from __future__ import annotations

from collections.abc import Sequence

from srpo_core.config import ConfigError
from srpo_core.photos import find_photos
from srpo_core.prompt_files import read_prompt_files


def summary_of_text(text: str, setting: str) -> str:
    """ "12 prompts", of a text with one a line. ConfigError, with the setting's name, if there is none."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{setting} is empty: write a prompt on each line")
    return _counted(prompts)


def summary_of_file(path: str, setting: str, column: str | None = None) -> str:
    """The same of a file or folder, see read_prompt_files. ConfigError names file, line and reason."""
    return _counted(read_prompt_files(path, setting, column))


def summary_of_photos(folder: str, setting: str, column: str | None = None) -> str:
    """ "40 photos with captions, 512 x 512 to 4032 x 3024 pixels". ConfigError as of find_photos."""
    photos = sorted(find_photos(folder, setting, column), key=lambda photo: photo.width * photo.height)
    sizes = list(dict.fromkeys(f"{photo.width} x {photo.height}" for photo in (photos[0], photos[-1])))
    return f"{len(photos)} photo{'s' * (len(photos) > 1)} with captions, {' to '.join(sizes)} pixels"


def _counted(prompts: Sequence[str]) -> str:
    different = len(set(prompts))
    twice = f" ({different} different ones)" if different < len(prompts) else ""
    return f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}{twice}"
