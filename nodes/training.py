"""Training from a graph: SRPO Train."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from srpo_core.config import ConfigError, ParallelConfig, RunConfig
from srpo_core.description import preset_names

from . import io_types, routes, run_outputs
from .inputs import Setting, advanced, schema, widget
from .loaders import BUILT_IN
from .settings import CATEGORY
from .show import shown
from .training_models import AUTO, base_choices, check_base, part_choices

if TYPE_CHECKING:
    from .memory import LoadedReward

WAIT, BACKGROUND, CHECK = MODES = ("wait", "background", "check only")
GO_ON, NEW = IF_THERE = ("go on", "new run")
NOTHING = (run_outputs.NOT_YET,) * 5
"""All outputs, where nodes behind them shall not run."""
SOCKETS = {
    "prompts": (io_types.Prompts, "Prompts or photos, of SRPO Prompts. The miniature has prompts of its own."),
    "words": (io_types.Words, "Which way training goes, of SRPO Control Words. Open: the published words."),
    "rollout": (io_types.RolloutSettings, "The pictures that it draws, of SRPO Rollout. Open: the recipe's."),
    "align": (io_types.AlignSettings, "Noise levels and branches, of SRPO Align. Open: the recipe's."),
    "optimizer": (io_types.OptimizerSettings, "Learning rate and more, of SRPO Optimizer. Open: the recipe's."),
    "lora": (io_types.LoraSettings, "Rank and layers, of SRPO LoRA. Open: the recipe's."),
}


class Train(io.ComfyNode):
    """Trains in processes of its own, which outlive ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOTrain",
            display_name="SRPO Train",
            category=CATEGORY,
            description="Trains a LoRA, or all weights, with SRPO: the model draws, a reward judges, and pictures move"
            " toward the words you like. It runs in a process of its own, survives ComfyUI, and goes on where it was.",
            search_aliases=["train lora", "fine-tune", "finetune", "SRPO training", "learn a style", "training"],
            is_output_node=True,
            inputs=[*_widgets(), *_sockets(), *_advanced()],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The trained LoRA, for Load LoRA (model) in the same queue."),
                io.LossMap.Output("loss", tooltip="The loss of every step. It is nearly flat by design."),
                io.Image.Output("before", tooltip="The preview prompts before training."),
                io.Image.Output("after", tooltip="The same prompts and noise after it."),
                io.String.Output("path", tooltip="The file of the result."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, base: str | None) -> bool | str:
        """A missing model is told before anything runs. ComfyUI repeats this for each value that is asked for here."""
        try:
            if base is not None:  # it is None where it comes by a link
                check_base(base)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, mode: str | None, **_: Any) -> object:
        return "" if mode == WAIT else time.time_ns()  # the others give no outputs that could be kept

    @classmethod
    def execute(
        cls, name: str, mode: str, if_there: str, reward: LoadedReward | None = None, **given: Any
    ) -> io.NodeOutput:
        from . import training_start
        from .follow import follow

        settings = [given[socket] for socket in SOCKETS if given.get(socket) is not None]
        begun = training_start.begin(name, if_there, _with_defaults(given), settings, reward, mode == CHECK)
        if mode == CHECK:
            return io.NodeOutput(*NOTHING, ui=shown(cls, begun.tables))
        routes.tell(cls.hidden.unique_id, begun.name)
        outputs, notes = NOTHING, []
        if mode == WAIT:
            follow(begun.folder, begun.config.optim.steps)
            outputs, notes = training_start.outputs(begun.config)
        told = shown(cls, text="\n".join([training_start.words(begun.folder), *notes]))
        return io.NodeOutput(*outputs, ui=told | {"srpo_run": [begun.name]})


def _widgets() -> list[io.Input]:
    """The required ones."""
    return [
        io.String.Input(
            "name", default="my-look",
            tooltip="Of the training and of its result: models/loras/<name>.safetensors. The same name goes on with"
            " what is there.",
        ),
        io.Combo.Input(
            "base", options=base_choices(), default=BUILT_IN,
            tooltip="What is trained: the built-in miniature (no download, minutes on any machine), or a FLUX.1"
            " transformer of models/diffusion_models, or a whole checkpoint.",
        ),
        io.Combo.Input("clip_l", options=part_choices("clip_l"), default=AUTO, tooltip="CLIP-L. auto: clip_l."),
        io.Combo.Input(
            "t5xxl", options=part_choices("t5xxl"), default=AUTO, tooltip="T5-XXL. auto: t5xxl_fp16, or the scaled fp8."
        ),
        io.Combo.Input("vae", options=part_choices("vae"), default=AUTO, tooltip="The VAE. auto: ae."),
        io.Combo.Input(
            "recipe", options=[AUTO, *preset_names()], default=AUTO,
            tooltip="Where the settings come from that no socket gives. auto: the miniature's, or a LoRA of FLUX.1-dev,"
            " for 24 GB on cards below 40 GB.",
        ),
        *Setting("optim.steps").widgets(),
        widget(RunConfig, "seed", control_after_generate=False),
        io.Combo.Input(
            "mode", options=list(MODES), default=WAIT,
            tooltip="wait: the graph goes on when it is trained. background: at once; SRPO Training Status and the side"
            " panel follow it. check only: the plan, and nothing is started.",
        ),
        io.Combo.Input(
            "if_there", options=list(IF_THERE), default=GO_ON,
            tooltip="Where a training of this name is there. go on: it is resumed, continued to more steps, watched"
            " while it is at work, or used when it is done. new run: name-2, name-3, ... (of a graph that changed).",
        ),
        *Setting("output.preview_every").widgets(),
        *Setting("output.checkpoint_every").widgets(),
    ]  # fmt: skip


def _sockets() -> list[io.Input]:
    reward = "What judges the pictures. Open: the recipe's, HPS v2.1 for FLUX."
    return [
        io_types.Reward.Input("reward", optional=True, tooltip=reward),
        *(kind.Input(name, optional=True, tooltip=tooltip) for name, (kind, tooltip) in SOCKETS.items()),
    ]


def _advanced() -> list[io.Input]:
    fields = ("processes", "gpus", "share_gpu", "nodes", "node_rank", "rendezvous")
    return [
        *(widget(ParallelConfig, field, optional=True, **advanced()) for field in fields),
        io.String.Input(
            "more_settings", default="", multiline=True, optional=True, placeholder="more settings: optim.lr=1e-4",
            tooltip="Any other setting of a run, section.name=value, one a line; it wins over widgets and sockets.",
            **advanced(),
        ),
    ]  # fmt: skip


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Widgets' values, and those of optional ones that a graph leaves out."""
    missing = {one.id: one.default for one in _advanced()}
    return missing | given
