"""What travels between SRPO's nodes, beside ComfyUI's own types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

Reward = io.Custom("SRPO_REWARD")
"""A nodes.memory.LoadedReward."""
Prompts = io.Custom("SRPO_PROMPTS")
Words = io.Custom("SRPO_WORDS")
RolloutSettings = io.Custom("SRPO_ROLLOUT")
AlignSettings = io.Custom("SRPO_ALIGN")
OptimizerSettings = io.Custom("SRPO_OPTIMIZER")
LoraSettings = io.Custom("SRPO_LORA")
"""Each of these is a RunSettings for SRPO Train; types of their own keep them to their sockets."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run by their dotted names, and prompts as text, which become files in the run's folder."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """{"optim.lr": 1e-4}"""
    texts: Mapping[str, str] = field(default_factory=dict)
    """{"data.prompts": "one prompt\\na line"}"""
