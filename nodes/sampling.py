"""Schedules and pictures: SRPO Sigmas and SRPO Sampler."""

from __future__ import annotations

import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from srpo_core.config import AlignConfig, RolloutConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.rollout import rollout

from . import bridge
from .inputs import seed, widget

CATEGORY = "SRPO/sampling"
STEPS = 50
"""Euler steps of finished pictures, as published for FLUX.1-dev."""


class Sigmas(io.ComfyNode):
    """The schedule that SRPO trains and samples with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SRPOSigmas",
            display_name="SRPO Sigmas",
            category=CATEGORY,
            description="The noise levels of SRPO's sampler, from 1 to 0, for SamplerCustomAdvanced.",
            search_aliases=["scheduler", "shift", "flow sigmas", "schedule"],
            inputs=[
                widget(RolloutConfig, "shift"),
                widget(RolloutConfig, "num_steps", id="steps", default=STEPS),
            ],
            outputs=[io.Sigmas.Output(tooltip="steps + 1 levels, from 1 to 0.")],
        )

    @classmethod
    def execute(cls, shift: float, steps: int) -> io.NodeOutput:
        return io.NodeOutput(shifted_sigmas(steps, shift))


class Sampler(io.ComfyNode):
    """Pictures as the engine's rollout draws them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SRPOSampler",
            display_name="SRPO Sampler",
            category=CATEGORY,
            description="Draws pictures with the settings SRPO was published with: Euler steps, no negative prompt.",
            search_aliases=["ksampler", "euler", "rollout", "flux sampler"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                seed(),
                widget(RolloutConfig, "num_steps", id="steps", default=STEPS),
                widget(AlignConfig, "guidance"),
                widget(RolloutConfig, "shift"),
                io.Combo.Input("noise", options=list(bridge.NOISES), default=bridge.NOISES[0]),
                io.Int.Input("at_once", default=4, min=1, max=64),
            ],
            outputs=[io.Latent.Output(), io.Int.Output("seed_out", display_name="seed")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: bridge.Conditioning,
        latent: dict,
        seed: int,
        steps: int,
        guidance: float,
        shift: float,
        noise: str,
        at_once: int,
    ) -> io.NodeOutput:
        bridge.require_flow_model(model)
        empty = bridge.full_latent(model, latent)
        every = bridge.batch_noise(seed, empty, noise)
        sigmas = shifted_sigmas(steps, shift)
        show = latent_preview.prepare_callback(model, steps)

        def draw(flow: bridge.SessionFlow, start: Tensor) -> Tensor:
            prompts = bridge.prompts_of(len(start))
            return rollout(
                flow, prompts, start, sigmas, guidance, lambda done, x: show(done - 1, flow.denoised, x, steps)
            ).clean

        parts = [bridge.with_flow(model, positive, guidance, part, sigmas, draw, seed) for part in every.split(at_once)]
        return io.NodeOutput({**latent, "samples": torch.cat(parts)}, seed)
