"""Schedules and pictures: SRPO Sigmas and SRPO Sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from srpo_core.config import AlignConfig, ConfigError, RolloutConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.rollout import rollout

from . import bridge
from .inputs import schema, seed, widget

CATEGORY = "SRPO/sampling"
STEPS = 50
"""Euler steps of finished pictures, as published for FLUX.1-dev."""
AT_ONCE = 4
"""Pictures of a batch that are drawn together."""


class Progress:
    """One bar of `total` steps under a node, which may draw more than once, with the picture as it becomes.

    A node that shows pictures when it is done sends no `previews`: the page would keep the last one in their place.
    """

    def __init__(self, model: ModelPatcher, total: int, previews: bool = True) -> None:
        self.total, self.done = total, 0
        self.bar = comfy.utils.ProgressBar(total)
        load_device, latent_format = model.load_device, model.model.latent_format
        self.previewer = latent_preview.get_previewer(load_device, latent_format) if previews else None

    def step(self, denoised: Tensor | None = None, count: int = 1) -> None:
        """`count` more are done; the first of the predicted clean latents [B, C, h, w] is shown. May interrupt."""
        comfy.model_management.throw_exception_if_processing_interrupted()  # the bar only asks when it sends
        self.done += count
        preview = None
        if self.previewer is not None and denoised is not None:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", denoised)
        self.bar.update_absolute(self.done, self.total, preview)


def drawing_steps(latent: Mapping[str, Any], steps: int, at_once: int = AT_ONCE) -> int:
    """Steps that `draw` counts for a LATENT: groups of `at_once` pictures are drawn one after the other."""
    return steps * math.ceil(len(latent["samples"]) / at_once)


def starting_noise(model: ModelPatcher, latent: Mapping[str, Any], seed: int, kind: str) -> Tensor:
    """Noise [B, C, h, w] for the pictures of a LATENT: picture i has that of seed + i. ConfigError for a mask."""
    if "noise_mask" in latent:
        raise ConfigError(
            "latent: it has a noise mask, and this node draws whole pictures; connect a latent without a mask, or paint"
            " masked parts with KSampler"
        )
    return bridge.noise_of(bridge.seeds_in(latent, seed), bridge.latent_shape(model, latent), kind)


def draw(
    model: ModelPatcher,
    positive: bridge.Conditioning,
    latent: Mapping[str, Any],
    seed: int,
    steps: int,
    guidance: float,
    shift: float,
    noise: str = bridge.NOISES[0],
    at_once: int = AT_ONCE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The pictures that SRPO Sampler draws, as a LATENT: the engine's rollout of a MODEL.

    `progress` counts `drawing_steps`; ConfigError if the model is no flow model or the latent has a mask.
    """
    bridge.require_flow_model(model)
    start = starting_noise(model, latent, seed, noise)
    sigmas = shifted_sigmas(steps, shift)
    progress = progress or Progress(model, drawing_steps(latent, steps, at_once))

    def work(flow: bridge.SessionFlow, part: Tensor) -> Tensor:
        prompts = bridge.prompts_of(len(part))
        return rollout(flow, prompts, part, sigmas, guidance, lambda *_: progress.step(flow.denoised)).clean

    parts = [
        bridge.with_flow(model, its_positive, guidance, part, sigmas, work, seed)
        for its_positive, part in bridge.in_parts(positive, start, at_once)
    ]
    kept = {name: value for name, value in latent.items() if not name.startswith(bridge.RATIO)}
    return {**kept, "samples": torch.cat(parts)}


class Sigmas(io.ComfyNode):
    """The schedule that SRPO trains and samples with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOSigmas",
            display_name="SRPO Sigmas",
            category=CATEGORY,
            description="The noise levels of SRPO's sampler, from 1 to 0, for SamplerCustomAdvanced: evenly spaced,"
            " then shifted towards high noise.",
            search_aliases=["scheduler", "shift", "flow sigmas", "schedule", "flux sigmas"],
            inputs=[
                widget(
                    RolloutConfig,
                    "shift",
                    tooltip="How far levels move towards high noise: s*t / (1 + (s-1)*t). 3 is SRPO's for FLUX.1-dev, 1"
                    " leaves them evenly spaced.",
                ),
                widget(
                    RolloutConfig,
                    "num_steps",
                    id="steps",
                    default=STEPS,
                    tooltip="Steps of the schedule. 50 is published for finished pictures.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="steps + 1 levels, from 1 (pure noise) to 0 (the picture).")],
        )

    @classmethod
    def execute(cls, shift: float, steps: int) -> io.NodeOutput:
        return io.NodeOutput(shifted_sigmas(steps, shift))


def drawing_inputs() -> list[io.Input]:
    """The widgets of a rollout: steps, guidance, shift."""
    return [
        widget(
            RolloutConfig,
            "num_steps",
            id="steps",
            default=STEPS,
            tooltip="Euler steps. 50 is published for finished pictures; training draws with 25.",
        ),
        widget(
            AlignConfig,
            "guidance",
            step=0.1,
            tooltip="Distilled guidance, as FluxGuidance sets it. SRPO trains and is published at 3.5.",
        ),
        widget(
            RolloutConfig,
            "shift",
            tooltip="Shift of the schedule: more spends more steps at high noise. 3 is SRPO's for FLUX.1-dev.",
        ),
    ]


class Sampler(io.ComfyNode):
    """Pictures as the engine's rollout draws them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOSampler",
            display_name="SRPO Sampler",
            category=CATEGORY,
            description="Draws pictures as SRPO was published: Euler steps on the shifted schedule, no negative prompt."
            " Picture i of a batch has the noise of seed + i, so each can be drawn again alone.",
            search_aliases=["ksampler", "euler", "rollout", "flux sampler", "sample", "generate"],
            inputs=[
                io.Model.Input("model", tooltip="A rectified-flow model: FLUX.1, an SRPO checkpoint, the miniature."),
                io.Conditioning.Input("positive", tooltip="The prompt. The guidance below replaces FluxGuidance."),
                io.Latent.Input(
                    "latent", tooltip="Its size and its number of pictures count. What is in it is not used."
                ),
                seed(tooltip="Noise of the first picture; the next ones have seed + 1, seed + 2, ..."),
                *drawing_inputs(),
                io.Combo.Input(
                    "noise",
                    options=list(bridge.NOISES),
                    default=bridge.NOISES[0],
                    tooltip="Whose random numbers a seed stands for. ComfyUI: those of KSampler with batch size 1."
                    " engine: those of `srpo sample --seed`.",
                ),
                io.Int.Input(
                    "at_once",
                    default=AT_ONCE,
                    min=1,
                    max=64,
                    tooltip="Pictures of the batch that are drawn together: fewer need less memory and give the same"
                    " pictures.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The pictures, for VAE Decode."),
                io.Int.Output("seed_out", display_name="seed", tooltip="The seed of the first picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: bridge.Conditioning,
        latent: Mapping[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        shift: float,
        noise: str,
        at_once: int,
    ) -> io.NodeOutput:
        return io.NodeOutput(draw(model, positive, latent, seed, steps, guidance, shift, noise, at_once), seed)
