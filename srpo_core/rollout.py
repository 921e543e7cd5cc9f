"""Clean latents to align on: sampled from noise without gradient, or encoded from photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from srpo_core.flow import euler_step, per_sample
from srpo_core.interfaces import Autoencoder, FlowModel, PromptBatch


@dataclass(frozen=True)
class Rollout:
    """Clean latents and the noise to put them back with, both [B, C, h, w] and outside any graph."""

    prompts: PromptBatch
    noise: Tensor
    clean: Tensor

    def __post_init__(self) -> None:
        if self.noise.shape != self.clean.shape or len(self.clean) != len(self.prompts):
            shapes = f"noise {list(self.noise.shape)} and clean {list(self.clean.shape)}"
            raise ValueError(f"{len(self.prompts)} prompts, {shapes} don't match")
        object.__setattr__(self, "noise", self.noise.detach())
        object.__setattr__(self, "clean", self.clean.detach())


@torch.no_grad()
def rollout(
    flow: FlowModel,
    prompts: PromptBatch,
    noise: Tensor,
    sigmas: Tensor,
    guidance: float,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Rollout:
    """Euler steps from noise [B, C, h, w] down the schedule sigmas [N + 1], in float32.

    `on_step(steps done, latents)` is called after each step.
    """
    noise = noise.float()
    latents = noise
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        velocity = flow.velocity(latents, per_sample(sigma, latents), prompts, guidance)
        latents = euler_step(latents, velocity, sigma, sigma_next)
        if on_step is not None:
            on_step(i + 1, latents)
    return Rollout(prompts, noise, latents)


@torch.no_grad()
def rollout_from_images(autoencoder: Autoencoder, images: Tensor, prompts: PromptBatch, noise: Tensor) -> Rollout:
    """Photos [B, 3, H, W] in [0, 1] in place of samples; `noise` is fresh, [B, C, h, w] as their latents."""
    return Rollout(prompts, noise.float(), autoencoder.encode(images).float())
