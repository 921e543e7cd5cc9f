"""A small world whose answers are known on paper: exact flow, linear autoencoder, a reward that is a dot product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from srpo_core.interfaces import PromptBatch

CHANNELS, SIZE, UPSCALE = 4, 3, 2
LIKED, DISLIKED = "good", "bad"


class Push(nn.Module):
    """The only weight of `ExactFlow`: added to the velocity, it is 0 at the exact one."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.push = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, velocity: Tensor) -> Tensor:
        """velocity [B, C, h, w] + push."""
        return velocity + self.push


class ExactFlow:
    """A TrainableFlow that knows each prompt's clean latents (embeds["clean"]): velocity = (latents - clean) / sigma.

    `calls` keeps (sigma, guidance) of every call. guidance changes nothing.
    """

    block_types: tuple[type[nn.Module], ...] = (Push,)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {"all": ("push",)}

    def __init__(self) -> None:
        self.module = Push()
        self.calls: list[tuple[Tensor, float]] = []

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: float) -> Tensor:
        assert sigma.shape == (len(latents),)
        self.calls.append((sigma.clone(), guidance))
        return self.module((latents - prompts.embeds["clean"]) / sigma.view(-1, 1, 1, 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return CHANNELS, height // UPSCALE, width // UPSCALE


class LinearAutoencoder:
    """Images are `mix` times the latents' channels, each pixel repeated 2 x 2, plus 0.5; nothing is clamped."""

    def __init__(self) -> None:
        self.mix = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(11)) * 0.1

    def encode(self, images: Tensor) -> Tensor:
        small = images[..., ::UPSCALE, ::UPSCALE] - 0.5
        return torch.einsum("cr,brhw->bchw", torch.linalg.pinv(self.mix).to(images), small)

    def decode(self, latents: Tensor) -> Tensor:
        images = torch.einsum("rc,bchw->brhw", self.mix.to(latents), latents) + 0.5
        return images.repeat_interleave(UPSCALE, -1).repeat_interleave(UPSCALE, -2)


class DotReward:
    """r(image, text) = mean colour . direction(text), a direction [3] per control word; other texts are worth 0.

    `calls` keeps the texts of every call.
    """

    def __init__(self, directions: dict[str, Tensor] | None = None) -> None:
        self.directions = directions or {
            LIKED: torch.tensor([1.0, 0.2, 0.0]),
            DISLIKED: torch.tensor([-0.3, 0.0, 0.7]),
        }
        self.calls: list[list[str]] = []

    def direction(self, text: str) -> Tensor:
        return self.directions.get(text.split(". ")[0], torch.zeros(3))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        colours = images.mean((2, 3)).repeat(len(prompts) // len(images), 1)
        return (colours * torch.stack([self.direction(text) for text in prompts]).to(colours)).sum(1)


def toy_batch(batch_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[PromptBatch, Tensor]:
    """Prompts with their clean latents, and noise [B, 4, 3, 3]; the same for a smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(64, 2, CHANNELS, SIZE, SIZE, generator=generator).to(dtype)
    prompts = tuple(f"a thing number {i}" for i in range(batch_size))
    return PromptBatch(prompts, {"clean": both[:batch_size, 0]}), both[:batch_size, 1]
