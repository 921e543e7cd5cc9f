"""Rewards: what scores pictures for prompts, from files, and mixed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from srpo_core.config import ConfigError, RewardConfig
from srpo_core.rewards import REWARDS
from srpo_core.rewards.mixture import USUAL

from .inputs import schema, widget
from .io_types import Reward
from .memory import hold, mix
from .reward_files import AUTO, file_choices, files_of, load_part, reward_path
from .show import shown

CATEGORY = "SRPO/rewards"
OFFICIAL = "official"
MOST = 4
"""Rewards in a mixture; a mixture can be mixed further."""


class LoadReward(io.ComfyNode):
    """A reward from its files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOLoadReward",
            display_name="SRPO Load Reward",
            category=CATEGORY,
            description=(
                "Loads a network that scores pictures for a prompt, as people would: HPS v2.1, PickScore, ImageReward,"
                " CLIP, LAION's aesthetic predictor, or the miniature's own that needs no file."
            ),
            search_aliases=["HPS", "HPSv2", "PickScore", "ImageReward", "aesthetic score", "CLIP score", "preference"],
            inputs=[
                io.Combo.Input("reward", options=list(REWARDS), tooltip=_KINDS),
                io.Combo.Input(
                    "file", options=file_choices(), default=AUTO,
                    tooltip="Its weights. auto: models/srpo_rewards, else the Hugging Face cache. A file of another"
                    " reward is refused by name.",
                ),
                io.Combo.Input(
                    "fit", options=[OFFICIAL, "crop", "pad"],
                    tooltip="How a picture fits the square that the reward sees. official: as its authors score."
                    " crop: the centre square. pad: all of it, with black beside (HPS officially). Values of crop and"
                    " pad can't be compared.",
                ),
                io.Combo.Input(
                    "device", options=["auto", "cpu"],
                    tooltip="auto: the GPU, if the weights fit there. cpu: slower, takes no GPU memory.",
                ),
                io.Combo.Input(
                    "offload", options=["when needed", "after use"],
                    tooltip="When the weights leave the GPU: when something else needs the memory (faster), or as soon"
                    " as pictures are scored.",
                ),
            ],
            outputs=[Reward.Output("reward", tooltip="For Score Images, Relative Score, Compare and Mix Rewards.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, reward: str | None, file: str | None) -> bool | str:
        """Missing files are told before anything runs. A value that comes by a link is None here."""
        try:
            if reward is not None and file is not None:
                reward_path(reward, file)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, reward: str | None, file: str | None, **rest: Any) -> str:
        """Other weights under the same name are loaded anew."""
        try:
            return str(files_of(reward_path(reward, file))) if reward is not None and file is not None else ""
        except ConfigError as error:
            return str(error)

    @classmethod
    def execute(cls, reward: str, file: str, fit: str, device: str, offload: str) -> io.NodeOutput:
        path = reward_path(reward, file)
        settings = {"name": reward, "path": str(path) if path else None, "fit": None if fit == OFFICIAL else fit}
        loaded = hold(load_part(reward, path, fit), device, offload == "after use", settings)
        return io.NodeOutput(loaded, ui=shown(cls, text=f"{loaded.summary}, from {path or 'this pack'}"))


class MixRewards(io.ComfyNode):
    """Several rewards as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[io.Input] = []
        for i in range(1, MOST + 1):
            optional = {"optional": True} if i > 2 else {}
            inputs += [
                Reward.Input(f"reward_{i}", tooltip="A reward, or a mixture.", **optional),
                widget(
                    RewardConfig, "weight", id=f"weight_{i}", min=0.0, step=0.05,
                    tooltip="Its share in the mean, beside the other weights. 0 leaves it out.", **optional,
                ),
            ]  # fmt: skip
        spans = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in USUAL.items())
        inputs.append(
            io.Combo.Input(
                "values", options=["comparable", "raw"], optional=True,
                tooltip=f"comparable: what each reward usually gives ({spans}) becomes 0 to 1 first, so that weights"
                " say how much each counts. raw: values are mixed as they are, and PickScore drowns the others.",
            )
        )  # fmt: skip
        return schema(
            node_id="SRPOMixRewards",
            display_name="SRPO Mix Rewards",
            category=CATEGORY,
            description=(
                "The mean of several rewards by weight, as one reward; tables show each one's own value too. They are"
                " loaded one after the other where they don't fit into the GPU's memory together."
            ),
            search_aliases=["combine rewards", "ensemble", "weighted score", "average"],
            inputs=inputs,
            outputs=[Reward.Output("reward", tooltip="The mixture.")],
        )

    @classmethod
    def execute(cls, values: str = "comparable", **given: Any) -> io.NodeOutput:
        rewards = [(given[f"reward_{i}"], given.get(f"weight_{i}", 1.0)) for i in range(1, MOST + 1)
                   if given.get(f"reward_{i}") is not None]  # fmt: skip
        return io.NodeOutput(mix(rewards, values == "comparable"))


_KINDS = (
    "hpsv2: people's taste, the reward that SRPO was published with. pickscore, imagereward: other tastes. clip: does"
    " the picture fit the text. aesthetic: beauty, without the prompt. miniature: built in, for SRPO Miniature's world."
)
