"""The base of a training by the names of ComfyUI's files: transformer, text encoders, VAE, and the recipe that fits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import comfy
import comfy.model_management as management
import folder_paths

from srpo_core import places
from srpo_core.catalogue import CATALOGUE, Entry
from srpo_core.config import ConfigError
from srpo_core.description import load_run, preset_names
from srpo_core.weights.recognise import recognise
from srpo_core.weights.tensors import open_tensors

from .loaders import BUILT_IN, file_names, find_file
from .reward_files import download_command, folders

AUTO = "auto"
MINIATURE = "miniature"
"""The built-in model's family and recipe."""
CHECKPOINTS = "checkpoints/"
"""Before the names of files that hold the text encoders and the VAE too."""
BASES = "diffusion_models"
PARTS = {
    "clip_l": ("clip", "text_encoders", ("clip-l",), ("clip_l",)),
    "t5xxl": ("t5", "text_encoders", ("t5", "t5-fp8"), ("t5xxl", "t5-v1_1-xxl")),
    "vae": ("autoencoder", "vae", ("ae",), ("ae.", "ae_", "flux_vae", "flux-vae", "flux_ae", "flux.1-ae")),
}
"""A widget's field of a run's model, its folder, what the catalogue calls the files that auto looks for, and how other
files of the kind are called."""
LARGE_CARD = 40 * 2**30
"""Bytes of a card on which FLUX.1-dev is trained without 8-bit weights."""
COMFYUI = Path(next(iter(comfy.__path__))).parent


class Missing(ConfigError):
    """A file that isn't there, and which of the catalogue's would do."""

    def __init__(self, message: str, entry: str) -> None:
        file = CATALOGUE[entry].files[0]
        into = str(file.place).rpartition("/")[0]
        super().__init__(f"{message}; it is in https://huggingface.co/{file.repository}, and goes into models/{into}")
        self.entry = entry


class Complaints:
    """ConfigErrors, gathered so that a user reads of all of them at once; they are raised as one at its end."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._missing: list[str] = []

    def __enter__(self) -> Complaints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._found:
            return
        lines = [f"{len(self._found)} things to put right:"] if len(self._found) > 1 else []
        lines += [f"  {text}" if lines else text for text in self._found]
        if self._missing:
            lines.append(
                f"This gets {'all of them' if self._missing[1:] else 'it'}: {download_command(*self._missing)}"
            )
        raise ConfigError("\n".join(lines))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the context a ConfigError ends what is done there, and is kept."""
        try:
            yield
        except ConfigError as error:
            self._found.append(str(error))
            if isinstance(error, Missing):
                self._missing.append(error.entry)


def base_choices() -> list[str]:
    """What SRPO Train can train: the miniature, files of diffusion_models, and whole checkpoints."""
    whole = (f"{CHECKPOINTS}{name}" for name in file_names("checkpoints"))
    return [BUILT_IN, *file_names(BASES), *whole]


def part_choices(widget: str) -> list[str]:
    """auto, and the files of a part's folder."""
    return [AUTO, *file_names(PARTS[widget][1])]


@contextlib.contextmanager
def comfyui_known() -> Iterator[None]:
    """Inside the context the engine finds ComfyUI's folders and tokenizers as this ComfyUI has them."""
    with places.folders_from(folders, COMFYUI):
        yield


def environment() -> dict[str, str]:
    """What a process that trains needs in its environment to find ComfyUI's folders and tokenizers too."""
    return {"COMFYUI_PATH": os.environ.get("COMFYUI_PATH") or str(COMFYUI)}


def base_file(base: str) -> Path | None:
    """The file of a base; None for the miniature. ConfigError if it isn't there."""
    if base == BUILT_IN:
        return None
    kind, name = ("checkpoints", base[len(CHECKPOINTS) :]) if base.startswith(CHECKPOINTS) else (BASES, base)
    return _named(kind, name, "base")


def check_base(base: str) -> None:
    """ConfigError if a base isn't there, with what else of its usual files isn't."""
    try:
        base_file(base)
    except ConfigError:
        with Complaints() as complaints, comfyui_known():
            model_settings({"base": base, **dict.fromkeys(PARTS, AUTO)}, complaints)


def model_settings(given: Mapping[str, str], complaints: Complaints) -> dict[str, Any]:
    """The section `model` of a run: family and files. What isn't there becomes a complaint, named by its widget."""
    if given["base"] == BUILT_IN:
        return {"family": MINIATURE}
    found: dict[str, Any] = {"family": "flux"}
    is_whole = given["base"].startswith(CHECKPOINTS)
    inside = {field for field, *_ in PARTS.values()} if is_whole else set()
    with complaints.noted():
        path = base_file(given["base"])
        inside &= set(recognise(open_tensors(path, "base")).parts) if is_whole else set()
        found["path" if inside else "transformer"] = str(path)
    for widget, (field, kind, names, beginnings) in PARTS.items():
        choice = given[widget]
        if choice == AUTO and field in inside:
            continue
        with complaints.noted():
            is_auto = choice == AUTO
            found[field] = str(_usual(widget, kind, names, beginnings) if is_auto else _named(kind, choice, widget))
    tokenizers = places.find("tokenizers")
    return found | ({"tokenizers": str(tokenizers)} if tokenizers is not None else {})


def _named(kind: str, name: str, widget: str) -> Path:
    """A file by the name that its list shows. ConfigError if it isn't there, with the way to get one that is known."""
    try:
        return find_file(kind, name, widget)
    except ConfigError as error:
        for entry in CATALOGUE.values():
            if name.rpartition("/")[2] == entry.files[0].path.rpartition("/")[2] and _goes_into(entry, kind):
                raise Missing(f"{widget}={name!r}: there is no such file in {_looked_in(kind)}", entry.name) from error
        raise


def _usual(widget: str, kind: str, names: tuple[str, ...], beginnings: tuple[str, ...]) -> Path:
    """What auto stands for: a file of the catalogue, or one that is called so. ConfigError with the way to get it."""
    for name in names:
        if (path := places.find(name)) is not None:
            return path
    for name in file_names(kind):
        file = PurePosixPath(name.replace("\\", "/")).name.lower()
        if file.startswith(beginnings) and file.endswith((".safetensors", ".sft")):
            return find_file(kind, name, widget)
    file = PurePosixPath(CATALOGUE[names[0]].files[0].path).name
    raise Missing(f"{widget}={AUTO!r}: there is no {file} in {_looked_in(kind)}", names[0])


def _goes_into(entry: Entry, kind: str) -> bool:
    return str(entry.files[0].place).startswith(f"{kind}/")


def _looked_in(kind: str) -> str:
    return " or ".join(folder_paths.get_folder_paths(kind))


def recipe_of(recipe: str, base: str) -> str:
    """The preset of a choice; auto goes by the base and the card's memory. ConfigError for one of another family."""
    if recipe != AUTO and recipe not in preset_names():
        raise ConfigError(f"recipe={recipe!r}: there are {', '.join([AUTO, *preset_names()])}")
    if recipe == AUTO:
        if base == BUILT_IN:
            return MINIATURE
        device = management.get_torch_device()
        large = device.type == "cuda" and management.get_total_memory(device) >= LARGE_CARD
        return "flux-dev-lora" if large else "flux-dev-lora-24gb"
    family = load_run(recipe).model.family
    if (family == MINIATURE) != (base == BUILT_IN):
        raise ConfigError(f"recipe={recipe!r} is for the family {family}, and base={base!r} isn't; choose {AUTO!r}")
    return recipe
