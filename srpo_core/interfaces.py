"""What the engine's parts promise each other: shapes, ranges and nothing about any one model.

Letters in shapes: B prompts, C latent channels, h x w latent size, H x W image size.
Images are RGB in [0, 1]; latents are spatial everywhere (a model packs tokens inside its own file).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PromptBatch:
    """B prompts and what a model needs of them.

    `prompts` is the text a reward reads. `embeds` maps names to tensors [B, ...]; only the model's own file knows
    the names.
    """

    prompts: tuple[str, ...]
    embeds: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.embeds.items():
            if tensor.shape[0] != len(self.prompts):
                raise ValueError(f"embeds[{name!r}] holds {tensor.shape[0]} rows for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PromptBatch:
        """The same prompts with embeddings on `device` (and floating ones in `dtype`)."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.embeds.items()
        }
        return PromptBatch(self.prompts, moved)

    def select(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts at `indices`, in that order."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        embeds = {name: tensor[index.to(tensor.device)] for name, tensor in self.embeds.items()}
        return PromptBatch(tuple(self.prompts[i] for i in indices), embeds)


class FlowModel(Protocol):
    """A rectified-flow model that samples."""

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: float) -> Tensor:
        """latents [B, C, h, w] at levels sigma [B] in (0, 1] -> [B, C, h, w], the prediction of noise - clean."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for an image of height x width pixels. ValueError if the model can't take that size."""
        ...


class TrainableFlow(FlowModel, Protocol):
    """A flow model whose weights the trainer may change.

    One whose calls ask the device nothing, and read nothing but their arguments and what its module holds, says so:
    `recordable = True` (see srpo_core.replay).
    """

    module: nn.Module
    """The network that is trained, checkpointed and exported."""
    block_types: tuple[type[nn.Module], ...]
    """Its repeated blocks: the units of recomputation, sharding and compilation."""
    lora_targets: Mapping[str, Sequence[str]]
    """Named groups ("attention", "mlp", "all") of linear-layer names (module paths end with them)."""


class Autoencoder(Protocol):
    """Images to latents and back, in the flow model's own latent space."""

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]; differentiable, never tiled."""
        ...


class TextEncoder(Protocol):
    """Prompts to what the flow model is conditioned on."""

    def __call__(self, prompts: Sequence[str]) -> PromptBatch: ...


@runtime_checkable
class Reward(Protocol):
    """A score of images for texts: higher is better, differentiable in the images, ignorant of SRPO.

    One that doesn't read the texts says so: `reads_prompts = False`. One with weights has all of them in `module`, an
    nn.Module: moved to another device, the reward works there.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and n * B prompts -> [n * B].

        Prompt i belongs to image i % B, so several wordings of the same images cost one pass through the image tower.
        """
        ...


class Measure(Protocol):
    """A number for reports, never in the gradient: images [B, 3, H, W] in [0, 1] and B prompts -> [B]."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


@dataclass
class Components:
    """What a model family hands to a run. A large family loads each part when it is first read (cached_property).

    `measures` are the family's own held-out measures, by name. `prompts` are what `builtin` stands for in data.prompts
    ("train") and data.eval_prompts ("eval").
    """

    flow: TrainableFlow
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    measures: Mapping[str, Measure] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    full_precision: bool = False
    """Whether the flow's weights are wanted in float32, as when all are trained; set before `flow` is first read."""
    side: int | None = None
    """Side in pixels of the square pictures that the flow was trained on, where other sizes come out worse."""
    notes: Sequence[str] = ()
    """What the user should know about its files."""

    def outline(self) -> TrainableFlow:
        """The flow for questions of shape: a large family that has not loaded it answers with a module on meta."""
        return self.flow

    def empty_flow(self) -> tuple[TrainableFlow, Iterator[tuple[str, Tensor]]] | None:
        """The flow with its parameters on meta, and their values one at a time on the device, in the dtype of `flow`.

        None where a family loads it in one piece. A process that keeps a part of each has no room for all of them.
        """
        return None

    def autoencoder_outline(self) -> Autoencoder:
        """The autoencoder for questions of shape, as `outline`."""
        return self.autoencoder

    def text_outline(self) -> Sequence[nn.Module]:
        """The text encoder's networks for questions of shape; none where they don't count."""
        return ()

    def embeds_outline(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of one prompt's embeddings; a large family answers without encoding one."""
        some = next((prompts[0] for prompts in self.prompts.values() if prompts), "a picture")
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.text_encoder([some]).embeds.items()}

    def release(self, part: str) -> None:
        """Forget a part that has done its work ("text_encoder"), and give its memory back."""
        self.__dict__.pop(part, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
