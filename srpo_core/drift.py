"""How far training has moved the velocity from where it began."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_core.flow import add_noise, per_sample
from srpo_core.interfaces import FlowModel
from srpo_core.rollout import Rollout


class VelocityProbe:
    """The base model's velocity at one level of fixed rollouts; make it while the model holds the base weights."""

    def __init__(self, flow: FlowModel, rollout: Rollout, sigma: float, guidance: float) -> None:
        self.prompts = rollout.prompts
        self.latents = add_noise(rollout.clean, rollout.noise, sigma)
        self.sigma, self.guidance = sigma, guidance
        self.base = self._velocity(flow)

    @torch.no_grad()
    def _velocity(self, flow: FlowModel) -> Tensor:
        return flow.velocity(self.latents, per_sample(self.sigma, self.latents), self.prompts, self.guidance).float()

    def drift(self, flow: FlowModel) -> float:
        """RMS change of the velocity over the RMS of the base's."""
        return float((self._velocity(flow) - self.base).norm() / self.base.norm())
