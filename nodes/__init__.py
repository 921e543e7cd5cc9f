"""SRPO's nodes in ComfyUI: one line each in NODES, adapters around srpo_core."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

from . import packages

NODES = (
    "loaders:LoadCheckpoint",
    "loaders:LoadLora",
    "loaders:Miniature",
    "sampling:Sigmas",
    "sampling:Sampler",
    "rewards:LoadReward",
    "rewards:MixRewards",
    "scoring:ScoreImages",
    "scoring:RelativeScore",
    "scoring:BestOfN",
    "align:AlignPreview",
    "compare:Compare",
    "training_prompts:Prompts",
    "settings:ControlWords",
    "settings:Rollout",
    "settings:Align",
    "settings:Optimizer",
    "settings:Lora",
    "training:Train",
    "training_status:TrainingStatus",
)
"""module:class of every node, in the order of menus."""


class SRPOExtension(ComfyExtension):
    """All nodes; one that can't be imported is told in ComfyUI's log, and the others are there."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        found = []
        for entry in NODES:
            module_name, _, class_name = entry.partition(":")
            try:
                node = getattr(importlib.import_module(f"{__name__}.{module_name}"), class_name)
                node.GET_SCHEMA()  # ComfyUI would drop every node for one that is wrong
                found.append(packages.with_advice(node))
            except Exception as error:  # a broken package raises anything, and the other nodes need not suffer
                logging.error("SRPO: node %s is missing: %s", class_name, error)
        return found


async def comfy_entrypoint() -> SRPOExtension:
    """What ComfyUI calls once."""
    packages.tell_missing()
    try:
        importlib.import_module(f"{__name__}.routes").register()
    except Exception as error:  # nodes work without them
        logging.error("SRPO: pages can't follow trainings: %s", error)
    return SRPOExtension()
