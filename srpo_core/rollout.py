"""Clean latents to align on: sampled from noise without gradient, or encoded from photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from srpo_core.flow import euler_step, per_sample
from srpo_core.interfaces import Autoencoder, FlowModel, PromptBatch
from srpo_core.transfer import sent


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

    def times(self, count: int) -> Rollout:
        """The same, so many times one after the other in one batch."""
        noise, clean = (torch.cat([tensor] * count) for tensor in (self.noise, self.clean))
        return Rollout(_joined([self.prompts] * count), noise, clean)


@dataclass(frozen=True)
class Start:
    """What a micro-batch's rollout starts from: noise [B, C, h, w] of its prompts, and photos in a sample's place.

    Photos [B, 3, H, W] in [0, 1] stay on the host until they are encoded.
    """

    prompts: PromptBatch
    noise: Tensor
    images: Tensor | None

    def to(self, device: torch.device) -> Start:
        """The same with a device; what goes there may still be on its way when this returns."""

        def ready(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor

        embeds = {name: sent(ready(one), device) for name, one in self.prompts.embeds.items()}
        images = ready(self.images) if self.images is not None else None
        return Start(PromptBatch(self.prompts.prompts, embeds), sent(ready(self.noise), device), images)


def called_steps(num_steps: int, calls: int) -> list[int]:
    """The Euler steps 0 ... num_steps - 1 in which `calls` calls of the model are made: the first two, the last, and
    evenly between. All of them where calls is 0."""
    if not calls or calls >= num_steps:
        return list(range(num_steps))
    if calls < 2:
        raise ValueError(f"calls={calls} of {num_steps} steps: two at least tell a slope")
    between = [1 + round(i * (num_steps - 2) / max(1, calls - 2)) for i in range(calls - 1)]
    return [0, *between]


@torch.no_grad()
def rollout(
    flow: FlowModel,
    prompts: PromptBatch,
    noise: Tensor,
    sigmas: Tensor,
    guidance: float,
    on_step: Callable[[int, Tensor], None] | None = None,
    calls: int = 0,
) -> Rollout:
    """Euler steps from noise [B, C, h, w] down the schedule sigmas [N + 1], in float32.

    With `calls` the model is called in so many of the steps; the velocities of the others lie on the line through those
    of the last two calls, over sigma. `on_step(steps done, latents)` is called after each step.
    """
    noise = noise.float()
    latents = noise
    levels = sigmas.tolist()
    called = set(called_steps(len(levels) - 1, calls))
    known: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if i in called:
            velocity = flow.velocity(latents, per_sample(sigma, latents), prompts, guidance)
            known = [*known[-1:], (sigma, velocity)]
        else:
            velocity = _extrapolated(*known, sigma)
        latents = euler_step(latents, velocity, sigma, sigma_next)
        if on_step is not None:
            on_step(i + 1, latents)
    return Rollout(prompts, noise, latents)


def _extrapolated(before: tuple[float, Tensor], last: tuple[float, Tensor], sigma: float) -> Tensor:
    """The velocity at sigma on the line through two (sigma, velocity)."""
    weight = (sigma - last[0]) / (last[0] - before[0])
    return torch.lerp(before[1], last[1], 1 + weight)


def each_of(
    sample: Callable[[PromptBatch, Tensor], Rollout], batches: Sequence[tuple[PromptBatch, Tensor]]
) -> list[Rollout]:
    """The rollouts of several batches of (prompts, noise): those of the same shapes are sampled as one batch."""
    alike: dict[object, list[int]] = {}
    for i, (prompts, noise) in enumerate(batches):
        shapes = {name: tensor.shape[1:] for name, tensor in prompts.embeds.items()}
        alike.setdefault((noise.shape[1:], tuple(sorted(shapes.items()))), []).append(i)
    done: dict[int, Rollout] = {}
    for group in alike.values():
        chosen = [batches[i] for i in group]
        if len(chosen) == 1:
            done[group[0]] = sample(*chosen[0])
            continue
        whole = sample(_joined([prompts for prompts, _ in chosen]), torch.cat([noise for _, noise in chosen]))
        for i, clean in zip(group, whole.clean.split([len(noise) for _, noise in chosen]), strict=True):
            done[i] = Rollout(*batches[i], clean)
    return [done[i] for i in range(len(batches))]


def _joined(batches: Sequence[PromptBatch]) -> PromptBatch:
    embeds = {name: torch.cat([batch.embeds[name] for batch in batches]) for name in batches[0].embeds}
    return PromptBatch(sum((batch.prompts for batch in batches), ()), embeds)


@torch.no_grad()
def rollout_from_images(autoencoder: Autoencoder, images: Tensor, prompts: PromptBatch, noise: Tensor) -> Rollout:
    """Photos [B, 3, H, W] in [0, 1] in place of samples; `noise` is fresh, [B, C, h, w] as their latents."""
    return Rollout(prompts, noise.float(), autoencoder.encode(images).float())
