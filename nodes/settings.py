"""Settings of a training, for SRPO Train: where none are connected there, the recipe's own values stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from srpo_core.config import ConfigError

from . import io_types
from .inputs import Setting, advanced, run_values, run_widgets, schema
from .io_types import RunSettings
from .loaders import check_file, file_names, file_state, find_file

CATEGORY = "SRPO/training"
FOR_TRAIN = "For SRPO Train."
NONE = "none"
"""No LoRA to start from."""
SCORE = {"min": -10.0, "max": 10.0}
"""Widgets have limits where these settings have none."""
ENDS = ("the one at the low-noise end", "the one at the high-noise end")
SMALL = {"step": 0.1}
PIXELS = {"step": 16}
TARGETS = ["all", "attention", "mlp"]
"""Groups of layers that all families have."""


class SettingsNode(io.ComfyNode):
    """A node whose widgets are settings."""

    SETTINGS: Sequence[Setting]

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(RunSettings(run_values(cls.SETTINGS, given)))


class ControlWords(SettingsNode):
    """Which way training goes."""

    SETTINGS = (
        Setting("reward.liked", changes={"multiline": True}),
        Setting("reward.disliked", changes={"multiline": True}),
        Setting("reward.margin", changes=SCORE),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOControlWords",
            display_name="SRPO Control Words",
            category=CATEGORY,
            description="The words that SRPO Train moves pictures toward and away from. Each is put before the prompt"
            " when a picture is judged (Real. ... against Oil. ...), and what is learned is the difference.",
            search_aliases=["liked words", "disliked words", "style words", "positive negative words"],
            inputs=run_widgets(cls.SETTINGS),
            outputs=[io_types.Words.Output("settings", tooltip="For SRPO Train, and SRPO Compare.")],
        )


class Rollout(SettingsNode):
    """The pictures that training draws."""

    SETTINGS = (
        Setting("data.width", changes=PIXELS),
        Setting("data.height", changes=PIXELS),
        Setting("rollout.num_steps"),
        Setting("rollout.guidance", changes=SMALL),
        Setting("rollout.shift", changes=SMALL),
        Setting("data.batch_size"),
        Setting("rollout.same_noise", changes=advanced()),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPORollout",
            display_name="SRPO Rollout",
            category=CATEGORY,
            description="The pictures that SRPO Train draws to learn from: their size, their steps, how many at once.",
            search_aliases=["training size", "resolution", "batch size", "training pictures"],
            inputs=run_widgets(cls.SETTINGS),
            outputs=[io_types.RolloutSettings.Output("settings", tooltip=FOR_TRAIN)],
        )


class Align(SettingsNode):
    """The gradient step."""

    SETTINGS = (
        Setting("align.branches"),
        Setting("align.range_start"),
        Setting("align.range_end"),
        Setting("align.schedule_steps"),
        Setting("align.step_fraction"),
        Setting("align.draws_per_rollout"),
        Setting("align.guidance", changes=SMALL),
        Setting("align.k_denoise", ("k_denoise_low", "k_denoise_high"), ENDS, SCORE),
        Setting("align.k_inversion", ("k_inversion_low", "k_inversion_high"), ENDS, SCORE),
        Setting("align.levels", changes=advanced()),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOAlign",
            display_name="SRPO Align",
            category=CATEGORY,
            description="At which noise levels SRPO Train learns, in which branches and how far a step goes. SRPO"
            " Direct-Align Preview shows what these levels do to a picture.",
            search_aliases=["direct-align", "noise levels", "training range", "inversion", "branches"],
            inputs=run_widgets(cls.SETTINGS),
            outputs=[io_types.AlignSettings.Output("settings", tooltip=FOR_TRAIN)],
        )

    @classmethod
    def validate_inputs(cls, range_start: int | None, range_end: int | None, schedule_steps: int | None) -> bool | str:
        """The three have to fit together. One that comes by a link is None here."""
        given = {"range_start": range_start, "range_end": range_end, "schedule_steps": schedule_steps}
        try:
            if None not in given.values():
                run_values([Setting(f"align.{name}") for name in given], given)
        except ConfigError as error:
            return str(error)
        return True


class Optimizer(SettingsNode):
    """How weights move."""

    SETTINGS = (
        Setting("optim.lr", changes={"step": 1e-7}),
        Setting("optim.warmup_steps"),
        Setting("optim.schedule"),
        Setting("optim.accumulation"),
        Setting("optim.max_grad_norm"),
        Setting("optim.weight_decay", changes={"step": 1e-5}),
        Setting("optim.ema_decay", changes={"step": 0.0001}),
        Setting("optim.betas", ("beta1", "beta2"), changes={"step": 0.001, **advanced()}),
        Setting("optim.eps", changes={"step": 1e-10, **advanced()}),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOOptimizer",
            display_name="SRPO Optimizer",
            category=CATEGORY,
            description="How fast SRPO Train moves the weights, and over how many pictures a step is averaged.",
            search_aliases=["learning rate", "lr", "adamw", "gradient accumulation", "warmup", "scheduler", "ema"],
            inputs=run_widgets(cls.SETTINGS),
            outputs=[io_types.OptimizerSettings.Output("settings", tooltip=FOR_TRAIN)],
        )


class Lora(io.ComfyNode):
    """What is trained: small matrices beside the model's, or all of its weights."""

    SETTINGS = (
        Setting("lora.rank"),
        Setting("lora.alpha", changes={"step": 1.0, "max": 4096.0}),
        Setting("lora.targets", changes={"options": TARGETS}),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOLoRA",
            display_name="SRPO LoRA",
            category=CATEGORY,
            description="The LoRA that SRPO Train makes: its rank, its layers, and one to start from. Rank 0 trains all"
            " of the model's weights instead.",
            search_aliases=["lora rank", "alpha", "network dim", "full fine-tune", "continue lora"],
            inputs=[
                *run_widgets(cls.SETTINGS),
                io.Combo.Input(
                    "start", options=[NONE, *file_names("loras")], default=NONE,
                    tooltip="A LoRA of models/loras that training goes on from; rank and targets must be its own."
                    " none: a new one, without effect at first.",
                ),
            ],
            outputs=[io_types.LoraSettings.Output("settings", tooltip=FOR_TRAIN)],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start: str | None) -> bool | str:
        return True if start == NONE else check_file("loras", start, "start")

    @classmethod
    def fingerprint_inputs(cls, start: str | None, **_: Any) -> object:
        return NONE if start in (NONE, None) else file_state(find_file("loras", start, "start"))

    @classmethod
    def execute(cls, start: str, **given: Any) -> io.NodeOutput:
        path = None if start == NONE else str(find_file("loras", start, "start"))
        return io.NodeOutput(RunSettings(run_values(cls.SETTINGS, given) | {"lora.start": path}))
