"""Where FLUX's transformer and autoencoder are, checked by their headers alone, and how they are loaded.

A part is a folder in diffusers format (or the whole model's folder), a file of its own under any of its sets of names,
or a part of an all-in-one checkpoint. A folder's config.json wins over what the shapes tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel
from torch import Tensor, nn

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.weights import autoencoder_names, flux_names
from srpo_core.weights.loading import check, empty_parameters, fill
from srpo_core.weights.recognise import Contents, require
from srpo_core.weights.tensors import TensorFile, open_tensors

CLASSES: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (FluxTransformer2DModel, AutoencoderKL, AutoencoderTiny)
}
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Part(Generic[Module]):
    """A part's file, what is in it, and the diffusers class and configuration that it is built by."""

    file: TensorFile
    contents: Contents
    kind: str
    config: dict[str, Any]

    def stream(
        self,
        file: TensorFile | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors under diffusers' names, one at a time on `device`, those with scales in `dtype`."""
        file = file or self.file
        if self.contents.part == "transformer":
            return flux_names.to_diffusers(file, dtype, device)
        return autoencoder_names.to_diffusers(file, self.contents, dtype, device)

    def empty(self) -> Module:
        """The module with its parameters on meta."""
        try:
            with empty_parameters():
                return CLASSES[self.kind].from_config(self.config).eval()
        except Exception as error:  # diffusers raises many kinds for a configuration that it can't use
            raise self.file.error(f"its configuration can't be used: {error}") from error

    @cached_property
    def outline(self) -> Module:
        """The module with its parameters on meta, once the file is known to fill it exactly."""
        module = self.empty()
        original = self.contents.part == "transformer" and self.contents.layout == "original"
        own_name = flux_names.original_name if original else str
        check(module, self.stream(self.file.outline()), self.file, own_name)
        return module

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Module:
        """The module with its weights, tensor by tensor in `dtype` on `device`."""
        return fill(self.empty(), self.stream(None, dtype, device), dtype, device, self.file)


def find_transformer(config: ModelConfig) -> Part[FluxTransformer2DModel]:
    """The transformer of model.transformer, or of model.path. ConfigError names what is missing or wrong."""
    return transformer_at(*_named(config, "transformer", "transformer"))


def find_autoencoder(config: ModelConfig) -> Part[AutoencoderKL | AutoencoderTiny]:
    """The autoencoder of model.autoencoder, or of model.path. ConfigError names what is missing or wrong."""
    return autoencoder_at(*_named(config, "autoencoder", "vae"))


def transformer_at(path: Path | str, setting: str) -> Part[FluxTransformer2DModel]:
    """The transformer in a file, a folder or a whole model's folder, checked by its header."""
    file, folder = _open(path, setting, "transformer")
    contents = require(file, "transformer", setting)
    settings = _own_config(folder, file, ("FluxTransformer2DModel",))
    return _checked(Part(file, contents, "FluxTransformer2DModel", settings or flux_names.transformer_config(file)))


def autoencoder_at(path: Path | str, setting: str) -> Part[AutoencoderKL | AutoencoderTiny]:
    """The autoencoder in a file, a folder or a whole model's folder, checked by its header."""
    file, folder = _open(path, setting, "vae")
    contents = require(file, "autoencoder", setting)
    settings = _own_config(folder, file, ("AutoencoderKL", "AutoencoderTiny"))
    if settings is not None:
        return _checked(Part(file, contents, settings["_class_name"], settings))
    return _checked(Part(file, contents, *autoencoder_names.autoencoder_config(file, contents)))


def _checked(part: Part[Module]) -> Part[Module]:
    _ = part.outline
    return part


def _named(config: ModelConfig, name: str, subfolder: str) -> tuple[Path, str]:
    """Where a part is said to be, and the setting that says so: its own, or else model.path."""
    own = getattr(config, name)
    if own is not None:
        return Path(own), f"model.{name}"
    if config.path is None:
        raise ConfigError(
            f"model.path is not set, and neither is model.{name}: the flux family needs a folder in diffusers format or"
            " a ComfyUI checkpoint in model.path, or single files in model.transformer, model.autoencoder, model.clip"
            " and model.t5; `srpo download` gets them"
        )
    path = Path(config.path)
    if path.is_dir() and not (path / subfolder).is_dir():
        raise ConfigError(f"model.path={config.path!r} has no folder {subfolder}; model.{name} names one elsewhere")
    return path, "model.path"


def _open(path: Path | str, setting: str, subfolder: str) -> tuple[TensorFile, Path | None]:
    """A part's tensors, and its folder where it is one or the file's name says that it lies in one."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{setting}={str(path)!r}: no such folder or file; check the path, or see `srpo download`")
    if path.is_dir():
        path = path / subfolder if (path / subfolder).is_dir() else path
        return open_tensors(path, setting), path
    return open_tensors(path, setting), path.parent if path.name.startswith("diffusion_pytorch_model") else None


def _own_config(folder: Path | None, file: TensorFile, classes: tuple[str, ...]) -> dict[str, Any] | None:
    """A folder's config.json; None without one that names a class. WeightsError if it is broken or of another class."""
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise file.error(f"{path} can't be read ({error!r})", "copy the folder again") from error
    if kind is None:  # as in repositories that have one only to be counted
        return None
    if kind not in classes:
        raise file.error(f"{path} describes a {kind}, not a {' or '.join(classes)}", "name the right folder")
    return settings
