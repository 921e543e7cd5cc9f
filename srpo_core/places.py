"""Where the catalogue's models lie on this machine: ComfyUI's folders and the Hugging Face cache. Only looks."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from srpo_core.catalogue import CATALOGUE, Entry, File

_ALIASES = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}
"""Older names of ComfyUI's folders, which it still reads."""
_ASKED: ContextVar[Callable[[str], Sequence[str | Path]] | None] = ContextVar("ComfyUI's folders", default=None)
"""What names ComfyUI's folders for a kind of models, where a running ComfyUI is asked."""
_ROOT: ContextVar[Path | None] = ContextVar("ComfyUI's own folder", default=None)


@contextlib.contextmanager
def folders_from(lookup: Callable[[str], Sequence[str | Path]], root: Path | None = None) -> Iterator[None]:
    """Inside the context, ComfyUI's folders for a kind of models ("vae") are what `lookup` returns for it.

    A running ComfyUI knows them best: its command line may have moved them. `root` is the folder of its own files.
    """
    asked, at = _ASKED.set(lookup), _ROOT.set(root)
    try:
        yield
    finally:
        _ASKED.reset(asked)
        _ROOT.reset(at)


def comfyui_root() -> Path | None:
    """ComfyUI's folder: what COMFYUI_PATH names, else the one in whose custom_nodes this project lies; None if none.

    Inside of `folders_from` it is the running ComfyUI's.
    """
    if (running := _ROOT.get()) is not None:
        return running
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser()
        return path if path.is_dir() else None
    for folder in _parents():
        if folder.name == "custom_nodes":
            return folder.parent
    return None


def _parents() -> Iterator[Path]:
    """Folders above this project, as it was reached and as links resolve."""
    here = Path(__file__).absolute()
    yield from here.parents
    yield from here.resolve().parents


def model_folders(root: Path, kind: str) -> list[Path]:
    """Folders in which ComfyUI at `root` looks for models of a kind ("vae"), those of extra_model_paths.yaml too."""
    kinds = (kind, *_ALIASES.get(kind, ()))
    folders = [root / "models" / name for name in kinds]
    settings = root / "extra_model_paths.yaml"
    if settings.is_file():
        folders += [folder for name in kinds for folder in _extra_folders(settings, name)]
    return list(dict.fromkeys(folders))


def _extra_folders(settings: Path, kind: str) -> Iterator[Path]:
    try:
        sections: Any = yaml.safe_load(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # ComfyUI itself says what is wrong with it
    for section in sections.values() if isinstance(sections, dict) else ():
        if isinstance(section, dict) and isinstance(section.get(kind), str):
            base = Path(str(section.get("base_path") or ".")).expanduser()
            for line in section[kind].split("\n"):
                if line.strip():
                    yield settings.parent / base / line.strip()


def find(name: str) -> Path | None:
    """What the catalogue's entry `name` is on this machine, as its setting takes it; None if it isn't here, or in part.

    ComfyUI's folders come before the Hugging Face cache. Nothing is opened.
    """
    entry = CATALOGUE[name]
    return _in_folders(entry, comfyui_folders) or in_cache(entry)


def comfyui_folders(kind: str) -> list[Path]:
    """Folders in which ComfyUI looks for models of a kind, there or not; none if no ComfyUI is known."""
    lookup = _ASKED.get()
    if lookup is not None:
        return [Path(folder) for folder in lookup(kind)]
    root = comfyui_root()
    return model_folders(root, kind) if root is not None else []


def in_comfyui(entry: Entry, root: Path) -> Path | None:
    """An entry's file, or folder, in the folders of ComfyUI at `root`; None unless all of it is there."""
    return _in_folders(entry, functools.partial(model_folders, root))


def _in_folders(entry: Entry, folders_for: Callable[[str], Sequence[Path]]) -> Path | None:
    files = [file for file in entry.files if file.place is not None]
    if not files:
        return None
    kind = str(files[0].place).split("/")[0]
    for folder in folders_for(kind):
        places = [_placed(folder, file) for file in files]
        if all(places):
            first = places[0][0]
            return _common_folder(entry, folder) if entry.folder else first
    return None


def _placed(folder: Path, file: File) -> list[Path]:
    """The files that one of the catalogue's is in a folder for its kind."""
    below = str(file.place).split("/", 1)[1]
    if not below.endswith("/"):
        return [folder / below] if (folder / below).is_file() else []
    return sorted(path for path in (folder / below).glob(file.path.split("/")[-1]) if path.is_file())


def _common_folder(entry: Entry, folder: Path) -> Path:
    """The folder that holds all of an entry's places."""
    below = [str(file.place).split("/", 1)[1] for file in entry.files if file.place is not None]
    return folder / os.path.commonpath([name.rstrip("/") for name in below])


def in_cache(entry: Entry) -> Path | None:
    """An entry's file, or the folder of its files, in the Hugging Face cache; None unless all of it is there."""
    files = [file for file in entry.files if file.cached]
    found = [_cached(file) for file in files]
    if not all(found):
        return None
    whole = entry.folder or entry.cache_setting is not None
    return snapshot(files[0].repository) if whole else found[0][0]


def setting_for(entry: Entry, path: Path) -> str:
    """The setting that takes an entry which lies at `path`."""
    cached = path.is_relative_to(cache_root())
    return entry.cache_setting if cached and entry.cache_setting is not None else entry.setting


def as_setting(entry: Entry, path: Path) -> str:
    """An entry at `path` as a command takes it: "model.t5=/..."; quoted where a shell needs it."""
    return shlex.quote(f"{setting_for(entry, path)}={path}")


def cache_root() -> Path:
    """The Hugging Face cache, there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cache_folder(repository: str) -> Path:
    """The folder of a model repository in the Hugging Face cache, there or not: refs, blobs and snapshots."""
    return cache_root() / f"models--{repository.replace('/', '--')}"


def snapshot(repository: str) -> Path | None:
    """The folder of a repository's cached files, by its `main`; None if there is none."""
    folder = cache_folder(repository)
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    path = folder / "snapshots" / commit
    return path if path.is_dir() else None


def _cached(file: File) -> list[Path]:
    folder = snapshot(file.repository)
    if folder is None:
        return []
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if file.matches(path.relative_to(folder).as_posix()))
