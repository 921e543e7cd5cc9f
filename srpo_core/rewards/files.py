"""Files of reward weights: read without running anything, and named for what they are when they are the wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.weights.not_weights import AGAIN
from srpo_core.weights.tensors import WeightsError, open_tensors

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
"""Endings of files that torch.save wrote. Rewards are published so; only their tensors are read."""
KINDS = (
    ("an ImageReward checkpoint", ("blip.visual_encoder.", "blip.text_encoder.")),
    ("a BLIP checkpoint", ("visual_encoder.", "text_encoder.")),
    ("the aesthetic predictor's head", ("layers.0.weight", "layers.7.weight")),
    ("a CLIP or HPS checkpoint in open_clip's format", ("visual.transformer.", "token_embedding.weight")),
    ("a CLIP or PickScore model in transformers' format", ("vision_model.", "text_model.", "visual_projection.")),
    ("a CLIP text encoder", ("text_model.",)),
    ("a T5 text encoder", ("encoder.block.",)),
    ("a FLUX transformer", ("double_blocks.",)),
    ("a FLUX transformer", ("single_transformer_blocks.",)),
    ("a diffusion checkpoint", ("model.diffusion_model.",)),
    ("an autoencoder", ("decoder.conv_in.weight",)),
)
"""What a file holds, and beginnings of names that tell, the surest first."""


def seems(names: Iterable[str]) -> str | None:
    """What weights of these names are, in a user's words; None if they are not known here."""
    names = list(names)
    for kind, beginnings in KINDS:
        if all(any(name.startswith(beginning) for name in names) for beginning in beginnings):
            return kind
    return None


def read_shapes(path: Path | str, setting: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file, without reading its tensors; otherwise as `read_weights`."""
    pickled = _pickled(Path(path), setting)
    if pickled is not None:
        return {name: tuple(tensor.shape) for name, tensor in pickled.items()}
    return {name: info.shape for name, info in open_tensors(path, setting).info.items()}


def read_weights(path: Path | str, setting: str) -> dict[str, Tensor]:
    """All tensors of a file, by name; a checkpoint's `state_dict` is unwrapped.

    A .safetensors file, or one that torch.save wrote: its tensors may be mapped from the file, so copy what you keep.
    WeightsError, in the words of `setting`, for a missing, damaged or other file, and for a pickle that holds more than
    tensors: it could run code when it is opened, so it is not.
    """
    pickled = _pickled(Path(path), setting)
    if pickled is not None:
        return pickled
    tensors = open_tensors(path, setting)
    return {name: tensors.read(name) for name in tensors.info}


def _pickled(path: Path, setting: str) -> dict[str, Tensor] | None:
    """The tensors of a file that torch.save wrote; None if the file is none of its."""
    if path.is_dir():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise WeightsError(setting, path, getattr(error, "strerror", None) or str(error), "check the path") from error
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return _unpickled(path, setting, zipped=start[:1] == b"P")
    if path.suffix.lower() in PICKLED and start and start[:1] not in (b"v", b"<", b"{") and start[8:9] != b"{":
        raise WeightsError(setting, path, "its beginning is damaged, or it is no file of weights", AGAIN)
    return None


def _unpickled(path: Path, setting: str, zipped: bool) -> dict[str, Tensor]:
    """The tensors in a file that torch.save wrote; nothing else in it is built."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about archives of TorchScript and protocols, which end in an error below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch has many: RuntimeError, UnpicklingError, EOFError, KeyError, struct.error, ...
        raise WeightsError(setting, path, *_why(path, str(error), zipped)) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(setting, path, f"holds a {type(content).__name__}, not weights by name")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(setting, path, "holds no tensors by name", "name the file of weights itself")
    return tensors


def _why(path: Path, message: str, zipped: bool) -> tuple[str, str]:
    if "TorchScript" in message:
        return "is a TorchScript archive, a program with weights in it", "use the same weights as .safetensors"
    if "Weights only load failed" in message and ("GLOBAL" in message or "Unsupported" in message):
        return (
            "holds more than tensors: such a pickle can run code when it is opened, so it is not",
            "use the file as its authors published it, or .safetensors",
        )
    if zipped and "central directory" in message:
        return f"it is cut short ({path.stat().st_size:,} bytes)", AGAIN
    return "it is cut short or damaged", AGAIN
