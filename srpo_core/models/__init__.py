"""Model families by name. A family is one file with `load(config, device) -> Components` and one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from srpo_core.config import ModelConfig
from srpo_core.interfaces import Autoencoder, Components, TrainableFlow
from srpo_core.lora import linear_shapes, merge_lora, merged
from srpo_core.registry import resolve
from srpo_core.weights.loading import Stream
from srpo_core.weights.lora_names import Lora, check_lora, read_lora

if TYPE_CHECKING:
    from srpo_core.models.flux_files import Part

MODELS = {
    "flux": "srpo_core.models.flux:load",
    "miniature": "srpo_core.miniature.models:load",
}
SHAPES = {"flux": "srpo_core.models.flux_shapes:load"}
"""Families whose published shapes are known without files."""
TRANSFORMERS = {"flux": "srpo_core.models.flux_files:find_transformer"}
"""Families whose transformer's files can be read a tensor at a time, without building a module."""


def load_model(config: ModelConfig, device: torch.device | str) -> Components:
    """The family's parts, weights included, with model.lora merged in. ConfigError names the setting that is wrong."""
    lora = read_lora(config.lora, "model.lora") if config.lora is not None else None
    components = resolve(MODELS, "model family", config.family)(config, device)
    return components if lora is None else WithLora(components, lora, config.lora_strength)


def published_shapes(config: ModelConfig) -> Components | None:
    """A family's parts for questions of shape, without files; None where only its files tell."""
    return resolve(SHAPES, "model family", config.family)(config) if config.family in SHAPES else None


def find_transformer(config: ModelConfig) -> Part | None:
    """A family's transformer in its files, without model.lora; None where it can only be loaded as a module."""
    if config.family not in TRANSFORMERS:
        return None
    return resolve(TRANSFORMERS, "model family", config.family)(config)


class WithLora(Components):
    """A family's parts with a LoRA merged into the flow's weights when the flow is first read."""

    def __init__(self, parts: Components, lora: Lora, strength: float) -> None:
        check_lora(lora, linear_shapes(parts.outline().module))
        self._parts, self._lora, self._strength = parts, lora, strength
        for field in fields(Components):
            if field.name not in ("flow", "autoencoder", "text_encoder"):
                setattr(self, field.name, getattr(parts, field.name))
        self.notes = (*parts.notes, *lora.notes)

    def __getattr__(self, name: str) -> Any:
        """The autoencoder and the text encoder, loaded by the parts when they are asked for."""
        if name not in ("autoencoder", "text_encoder"):
            raise AttributeError(name)
        return getattr(self._parts, name)

    @cached_property
    def flow(self) -> TrainableFlow:
        flow = self._parts.flow
        merge_lora(flow.module, self._lora, self._strength)
        return flow

    def empty_flow(self) -> tuple[TrainableFlow, Stream] | None:
        empty = self._parts.empty_flow()
        if empty is None:
            return None
        flow, stream = empty
        layers = {f"{name}.weight": layer for name, layer in self._lora.layers.items()}
        return flow, (
            (name, merged(tensor, layers[name], self._strength) if name in layers else tensor)
            for name, tensor in stream
        )

    @property
    def full_precision(self) -> bool:  # type: ignore[override]
        """Whether the flow's weights are wanted in float32."""
        return self._parts.full_precision

    @full_precision.setter
    def full_precision(self, wanted: bool) -> None:
        self._parts.full_precision = wanted

    def outline(self) -> TrainableFlow:
        return self._parts.outline()

    def autoencoder_outline(self) -> Autoencoder:
        return self._parts.autoencoder_outline()

    def text_outline(self) -> Sequence[nn.Module]:
        return self._parts.text_outline()

    def embeds_outline(self) -> Mapping[str, tuple[int, ...]]:
        return self._parts.embeds_outline()

    def release(self, part: str) -> None:
        super().release(part)
        self._parts.release(part)
