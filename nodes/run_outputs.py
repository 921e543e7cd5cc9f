"""What a run gives to other nodes: pictures before and now, losses, its newest LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

from srpo_core.checkpoint import latest
from srpo_core.config import ConfigError, RunConfig
from srpo_core.errors import TrainingError

from . import bridge

NOT_YET = ExecutionBlocker(None)
"""What is not there: nodes behind it don't run, and nothing is an error."""


def pictures(folder: Path, config: RunConfig | None) -> tuple[tuple[Any, Any], str]:
    """Images [n, H, W, 3] of the previews before training and now, and why there are none."""
    from srpo_core.run_pictures import NoPreview, preview_pair

    if config is None:
        return (NOT_YET, NOT_YET), "no pictures: its run.json can't be read"
    try:
        before, now = preview_pair(folder, (config.data.height, config.data.width))
    except NoPreview as error:
        return (NOT_YET, NOT_YET), f"no pictures: {error}"
    return (bridge.to_comfy(before.images), bridge.to_comfy(now.images)), ""


def losses(folder: Path) -> Any:
    """The loss of every step, as core's nodes take it."""
    from srpo_core.run_view import metric_lines

    found = [line["loss"] for line in metric_lines(folder) if line.get("loss") is not None]
    return {"loss": found} if found else NOT_YET


def newest_lora(folder: Path) -> tuple[Any, str]:
    """The newest checkpoint's LoRA under the names that core's nodes read, and why there is none."""
    from srpo_core.export.lora import checkpoint_lora

    newest = latest(folder)
    if newest is None:
        return NOT_YET, "no LoRA: there is no checkpoint yet"
    try:
        return checkpoint_lora(newest), ""
    except (ConfigError, TrainingError) as error:
        return NOT_YET, f"no LoRA: {error}"
