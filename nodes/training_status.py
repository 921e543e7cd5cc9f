"""What a training is doing, wherever it was started: SRPO Training Status."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from srpo_core.config import ConfigError

from . import routes, run_outputs
from .inputs import schema
from .run_names import runs_folder
from .show import shown

CATEGORY = "SRPO/training"


class TrainingStatus(io.ComfyNode):
    """A run's state, pictures, losses and newest LoRA by now."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SRPOTrainingStatus",
            display_name="SRPO Training Status",
            category=CATEGORY,
            description="Shows a training that runs in the background, or that has ended: where it stands, its"
            " pictures before and now, its curves; and gives the LoRA of its newest checkpoint, to draw with while"
            " the training goes on.",
            search_aliases=["training progress", "background training", "follow training", "checkpoint", "monitor"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "run", default="",
                    tooltip="The name that SRPO Train gave the run. Empty: the one that began last.",
                ),
            ],
            outputs=[
                io.String.Output("status", tooltip="In words: step, time left, what went wrong, the result's file."),
                io.Image.Output("before", tooltip="The preview prompts before training."),
                io.Image.Output("now", tooltip="The same prompts and noise in the newest preview."),
                io.LossMap.Output("loss", tooltip="The loss of every step so far, for LossGraphNode and the like."),
                io.LoraModel.Output("lora", tooltip="The LoRA of the newest checkpoint, for Load LoRA (model)."),
                io.Boolean.Output("finished", tooltip="Whether the training is done."),
                io.String.Output("path", tooltip="The file of the result; until there is one, the run's folder."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run: str) -> Any:
        return time.time_ns()  # another answer each time

    @classmethod
    def execute(cls, run: str) -> io.NodeOutput:
        from srpo_core import run_view

        folder = _folder(run.strip())
        told, config = run_view.summary(folder), run_view.run_config(folder)
        routes.tell(cls.hidden.unique_id, folder.name)
        (before, now), no_pictures = run_outputs.pictures(folder, config)
        lora, no_lora = run_outputs.newest_lora(folder)
        status = "\n".join([run_view.in_words(told), *filter(None, [no_pictures, no_lora])])
        return io.NodeOutput(
            status,
            before,
            now,
            run_outputs.losses(folder),
            lora,
            told["status"] == "finished",
            told["result"] or str(folder),
            ui={**shown(cls, text=status), "srpo_run": [folder.name]},
        )


def _folder(run: str) -> Path:
    """The folder of a run by its name, or of the one that began last. ConfigError if there is none."""
    from srpo_core import run_view

    place = runs_folder()
    if run:
        return run_view.find_run(place, run)
    runs = run_view.list_runs(place)
    if not runs:
        raise ConfigError(f"run: there is no training in {place} yet; SRPO Train starts one")
    return runs[0]
