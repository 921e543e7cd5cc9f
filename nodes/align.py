"""What Direct-Align's training sees: SRPO Direct-Align Preview."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from srpo_core.align import AlignStep, Branch
from srpo_core.align_view import WAYS, align_view, both_ways, finding, read_levels, step_below, table
from srpo_core.config import AlignConfig, ConfigError, RolloutConfig
from srpo_core.interfaces import PromptBatch, Reward
from srpo_core.rollout import Rollout

from . import bridge, io_types, show
from .inputs import schema, seed, widget
from .sampling import AT_ONCE, Progress, draw, drawing_steps, starting_noise

if TYPE_CHECKING:
    from .memory import LoadedReward

CATEGORY = "SRPO/align"
LEVELS = "0.99, 0.96, 0.9, 0.75, 0.5"
STEP = 0.0215
"""Length of the published gradient step."""
MOST_PICTURES = 8
"""In one grid."""
ROLLOUT = RolloutConfig()
"""How training draws its own pictures."""


class AlignPreview(io.ComfyNode):
    """Recovered pictures beside one-step predictions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOAlignPreview",
            display_name="SRPO Direct-Align Preview",
            category=CATEGORY,
            description="Shows what SRPO's training sees. At each noise level it puts the noise back on a clean"
            " picture, asks the model once, and shows two ways back: recovered by Direct-Align, and predicted in one"
            " step. Where the recovered picture is clean, a reward can judge it: so choose the training range.",
            search_aliases=["direct-align", "one-step prediction", "training range", "noise levels", "srpo grid"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="All pictures with their numbers, on one sheet."),
                io.Image.Output(
                    "recovered", display_name="recovered", tooltip="What training sees, level by level from high noise."
                ),
                io.Image.Output(
                    "one_step", display_name="one_step", tooltip="What the model predicts, in the same order."
                ),
                io.String.Output("table", display_name="table", tooltip="The numbers, as tab-separated lines."),
            ],
        )

    @classmethod
    def validate_inputs(cls, levels: str | None = None) -> bool | str:
        """What ComfyUI asks before a graph runs: whether the levels are levels."""
        try:
            return levels is None or bool(read_levels(levels))
        except ConfigError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: bridge.Conditioning,
        vae: VAE,
        seed: int,
        levels: str,
        step: float,
        branch: Branch,
        guidance: float,
        image: Tensor | None = None,
        latent: Mapping[str, Any] | None = None,
        reward: LoadedReward | None = None,
        prompt: str = "",
    ) -> io.NodeOutput:
        from srpo_core.align_grid import align_grid
        from srpo_core.preview import from_pil

        found = read_levels(levels)
        job = _Job(model, positive, vae, seed, [step_below(level, step, branch) for level in found], guidance)
        job.check(image, latent, reward, prompt.strip())
        clean, noise = job.pictures(image, latent, reward)
        latents = job.both_ways(clean, noise)
        rollout = Rollout(PromptBatch((prompt.strip(),) * len(clean)), noise, clean)
        with _scorer(reward, job.progress) as scorer:
            view = align_view(
                job.autoencoder, rollout, found, job.steps, latents, scorer, lambda _: job.progress.step()
            )
        grid = bridge.to_comfy(from_pil(align_grid(view))[None])
        numbers = show.table("Direct-Align by level", *table(view), finding(view))
        pictures = (bridge.to_comfy(view.images(way)) for way in WAYS)
        return io.NodeOutput(grid, *pictures, show.as_text(numbers), ui=show.shown(cls, [numbers], grid))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="A rectified-flow model: FLUX.1, an SRPO checkpoint, the miniature."),
        io.Conditioning.Input("positive", tooltip="The pictures' prompt. The guidance below replaces FluxGuidance."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        seed(tooltip="Noise that is put back on the first picture; the next ones have seed + 1, seed + 2, ... Give the"
        " seed that drew the pictures, and it is their own noise, as in training."),
        io.String.Input(
            "levels",
            default=LEVELS,
            tooltip="Noise levels sigma, above 0 and up to 1 (pure noise), with commas between. Each is the noisier end"
            " of a step.",
        ),
        io.Float.Input(
            "step",
            default=STEP,
            min=0.0005,
            max=1.0,
            step=0.0005,
            tooltip="Length of the gradient step in sigma. 0.0215 is published: a tenth of the training range.",
        ),
        io.Combo.Input(
            "branch",
            options=list(typing.get_args(Branch)),
            default="denoise",
            tooltip="denoise: steps go from the level down to less noise. inversion: they go up to the level, from less"
            " noise; its error counts more at high levels.",
        ),
        widget(
            AlignConfig,
            "guidance",
            step=0.1,
            tooltip="Distilled guidance of the model call, as in training's gradient step. Published: 3.5.",
        ),
        io.Image.Input(
            "image", optional=True, tooltip=f"Clean pictures, as photos in training; up to {MOST_PICTURES}."
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="Clean pictures as a LATENT. An empty one gives a size: pictures are then drawn first, as training"
            f" draws its own ({ROLLOUT.num_steps} steps, guidance {ROLLOUT.guidance:g}).",
        ),
        io_types.Reward.Input("reward", optional=True, tooltip="Scores every picture for the prompt below."),
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            optional=True,
            tooltip="What the reward reads, and the title in the grid: the text of `positive`.",
        ),
    ]  # fmt: skip


@dataclass
class _Job:
    """One preview: pictures, then both ways at every step."""

    model: ModelPatcher
    positive: bridge.Conditioning
    vae: VAE
    seed: int
    steps: Sequence[AlignStep]
    guidance: float

    def __post_init__(self) -> None:
        self.autoencoder = bridge.ComfyAutoencoder(self.vae, self.model)

    def check(
        self, image: Tensor | None, latent: Mapping[str, Any] | None, reward: LoadedReward | None, prompt: str
    ) -> None:
        """ConfigError for what can be said before anything runs."""
        from srpo_core.image_scores import check_prompts

        bridge.require_flow_model(self.model)
        if (image is None) == (latent is None):
            raise ConfigError(
                "image and latent: connect one of them: an IMAGE, the LATENT of a picture, or an empty LATENT, whose"
                " pictures are then drawn first"
            )
        given, name = (latent["samples"], "latent") if image is None else (image, "image")
        if len(given) > MOST_PICTURES:
            raise ConfigError(f"{name}: {len(given)} pictures are too many for one grid; {MOST_PICTURES} at most")
        if reward is not None:
            check_prompts(reward.reward, [prompt])
        channels = self.autoencoder.format.latent_channels
        if image is None and given.any() and given.shape[1] != channels:
            raise ConfigError(
                f"latent: it has {given.shape[1]} channels, this model's have {channels}; connect a LATENT that was"
                " made with this model's VAE"
            )

    def pictures(
        self, image: Tensor | None, latent: Mapping[str, Any] | None, reward: LoadedReward | None
    ) -> tuple[Tensor, Tensor]:
        """Clean latents in the model's range and their noise, both [B, C, h, w]; drawn if the LATENT is empty."""
        size = {"samples": self.vae.encode(image[..., :3])} if image is not None else latent
        to_draw = not size["samples"].any()
        count, levels = len(size["samples"]), len(self.steps)
        drawing = drawing_steps(size, ROLLOUT.num_steps) if to_draw else 0
        scoring = count * (1 + 2 * levels) * len(reward.parts) if reward is not None else 0
        total = drawing + levels * (math.ceil(count / AT_ONCE) + 1) + scoring
        self.progress = Progress(self.model, total, previews=False)
        noise = starting_noise(self.model, size, self.seed, bridge.NOISES[0])
        if to_draw:
            how = ROLLOUT.num_steps, ROLLOUT.guidance, ROLLOUT.shift
            size = draw(self.model, self.positive, size, self.seed, *how, progress=self.progress)
        return self.autoencoder.format.process_in(size["samples"].float().cpu()), noise

    def both_ways(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents [steps, 2, B, C, h, w] in the model's range: recovered and predicted in one step."""
        sigmas = torch.tensor([*(step.sigma for step in self.steps), 0.0])
        parts = []
        shares = bridge.in_parts(self.positive, noise, AT_ONCE)
        for part, (positive, its_noise) in zip(clean.split(AT_ONCE), shares, strict=True):

            def work(flow: bridge.SessionFlow, noise_there: Tensor, part: Tensor = part) -> Tensor:
                rollout = Rollout(bridge.prompts_of(len(part)), noise_there, part.to(noise_there))
                return both_ways(
                    flow, rollout, self.steps, self.guidance, lambda _: self.progress.step(flow.denoised)
                ).flatten(0, 2)

            found = bridge.with_flow(self.model, positive, self.guidance, its_noise, sigmas, work, self.seed)
            parts.append(self.autoencoder.format.process_in(found).unflatten(0, (len(self.steps), 2, len(part))))
        return torch.cat(parts, 2)


@contextlib.contextmanager
def _scorer(reward: LoadedReward | None, progress: Progress) -> Iterator[Reward | None]:
    """The engine's Reward of a wire, whose pictures `progress` counts; None without one."""
    if reward is None:
        yield None
        return
    with reward.on_device(lambda count: progress.step(count=count)) as (scorer, _):
        yield scorer
