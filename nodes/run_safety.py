"""Which runs a server may start: a run.json in its output folder may come from anyone who can upload files there."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from srpo_core.config import ConfigError, RunConfig, nearest
from srpo_core.models import MODELS
from srpo_core.rewards import REWARDS

RESULTS = ("loras", "diffusion_models")
"""ComfyUI's kinds of models that a run's result may be."""


def check(config: RunConfig, folder: Path) -> None:
    """ConfigError for a run that would run code of its own, or write outside its folder and ComfyUI's models."""
    for setting, name, known in (
        ("model.family", config.model.family, MODELS),
        *(("reward.name", one.name, REWARDS) for one in (config.reward, *config.reward.more)),
    ):
        if name not in known:
            raise ConfigError(
                f"{setting}={name!r}: in ComfyUI it is one by its name{nearest(name, list(known))}; runs with code of"
                " their own start on the command line (srpo train)"
            )
    _check_within("output.dir", config.output.dir, [folder], exactly=True)
    if config.output.result is not None:
        _check_within("output.result", config.output.result, [Path(folder_paths.models_dir), *_model_folders()])
    if config.data.embeddings is not None:
        _check_within("data.embeddings", config.data.embeddings, [folder])


def _model_folders() -> list[Path]:
    return [Path(place) for kind in RESULTS for place in folder_paths.get_folder_paths(kind)]


def _check_within(setting: str, path: str, folders: list[Path], exactly: bool = False) -> None:
    """ConfigError unless a path, links followed, is in one of the folders; or is one, with `exactly`."""
    place = Path(path).resolve()
    for folder in folders:
        there = folder.resolve()
        if place == there if exactly else there in place.parents:
            return
    where = " or ".join(dict.fromkeys(map(str, folders)))
    raise ConfigError(f"{setting}={path!r}: ComfyUI starts only runs that write in {where}")
