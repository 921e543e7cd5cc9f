"""Scores of pictures: SRPO Score Images, SRPO Relative Score and SRPO Best of N."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io
from torch import Tensor

from srpo_core.config import ConfigError, RewardConfig

from . import bridge, io_types
from .inputs import schema, widget, words
from .show import as_text, shown, table

if TYPE_CHECKING:
    from .memory import LoadedReward

CATEGORY = "SRPO/rewards"
TABLE = "The table as text, with tabs between columns."
PROMPT_HELP = (
    "The text that the pictures were made from: the reward scores how well they fit it, and how good they are."
)
LINES_HELP = "Line 1 of the prompt belongs to picture 1, line 2 to picture 2, and so on. Off: the whole text to each."


def counted(reward: LoadedReward, pictures: int) -> Callable[[int], None]:
    """Moves the node's bar by the pictures that a reward has read; every reward of a mixture reads all of them."""
    return ProgressBar(pictures * len(reward.parts)).update


def _pictures_and_prompts() -> list[io.Input]:
    return [
        io.Image.Input("images", tooltip="The pictures to score."),
        io.String.Input("prompt", multiline=True, default="", tooltip=PROMPT_HELP),
        io.Boolean.Input("one_prompt_per_line", default=False, tooltip=LINES_HELP),
    ]


class ScoreImages(io.ComfyNode):
    """A number for every picture: how good it is and how well it fits its prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOScoreImages",
            display_name="SRPO Score Images",
            category=CATEGORY,
            description="Scores pictures with a human-preference reward; higher is better. Compare scores of the same"
            " prompt and reward only.",
            search_aliases=["rate images", "aesthetic score", "hps", "pickscore", "imagereward", "quality", "rank"],
            is_output_node=True,
            inputs=[
                io_types.Reward.Input("reward", tooltip="From SRPO Load Reward or SRPO Mix Rewards."),
                *_pictures_and_prompts(),
            ],
            outputs=[
                io.Float.Output("scores", is_output_list=True, tooltip="A score for each picture, in order."),
                io.Image.Output(
                    "scored_images", display_name="images", tooltip="The pictures with their scores on them."
                ),
                io.String.Output("table", tooltip=TABLE),
            ],
        )

    @classmethod
    def execute(cls, reward: LoadedReward, images: Tensor, prompt: str, one_prompt_per_line: bool) -> io.NodeOutput:
        from srpo_core.image_scores import check_prompts, prompts_for, score_batch, score_rows, summary
        from srpo_core.lettering import with_scores

        pictures = bridge.to_engine(images)
        prompts = prompts_for(prompt, len(pictures), one_prompt_per_line)
        check_prompts(reward.reward, prompts)
        with reward.on_device(counted(reward, len(pictures))) as (scorer, _):
            found = score_batch(scorer, pictures, prompts)
        scores = found["reward"]
        told = table(f"Scores by {reward.name}", *score_rows(found, prompts), note=summary(scores))
        drawn = bridge.to_comfy(with_scores(pictures, scores))
        return io.NodeOutput(scores, drawn, as_text(told), ui=shown(cls, [told], drawn))


class RelativeScore(io.ComfyNode):
    """How much more a reward sees of the words one likes than of those one doesn't."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPORelativeScore",
            display_name="SRPO Relative Score",
            category=CATEGORY,
            description="The score that SRPO trains on: that of the prompt worded with liked words, less that with"
            " disliked ones. Above 0, a picture looks more like the liked words.",
            search_aliases=["srpo score", "preference words", "control words", "style score", "realism"],
            is_output_node=True,
            inputs=[
                io_types.Reward.Input("reward", tooltip="One that reads the prompt, from SRPO Load Reward."),
                *_pictures_and_prompts(),
                widget(
                    RewardConfig,
                    "liked",
                    tooltip="Words for what you like, put before the prompt one at a time; commas or lines between.",
                ),
                widget(
                    RewardConfig,
                    "disliked",
                    tooltip="Words for what you don't like, used in the same way.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "relative",
                    is_output_list=True,
                    tooltip="For each picture: mean score under the liked words less that under the disliked ones.",
                ),
                io.String.Output("table", tooltip=TABLE),
            ],
        )

    @classmethod
    def execute(
        cls, reward: LoadedReward, images: Tensor, prompt: str, one_prompt_per_line: bool, liked: str, disliked: str
    ) -> io.NodeOutput:
        from srpo_core.image_scores import (
            check_prompts,
            control_words,
            prompts_for,
            relative_rows,
            score_batch,
            summary,
            unheard,
        )
        from srpo_core.lettering import with_scores

        pictures = bridge.to_engine(images)
        prompts = prompts_for(prompt, len(pictures), one_prompt_per_line)
        chosen = control_words(words(liked), words(disliked))
        check_prompts(reward.reward, prompts, chosen)
        with reward.on_device(counted(reward, len(pictures))) as (scorer, _):
            found = score_batch(scorer, pictures, prompts, chosen)
        relative = found["relative"]
        note = summary(relative, "relative score") + unheard(found)
        told = table(f"Relative scores by {reward.name}", *relative_rows(found, chosen), note=note)
        drawn = bridge.to_comfy(with_scores(pictures, relative, sign=True))
        return io.NodeOutput(relative, as_text(told), ui=shown(cls, [told], drawn))


class BestOfN(io.ComfyNode):
    """The best pictures of a batch, or of several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOBestOfN",
            display_name="SRPO Best of N",
            category=CATEGORY,
            description="Keeps the pictures with the highest scores, best first, with their scores and seeds.",
            search_aliases=["choose best", "top k", "select images", "filter by score", "pick best", "rerank"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures that were scored, in the same order. Lists are joined."),
                io.Float.Input("scores", force_input=True, tooltip="A score for each picture: scores of Score Images."),
                io.Int.Input("keep", default=1, min=1, max=4096, tooltip="How many pictures to keep."),
                io.Int.Input(
                    "seed",
                    optional=True,
                    force_input=True,
                    tooltip="The seed of the first picture (seed of SRPO Sampler): picture i has seed + i. Without it,"
                    " seeds count from 0: places in the batch.",
                ),
            ],
            outputs=[
                io.Image.Output("best", tooltip="The pictures that are kept, best first."),
                io.Float.Output("best_scores", display_name="scores", is_output_list=True, tooltip="Their scores."),
                io.Int.Output(
                    "seeds", is_output_list=True, tooltip="Their seeds: SRPO Sampler draws each of them again alone."
                ),
                io.String.Output("table", tooltip=TABLE),
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], scores: list[float], keep: list[int], seed: list[int] | None = None
    ) -> io.NodeOutput:
        from srpo_core.best_of import best_note, best_of, best_rows, kept_shape, seeds_of
        from srpo_core.lettering import with_scores

        pictures = [picture for batch in images for picture in batch]
        if len(scores) != len(pictures):
            raise ConfigError(
                f"scores: {len(scores)} for {len(pictures)} images; connect the scores of the node that scored these"
            )
        order = best_of(scores, keep[0])
        seeds = seeds_of(seed or [0], [len(batch) for batch in images])
        kept_shape([pictures[i].shape for i in order])
        best = torch.stack([pictures[i] for i in order])
        kept, of = [scores[i] for i in order], [seeds[i] for i in order]
        told = table("Best first", *best_rows(order, kept, of), note=best_note(scores, keep[0]))
        drawn = with_scores(bridge.to_engine(best), kept, ends=[f"  seed {one}" for one in of])
        return io.NodeOutput(best, kept, of, as_text(told), ui=shown(cls, [told], bridge.to_comfy(drawn)))
