"""Two models from the same noise: SRPO Compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from srpo_core.columns import Scores
from srpo_core.config import RewardConfig

from . import bridge, io_types
from .inputs import schema, seed, widget, words
from .sampling import CATEGORY, Progress, draw, drawing_inputs, drawing_steps
from .scoring import PROMPT_HELP, TABLE
from .show import as_text, shown, table

if TYPE_CHECKING:
    from .io_types import RunSettings
    from .memory import LoadedReward

NO_RATE = "win_rate: SRPO Compare has no reward connected, so nobody says which picture is better; connect one"


class Compare(io.ComfyNode):
    """The same noise drawn by two models, side by side, with scores and how often the second wins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOCompare",
            display_name="SRPO Compare",
            category=CATEGORY,
            description="Draws the same noise with two models, or one with and without a LoRA, and shows the pictures"
            " side by side; with a reward it says which one scores higher, how often, and how sure that is.",
            search_aliases=["side by side", "a/b test", "before after", "lora strength", "win rate", "versus"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Image.Output("side_by_side", tooltip="A left, B right, with labels and scores."),
                io.Image.Output("images_a", tooltip="The pictures of model_a."),
                io.Image.Output("images_b", tooltip="The pictures of model_b."),
                io.Float.Output(
                    "win_rate",
                    tooltip="Share of pictures, 0 to 1, in which B scores higher; equal scores count half. Needs a"
                    " reward.",
                ),
                io.String.Output("table", tooltip=TABLE),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_a: ModelPatcher,
        model_b: ModelPatcher,
        positive: bridge.Conditioning,
        vae: VAE,
        latent: Mapping[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        shift: float,
        label_a: str,
        label_b: str,
        reward: LoadedReward | None = None,
        prompt: str = "",
        liked: str = "",
        disliked: str = "",
        words: RunSettings | None = None,
    ) -> io.NodeOutput:
        from srpo_core.head_to_head import Comparison, contests, names_of

        models = {"model_a": model_a, "model_b": model_b}
        _check(models, reward, prompt.strip())
        seeds = bridge.seeds_in(latent, seed)
        scoring = 2 * len(seeds) * len(reward.parts) if reward is not None else 0
        progress = Progress(model_a, 2 * drawing_steps(latent, steps) + scoring, previews=False)
        images = []
        for model in models.values():
            drawn = draw(model, positive, latent, seed, steps, guidance, shift, progress=progress)
            images.append(bridge.decoded(vae, drawn["samples"]).cpu())
        judged = _words(words, liked, disliked)
        scores = _scores(reward, images, prompt.strip(), judged, progress) if reward is not None else ({}, {})
        found = Comparison(names_of(label_a, label_b), seeds, tuple(images), contests(*scores))
        tables = [table("Pictures", *found.picture_rows(), note="" if found.first else found.note)]
        if reward is not None:
            tables.insert(0, table(f"In all, by {reward.name}", *found.summary_rows(), note=found.note))
        pairs = bridge.to_comfy(found.pairs())
        rate = found.first.rate.estimate if found.first else ExecutionBlocker(NO_RATE)
        text = "\n\n".join(as_text(one) for one in tables)
        return io.NodeOutput(pairs, *map(bridge.to_comfy, images), rate, text, ui=shown(cls, tables, pairs))


def _words(connected: RunSettings | None, liked: str, disliked: str) -> tuple[list[str], list[str]]:
    """Liked and disliked words: those of SRPO Control Words where it is connected."""
    if connected is None:
        return words(liked), words(disliked)
    return connected.values["reward.liked"], connected.values["reward.disliked"]


def _check(models: Mapping[str, ModelPatcher], reward: LoadedReward | None, prompt: str) -> None:
    """ConfigError for what can be said before pictures are drawn."""
    from srpo_core.image_scores import check_prompts

    for name, model in models.items():
        bridge.require_flow_model(model, name)
    if reward is not None:
        check_prompts(reward.reward, [prompt])


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model_a", tooltip="The model to compare with: for example the base model."),
        io.Model.Input("model_b", tooltip="The model that is judged: with a LoRA, at another strength, another file."),
        io.Conditioning.Input("positive", tooltip="The prompt, for both. The guidance below replaces FluxGuidance."),
        io.Vae.Input("vae", tooltip="Decodes the pictures of both."),
        io.Latent.Input("latent", tooltip="Its size and its number of pictures count: 8 or more tell something."),
        seed(tooltip="Noise of the first picture, the same for both; the next ones have seed + 1, seed + 2, ..."),
        *drawing_inputs(),
        io.String.Input("label_a", default="A", tooltip="What model_a is called on the pictures and in the tables."),
        io.String.Input("label_b", default="B", tooltip="What model_b is called there."),
        io_types.Reward.Input("reward", optional=True, tooltip="Says which picture is better."),
        io.String.Input("prompt", optional=True, multiline=True, default="", tooltip=PROMPT_HELP),
        widget(
            RewardConfig,
            "liked",
            optional=True,
            tooltip="Words for what you like: with those below, the relative"
            " score is compared too, which SRPO trains on. Empty: only the score.",
        ),
        widget(RewardConfig, "disliked", optional=True, tooltip="Words for what you don't like."),
        io_types.Words.Input(
            "words", optional=True, tooltip="The words of a training, of SRPO Control Words, in place of the two above."
        ),
    ]


def _scores(
    reward: LoadedReward,
    images: Sequence[Tensor],
    prompt: str,
    chosen: tuple[list[str], list[str]],
    progress: Progress,
) -> list[Scores]:
    """The scores of each model's pictures [B, 3, H, W] for one prompt; relative ones too if both sides have words."""
    from srpo_core.image_scores import control_words, reads_prompts, score_batch

    relative = all(chosen) and reads_prompts(reward.reward)
    with reward.on_device(lambda count: progress.step(count=count)) as (scorer, _):
        return [
            score_batch(scorer, one, [prompt] * len(one), control_words(*chosen) if relative else None)
            for one in images
        ]
