"""Names of runs, and the folders and files that go by them: below ComfyUI's output and models folders, nowhere else."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import folder_paths

from srpo_core.config import ConfigError

MOST_BYTES = 120
"""Of a name, so that a step and an ending still fit behind it on every disk."""
_SIGNS = frozenset(" -_.,+()'")
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows, whatever their ending."""
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class RunPlace:
    """Where a run's things lie."""

    name: str

    @property
    def folder(self) -> Path:
        """Its own folder."""
        return runs_folder() / self.name

    def result(self, full: bool = False) -> Path:
        """Where its weights go: a LoRA into models/loras, with `full` a model into models/diffusion_models."""
        return results_folder(full) / f"{self.name}{SUFFIX}"


def run_place(name: str, if_there: Literal["go on", "new run"] = "go on") -> RunPlace:
    """The place of a run of this name; "new run" takes name-2, name-3, ... where there is one.

    Nothing is made. ConfigError for what is no name.
    """
    plain = check_name(name)
    place = RunPlace(free_name(plain) if if_there == "new run" else plain)
    if place.folder.is_symlink():
        raise ConfigError(f"name={name!r}: {place.folder} is a link to another place, and is not followed")
    return place


def check_name(name: str) -> str:
    """The name of a run as its folder and its result have it, without spaces around it. ConfigError says what is wrong.

    Names that one system would take for something else are refused on all of them.
    """
    plain = unicodedata.normalize("NFC", name).strip()
    problem = _problem(plain)
    if problem:
        raise ConfigError(f"name={name[:80]!r}: {problem}; use letters, digits, spaces, - and _, such as my-look")
    return plain


def _problem(name: str) -> str:
    if not name:
        return "a training needs a name"
    odd = [letter for letter in name if not letter.isalnum() and letter not in _SIGNS]
    if odd:
        return f"{odd[0]!r} can't be in a name"
    if not name[0].isalnum():
        return "a name begins with a letter or a digit"
    if name.endswith("."):
        return "a name doesn't end with a dot"
    if _DEVICES.fullmatch(name):
        return "it is a device on Windows"
    if len(name.encode()) > MOST_BYTES:
        return f"it is too long: {MOST_BYTES} plain letters are the most, of other alphabets half or a third as many"
    return ""


def runs_folder() -> Path:
    """Where runs lie: a folder of ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()).absolute() / "srpo"


def results_folder(full: bool = False) -> Path:
    """ComfyUI's first folder of LoRAs, with `full` of diffusion models (not the older one, called unet)."""
    kind = "diffusion_models" if full else "loras"
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    return next((folder for folder in folders if folder.name == kind), folders[0]).absolute()


def free_name(name: str) -> str:
    """The name, or the first of name-2, name-3, ... that no run and no result has."""
    number, free = 1, name
    while _is_taken(RunPlace(free)):
        number += 1
        free = f"{name}-{number}"
    return free


def _is_taken(place: RunPlace) -> bool:
    return any(path.exists() for path in (place.folder, place.result(), place.result(full=True)))
