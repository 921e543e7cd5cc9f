"""Settings with which a run takes less of a GPU's memory, with what it then takes: the cheapest change first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from srpo_core.checks import in_parts, misplaced
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import with_changes
from srpo_core.estimate import Shapes, beside, estimate, shapes_of
from srpo_core.files import size_text
from srpo_core.interfaces import Components, TrainableFlow
from srpo_core.keeping import CudaMemory
from srpo_core.sharding import is_sharded

LARGER = "it takes a card with more memory"
MOST_TRIED = 4
GENERAL = "try model.recompute=auto, a smaller data.batch_size or data.height and data.width, or a LoRA (lora.rank=16)"
NARROW_REWARDS = ("hpsv2", "pickscore", "clip")
"""Those that reward.dtype is about."""
Change = Mapping[str, object]
"""Settings by their names with sections."""


def smaller_settings(config: RunConfig, shapes: Shapes) -> Iterator[Change]:
    """Changes that take less memory, each by itself, the one that costs least first; of a model in parts those alone
    that it can have."""
    yield from (change for change in _changes(config, shapes) if _changed(config, change) is not None)


def _changes(config: RunConfig, shapes: Shapes) -> Iterator[Change]:
    model, data, lora = config.model, config.data, config.lora
    if model.t5_memory != "8bit":
        yield {"model.t5_memory": "8bit"}
    yield from _slower(config)
    if not model.recompute:
        yield {"model.recompute": "auto"}
    if data.batch_size > 1:  # as many pictures a step
        yield {"data.batch_size": 1, "optim.accumulation": config.optim.accumulation * data.batch_size}
    spread = in_parts(config)
    if spread and not lora.rank:
        yield spread
    yield from _narrower(config)
    if is_sharded(config.parallel) and not config.parallel.offload:
        yield {"parallel.offload": True}
    if config.optim.ema_decay:
        yield {"optim.ema_decay": 0.0}
    if not lora.rank:
        yield {"lora.rank": 16}
    if model.frozen_memory == "full":
        yield {"model.frozen_memory": "8bit"} if lora.rank else {"lora.rank": 16, "model.frozen_memory": "8bit"}
    if model.frozen_memory == "full" and lora.rank and _has_wide_reward(config):
        yield {"model.frozen_memory": "8bit", "reward.dtype": "bfloat16"}
    if model.frozen_memory != "4bit" and lora.rank:
        yield {"model.frozen_memory": "4bit"}
    if spread and lora.rank:  # slow where GPUs have no fast way to each other
        yield spread
    if lora.rank > 16:
        yield {"lora.rank": 16}
    if lora.targets == "all" and "attention" in shapes.flow.lora_targets:
        yield {"lora.targets": "attention"}
    for side in (640, 512, 384):
        if max(data.height, data.width) > side:
            yield _scaled(config, shapes, side)


def _slower(config: RunConfig) -> Iterator[Change]:
    """Changes that only take time: fewer at once, rollouts without a copy, and parts of a model gathered more often."""
    if config.align.at_once > 1:
        yield {"align.at_once": 1}
    if config.rollout.at_once > 1:
        yield {"rollout.at_once": 1}
    if config.rollout.precision == "fp8":
        yield {"rollout.precision": "model"}
    if config.parallel.gathered == "step":
        yield {"parallel.gathered": "rollout"}
    if config.parallel.gathered != "layer":
        yield {"parallel.gathered": "layer"}


def _narrower(config: RunConfig) -> Iterator[Change]:
    """Changes that hold the same things in fewer bits: the reward, moments, trained weights."""
    if _has_wide_reward(config):
        yield {"reward.dtype": "bfloat16"}
    states = {"optim.states": "8bit"} if config.optim.states == "float32" else {}
    weights = {}
    if config.model.trained_memory == "float32" and config.model.dtype == "bfloat16":
        weights = {"model.trained_memory": "bfloat16"}
    yield from (change for change in (states, weights) if change)
    if states and weights:
        yield states | weights


def _has_wide_reward(config: RunConfig) -> bool:
    return config.reward.dtype == "float32" and config.reward.name in NARROW_REWARDS


def _scaled(config: RunConfig, shapes: Shapes, side: int) -> Change:
    """The picture's size with its longer side `side`, in multiples of what the model takes."""
    data = config.data
    longest = max(data.height, data.width)
    step = next((one for one in (16, 32, 64) if _takes(shapes.flow, one)), 64)
    return {
        f"data.{name}": max(step, round(getattr(data, name) * side / longest / step) * step)
        for name in ("height", "width")
    }


def _takes(flow: TrainableFlow, side: int) -> bool:
    try:
        flow.latent_shape(side, side)
    except ValueError:
        return False
    return True


def what_would_fit(config: RunConfig, shapes: Shapes, free: int) -> tuple[str, ...]:
    """Lines "setting=value: peak" of changes with which the run fits into `free` bytes of a card, cheapest first.

    Where no change does alone, those that do together, or else what remains with all of them.
    """
    alone = [_line(change, size) for change, size in _smaller(config, shapes) if size <= free]
    if alone:
        return tuple(alone)
    together: dict[str, object] = {}
    least = estimate(config, shapes).on_card
    for change in smaller_settings(config, shapes):
        size = _on_card(config, shapes, together | dict(change))
        if size is not None and size < least:
            together |= change
            least = size
        if least <= free:
            return (_line(together, least),)
    return (f"even {_line(together, least)}; {LARGER}" if together else LARGER,)


def less_memory(config: RunConfig, shapes: Shapes, room: int | None = None) -> str:
    """What to try when a device ran out of memory, with the run's estimate by phase.

    Changes with which the run fits into `room` bytes of the card; where that isn't known, what they would make of it.
    """
    guess = estimate(config, shapes)
    if room is None:
        found = [_line(change, size) for change, size in _smaller(config, shapes)] or [LARGER]
    else:
        found = list(what_would_fit(config, shapes, room))
    phases = ", ".join(f"{phase} {size_text(size)}" for phase, size in guess.phases.items())
    told = ", or ".join(found[:MOST_TRIED])
    told = told if told.endswith(LARGER) else f"try {told}"
    return f"{told}; about {size_text(guess.on_card)} were expected ({phases})"


def memory_advice(config: RunConfig, components: Components, device: torch.device) -> str:
    """`less_memory` of a run's parts on its device; in general words for a family of the user's own that can't be
    estimated."""
    try:
        room = CudaMemory(device).reach() + beside(config) if device.type == "cuda" else None
        return less_memory(config, shapes_of(config, components), room)
    except Exception:  # while another error is told, this one is worth nothing
        return GENERAL


def _smaller(config: RunConfig, shapes: Shapes) -> Iterator[tuple[Change, int]]:
    """(change, what the run then takes of a card) of the changes that take less by themselves."""
    now = estimate(config, shapes).on_card
    for change in smaller_settings(config, shapes):
        size = _on_card(config, shapes, change)
        if size is not None and size < now:
            yield change, size


def _on_card(config: RunConfig, shapes: Shapes, changes: Change) -> int | None:
    """What the changed run takes of a card; None where the changes don't go together."""
    changed = _changed(config, changes)
    try:
        return None if changed is None else estimate(changed, shapes).on_card
    except ConfigError:
        return None


def _changed(config: RunConfig, changes: Change) -> RunConfig | None:
    """The changed run; None where the changes don't go together."""
    try:
        changed = with_changes(config, changes)
    except ConfigError:
        return None
    return None if misplaced(changed) else changed


def _line(changes: Change, size: int) -> str:
    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    settings: Sequence[str] = [f"{name}={text(value)}" for name, value in changes.items()]
    return f"{' '.join(settings)}: {size_text(size)}"
