"""Where a file of weights comes from, as its own metadata says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def origin(metadata: Mapping[str, str]) -> str:
    """What SRPO's exports say about themselves, in a line for users; "" for other files, or for damaged metadata.

    Such as "trained by SRPO: 64 steps with the reward hpsv2 (averaged weights); holds the LoRA style.safetensors:0.8".
    """
    parts = []
    if "srpo_run" in metadata:
        steps, weights = metadata.get("srpo_step", "?"), metadata.get("srpo_weights", "trained")
        parts.append(f"trained by SRPO: {steps} steps{_rewards(metadata['srpo_run'])} ({weights} weights)")
    if "srpo_extracted" in metadata:
        found = _json(metadata["srpo_extracted"])
        parts.append(f"extracted by SRPO: what turns {found.get('base', '?')} into {found.get('from', '?')}")
    if "srpo_merged" in metadata:
        parts.append(f"holds the LoRA {metadata['srpo_merged']}")
    return "; ".join(parts)


def _rewards(run: str) -> str:
    reward = _json(run).get("reward")
    if not isinstance(reward, dict) or "name" not in reward:
        return ""
    more = [one["name"] for one in reward.get("more") or () if isinstance(one, dict) and "name" in one]
    return f" with the reward {' + '.join(str(name) for name in (reward['name'], *more))}"


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
