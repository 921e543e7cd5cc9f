"""Direct-Align: one differentiable step from any level of the trajectory to a clean image (arXiv 2509.06942).

Level m of L counts from the low-noise end of the training range: m = 1 is its last level, m = L its first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from srpo_core.config import AlignConfig
from srpo_core.flow import Level, add_noise, euler_step, per_sample, remove_noise, shifted_sigmas
from srpo_core.interfaces import FlowModel
from srpo_core.rollout import Rollout

Branch = Literal["denoise", "inversion"]
MARGIN_LEVELS = 5
"""Levels at each end of the range that are never drawn."""


@dataclass(frozen=True)
class AlignStep:
    """A gradient step from sigma to sigma_next and its share k of absolute reward: numbers, or [B], one per sample."""

    sigma: Level
    sigma_next: Level
    k: Level

    @property
    def denoises(self) -> bool:
        """Whether the step goes toward less noise. ValueError if samples differ in that, or if it goes nowhere."""
        change = torch.as_tensor(self.sigma_next) - torch.as_tensor(self.sigma)
        if (change < 0).all():
            return True
        if (change > 0).all():
            return False
        raise ValueError(f"steps of one batch must share a direction, got {self.sigma} to {self.sigma_next}")


def training_levels(range_start: int, range_end: int, schedule_steps: int, shift: float, levels: int) -> Tensor:
    """Evenly spaced levels [levels], high to low, between two entries of the shifted schedule of `schedule_steps`."""
    sigmas = shifted_sigmas(schedule_steps, shift)
    return torch.linspace(float(sigmas[range_start]), float(sigmas[range_end]), levels)


def align_step_at(
    branch: Branch, m: int | Tensor, levels: Tensor, step_fraction: float, k_ramp: Sequence[float]
) -> AlignStep:
    """The step of `branch` at level m (an int, or a long tensor [B]: a level per sample) of levels [L], high to low.

    A step spans step_fraction * L levels (rounded up), less at the ends of the range. Denoise steps end at level m;
    inversion steps start one span below it, so both land near the same level. k runs over k_ramp from low to high
    noise.
    """
    count = len(levels)
    m = torch.as_tensor(m, device=levels.device)
    if not bool(((m >= 1) & (m < count)).all()):
        raise ValueError(f"m must be in [1, {count - 1}], got {m.tolist()}")
    longest = max(1, math.ceil(round(step_fraction * count, 6)))  # 0.07 * 100 is a last bit over 7: not 8 levels
    span = torch.minimum(m, count - m).clamp(max=longest)
    k = torch.linspace(*k_ramp, count, device=levels.device)
    if branch == "denoise":
        parts = levels[count - m - span], levels[count - m], k[m]
    elif branch == "inversion":
        low = (m - span).clamp(min=1)
        parts = levels[count - low], levels[count - (low + span)], k[low]
    else:
        raise ValueError(f"a branch is denoise or inversion, got {branch!r}")
    return AlignStep(*(parts if m.ndim else (part.item() for part in parts)))


def sample_align_steps(
    config: AlignConfig, shift: float, batch_size: int, generator: torch.Generator | None = None
) -> list[AlignStep]:
    """One step per configured branch, in order, at a level drawn for each sample; all values [batch_size]."""
    levels = training_levels(config.range_start, config.range_end, config.schedule_steps, shift, config.levels)
    device = generator.device if generator is not None else None
    bounds = MARGIN_LEVELS, config.levels - MARGIN_LEVELS + 1
    m = torch.randint(*bounds, (batch_size,), generator=generator, device=device).cpu()
    ramps = {"denoise": config.k_denoise, "inversion": config.k_inversion}
    return [align_step_at(branch, m, levels, config.step_fraction, ramps[branch]) for branch in config.branches]


def side_by_side(rollout: Rollout, steps: Sequence[AlignStep]) -> tuple[Rollout, AlignStep]:
    """Several steps from one rollout of B as one step of len(steps) * B samples: first all of the first one's."""
    if len(steps) == 1:
        return rollout, steps[0]
    values = (
        torch.cat([torch.as_tensor(getattr(step, name)).expand(len(rollout.clean)) for step in steps])
        for name in ("sigma", "sigma_next", "k")
    )
    return rollout.times(len(steps)), AlignStep(*values)


def direct_align(flow: FlowModel, rollout: Rollout, step: AlignStep, guidance: float) -> Tensor:
    """Clean latents [B, C, h, w] recovered through one model call at step.sigma, with gradient.

    The rollout's known noise is put back, one Euler step is taken, and the rest of the noise is removed in closed form:
    exact for an exact velocity, with d recovered / d velocity = (sigma_next - sigma) / (1 - sigma_next).
    """
    latents = add_noise(rollout.clean, rollout.noise, step.sigma)
    velocity = flow.velocity(latents, per_sample(step.sigma, latents), rollout.prompts, guidance)
    return recovered(latents, velocity, rollout.noise, step)


def recovered(latents: Tensor, velocity: Tensor, noise: Tensor, step: AlignStep) -> Tensor:
    """Clean latents from latents at step.sigma: one Euler step along `velocity`, less the rest of the known noise."""
    stepped = euler_step(latents, velocity, step.sigma, step.sigma_next)
    return remove_noise(stepped, noise, step.sigma_next)


def one_step_prediction(flow: FlowModel, rollout: Rollout, sigma: Level, guidance: float) -> Tensor:
    """Clean latents [B, C, h, w] predicted by one model call at sigma with gradient, along its velocity to the end."""
    latents = add_noise(rollout.clean, rollout.noise, sigma)
    velocity = flow.velocity(latents, per_sample(sigma, latents), rollout.prompts, guidance)
    return euler_step(latents, velocity, sigma, 0.0)
