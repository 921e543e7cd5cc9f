"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977) as a reward, read from the published checkpoint alone.

A score is (output - MEAN) / STD: about -2 to 2, where 0 is an average picture of the data that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.catalogue import hint
from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.places import find, snapshot
from srpo_core.weights.tensors import WeightsError

from .blip import HEAD, TEXT, VISION, BlipScore, own_names
from .clip import OPENAI_MEAN, OPENAI_STD
from .files import read_shapes, read_weights, seems
from .images import Fit, normalise, square
from .paths import reward_path
from .recompute import recompute
from .wordpiece import FILES as TOKENIZER_FILES
from .wordpiece import WordPiece

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The published normalisation of the network's output."""
MAX_TOKENS = 35
"""Tokens of a prompt with [CLS] and [SEP]; what comes after them is not read."""
FILE_NAMES = ("ImageReward.pt", "ImageReward.safetensors")
TOKENIZER = "bert-base-uncased"


class ImageReward:
    """A Reward in the published scale. Text and image meet in every layer, so the text tower is in the gradient too."""

    def __init__(
        self, network: BlipScore, tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]], fit: Fit = "crop"
    ) -> None:
        self.network = self.module = network.requires_grad_(False).eval()
        self.tokenize, self.fit = tokenize, fit

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B]; prompt i belongs to image i % B."""
        if not len(images) or len(prompts) % len(images):
            raise ValueError(f"{len(prompts)} prompts don't divide among {len(images)} images")
        images = images.to(next(self.network.parameters()).dtype)
        pixels = normalise(square(images, self.network.image_size, self.fit), OPENAI_MEAN, OPENAI_STD)
        tokens = {name: tensor.to(images.device) for name, tensor in self.tokenize(prompts).items()}
        return (self.network(pixels, **tokens) - MEAN) / STD


def check(config: RewardConfig | MoreReward) -> None:
    """ConfigError unless the checkpoint and the tokenizer are there, and are ImageReward's by names and shapes."""
    path, setting = _weights_path(config)
    _tokenizer(path, setting, _outline(path, setting).words)


def load(config: RewardConfig | MoreReward, device: torch.device | str) -> ImageReward:
    """ImageReward in float32 from `path`: the file, or a folder with it; unset, from where `srpo download` puts it.

    Its tokenizer lies beside it, in `bert-base-uncased` beside it, or in the Hugging Face cache.
    """
    path, setting = _weights_path(config)
    network = _outline(path, setting)
    tokenize = _tokenizer(path, setting, network.words)
    tensors = read_weights(path, setting)
    own = {name: tensors[old].to(device, torch.float32, copy=True) for name, old in own_names(tensors)}
    network.load_state_dict(own, assign=True)
    recompute(network.vision.encoder.layers)
    return ImageReward(network.to(device), tokenize, config.fit)


def _weights_path(config: RewardConfig | MoreReward) -> tuple[Path, str]:
    """The checkpoint's path, and the setting that names it."""
    path, setting = reward_path(config, "imagereward")
    if not path.is_dir():
        return path, setting
    found = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
    if found is None:
        raise WeightsError(setting, path, f"holds neither {' nor '.join(FILE_NAMES)}", hint("imagereward"))
    return found, setting


def _outline(path: Path, setting: str) -> BlipScore:
    """The network that a checkpoint fills, on meta. WeightsError unless it has exactly the tensors for it."""
    shapes = read_shapes(path, setting)
    own = {name: shapes[old] for name, old in own_names(shapes)}
    lost = [part for part in (VISION, TEXT, HEAD) if not any(name.startswith(part) for name in shapes)]
    if lost:
        kind = seems(shapes)
        what = f"it seems to be {kind}" if kind and len(lost) > 1 else f"it has no {lost[0]}*"
        raise WeightsError(setting, path, f"is no ImageReward checkpoint: {what}", hint("imagereward"))
    try:
        with torch.device("meta"):
            network = BlipScore(shapes)
    except KeyError as error:
        raise _incomplete(path, setting, f"{error.args[0]} is missing") from error
    except (IndexError, ValueError, ArithmeticError) as error:  # of shapes that no such network has
        raise _incomplete(path, setting, f"its shapes don't fit: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(wanted.keys() | own.keys()):
        if wanted.get(name) != own.get(name):
            raise _incomplete(path, setting, f"{name} is {own.get(name, 'missing')}, not {wanted.get(name, 'there')}")
    return network


def _incomplete(path: Path, setting: str, what: str) -> WeightsError:
    return WeightsError(setting, path, f"is no whole ImageReward checkpoint ({what})", hint("imagereward"))


def _tokenizer(path: Path, setting: str, words: int) -> WordPiece:
    """The tokenizer of the checkpoint at `path`; ConfigError says where it was looked for."""
    downloaded = find("imagereward")
    folders = [path.parent / TOKENIZER, path.parent, snapshot(f"google-bert/{TOKENIZER}"), snapshot(TOKENIZER)]
    folders.append(downloaded.parent / TOKENIZER if downloaded else None)
    for folder in folders:
        if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
            return WordPiece(folder, setting, words, MAX_TOKENS)
    raise ConfigError(
        f"{setting}={str(path)!r}: its tokenizer, {TOKENIZER}, is neither beside it"
        f" ({' or '.join(TOKENIZER_FILES)}) nor in the Hugging Face cache; {hint('imagereward')}"
    )
