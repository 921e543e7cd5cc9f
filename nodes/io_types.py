"""What travels between SRPO's nodes, beside ComfyUI's own types."""

from __future__ import annotations

from comfy_api.latest import io

Reward = io.Custom("SRPO_REWARD")
"""A nodes.memory.LoadedReward."""
