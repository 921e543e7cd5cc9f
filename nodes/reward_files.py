"""Files of rewards in ComfyUI's folders: which there are, what a choice stands for, what to do where one is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath

import folder_paths

import srpo_core
from srpo_core import places
from srpo_core.catalogue import CATALOGUE, REWARDS_FOLDER, Entry
from srpo_core.config import ConfigError, RewardConfig, nearest
from srpo_core.rewards import REWARDS, check_reward, load_rewards
from srpo_core.rewards.mixture import WeightedReward

from .loaders import file_names, file_state

AUTO = "auto"
BUILT_IN = "miniature"
"""The reward whose weights ship with this pack."""
ENCODERS = "text_encoders"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


def register_folder() -> None:
    """Make models/srpo_rewards a folder of ComfyUI's, beside those that extra_model_paths.yaml has for the name."""
    folder_paths.add_model_folder_path(REWARDS_FOLDER, str(Path(folder_paths.models_dir) / REWARDS_FOLDER))
    folders, _ = folder_paths.folder_names_and_paths[REWARDS_FOLDER]
    folder_paths.folder_names_and_paths[REWARDS_FOLDER] = (folders, EXTENSIONS)


def file_choices() -> list[str]:
    """What the widget offers: auto, files of the rewards' folders, and text_encoders/ with those of that folder."""
    register_folder()
    encoders = (f"{ENCODERS}/{name}" for name in file_names(ENCODERS))
    return [AUTO, *file_names(REWARDS_FOLDER), *encoders]


def folders(kind: str) -> list[str]:
    """ComfyUI's folders for a kind of models, none for a kind that it doesn't know."""
    register_folder()
    return folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []


class NoReward(ConfigError):
    """There are no weights of a reward that the catalogue knows."""


def reward_path(reward: str, file: str) -> Path | None:
    """The file or folder that a choice stands for; None for the built-in reward.

    ConfigError, if there is none, names the folders that were looked in and the way to get it.
    """
    if reward == BUILT_IN:
        if file != AUTO:
            raise ConfigError(f"file={file!r}: the reward {BUILT_IN!r} has its weights built in; set file to {AUTO!r}")
        return None
    if reward not in REWARDS:
        raise ConfigError(f"reward={reward!r}: no such reward{nearest(reward, list(REWARDS))}")
    if file == AUTO:
        with places.folders_from(folders):
            found = places.find(reward) or _by_name(CATALOGUE[reward])
        if found is None:
            raise NoReward(_missing(reward))
        return found
    kind, name = (ENCODERS, file[len(ENCODERS) + 1 :]) if file.startswith(f"{ENCODERS}/") else (REWARDS_FOLDER, file)
    looked = ", ".join(folders(kind))
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ConfigError(
            f"file={file!r}: there is no such file; looked in {looked}. Choose another in the list, or {AUTO!r}"
        )
    return Path(path)


def _by_name(entry: Entry) -> Path | None:
    """The weights in any folder below models/srpo_rewards, by the names that they have in their repository."""
    name = PurePosixPath(entry.files[0].path).name
    if entry.folder:
        name = f"{PurePosixPath(str(entry.files[0].place)).name}/{name}"
    for file in file_names(REWARDS_FOLDER):
        if f"/{Path(file).as_posix()}".endswith(f"/{name}"):
            return Path(folder_paths.get_full_path(REWARDS_FOLDER, file))
    return None


def _missing(reward: str) -> str:
    entry = CATALOGUE[reward]
    looked = " nor in ".join([*folders(REWARDS_FOLDER), f"the Hugging Face cache ({places.cache_root()})"])
    wanted: dict[str, list[str]] = {}
    for file in entry.files:
        if file.place is not None:
            name, folder = file.path.rpartition("/")[2], file.place.rpartition("/")[0]
            wanted.setdefault(f"of https://huggingface.co/{file.repository} into models/{folder}", []).append(name)
    put = "; ".join(f"{', '.join(names)} {whence}" for whence, names in wanted.items())
    return (
        f"file='{AUTO}': the reward {reward!r} ({entry.what}) is neither in {looked}."
        f" Put {put}; or run: {download_command(reward)}. For pictures of SRPO Miniature choose the reward"
        f" {BUILT_IN!r}, which needs no file"
    )


def download_command(*names: str) -> str:
    """The command that gets entries of the catalogue into ComfyUI's folders, or else into the Hugging Face cache."""
    models = Path(folder_paths.models_dir)
    into = f' --to comfyui "{models.parent}"' if models.name == "models" and models.is_dir() else ""
    return (
        f'"{sys.executable}" "{Path(str(srpo_core.__file__)).parent / "__main__.py"}" download {" ".join(names)}{into}'
    )


def load_part(reward: str, path: Path | None, fit: str) -> WeightedReward:
    """The engine's reward of a file, on the CPU. ConfigError, in the words of the widgets, for a file of another."""
    from srpo_core.scoring import reward_settings

    chosen = {"name": reward, "path": str(path) if path else None, "fit": None if fit == "official" else fit}
    settings = reward_settings(RewardConfig(), chosen)
    try:
        with places.folders_from(folders):
            check_reward(settings)
            return load_rewards(settings, "cpu")[0]
    except ConfigError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise error.__cause__ from error  # a package, which the node tells how to get
        raise ConfigError(_in_widgets(str(error))) from error


def _in_widgets(message: str) -> str:
    """An error of the engine with the widgets' names for its settings, and a command that can be run from anywhere."""
    message = re.sub(r"reward\.path(?= |=)", "file", message)
    message = re.sub(r"reward\.name=(\S+)", r"reward \1", message)
    return re.sub(r"srpo download ([\w-]+) gets", lambda found: f"{download_command(found[1])} gets", message)


def files_of(path: Path | None) -> list[tuple[str, int, int]]:
    """What changes when another file takes the place of a reward's, or of one in its folder."""
    if path is None:
        return []
    return [file_state(file) for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
