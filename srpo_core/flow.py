"""Rectified-flow arithmetic, as free functions of tensors and numbers.

    latents(sigma) = (1 - sigma) * clean + sigma * noise        velocity = noise - clean

`sigma` is a level in [0, 1], 1 being pure noise: a number for the whole batch or a tensor [B].
Latents are [B, C, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_core.transfer import sent

Level = float | Tensor


def shifted_sigmas(num_steps: int, shift: float, device: torch.device | str | None = None) -> Tensor:
    """The schedule [num_steps + 1] from 1 to 0: evenly spaced t put through shift * t / (1 + (shift - 1) * t); float32.

    Worked out in float32, as samplers elsewhere do: bit for bit diffusers' schedule.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float()
    sigmas = shift * t / (1 + (shift - 1) * t)
    sigmas[0] = 1.0  # rounding leaves it a last bit off for some shifts
    return sigmas.to(device)


def per_sample(value: Level, latents: Tensor) -> Tensor:
    """A number or [B] as [B] beside `latents` [B, ...]: same device, at least float32."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if isinstance(value, Tensor):
        level = sent(value, latents.device, dtype)
    else:
        level = torch.full((), value, device=latents.device, dtype=dtype)  # filled there: no copy to wait for
    if level.ndim > 1 or (level.ndim == 1 and len(level) != len(latents)):
        raise ValueError(f"a level is a number or [B], got {list(level.shape)} for {len(latents)} latents")
    return level.expand(len(latents))


def _spread(value: Level, latents: Tensor) -> Tensor:
    return per_sample(value, latents).view(-1, *[1] * (latents.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """Latents at level sigma between `clean` (0) and `noise` (1)."""
    s = _spread(sigma, clean)
    return (1 - s) * clean + s * noise


def remove_noise(latents: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """Inverse of `add_noise` for the known noise; sigma < 1."""
    s = _spread(sigma, latents)
    return (latents - s * noise) / (1 - s)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Tensor:
    """Latents at sigma moved to sigma_next (either way) along a constant velocity."""
    return latents + (_spread(sigma_next, latents) - _spread(sigma, latents)) * velocity
