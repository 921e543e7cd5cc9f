"""SRPO's nodes in ComfyUI: one line each in NODES, adapters around srpo_core."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

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
)
"""module:class of every node, in the order of menus."""


class SRPOExtension(ComfyExtension):
    """All nodes; one that can't be imported is told in ComfyUI's log, and the others are there."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        found = []
        for entry in NODES:
            module_name, _, class_name = entry.partition(":")
            try:
                found.append(getattr(importlib.import_module(f"{__name__}.{module_name}"), class_name))
            except (ImportError, AttributeError) as error:
                logging.error("SRPO: node %s is missing: %s", class_name, error)
        return found


async def comfy_entrypoint() -> SRPOExtension:
    """What ComfyUI calls."""
    return SRPOExtension()
