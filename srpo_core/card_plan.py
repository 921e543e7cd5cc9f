"""What a run takes of cards that need not be there: memory and time by phase, and the settings that would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from srpo_core.checks import check_sharing, device_memory, footprint_of
from srpo_core.config import ConfigError, ModelConfig, RunConfig
from srpo_core.description import with_changes
from srpo_core.devices import choose_device
from srpo_core.duration import count_work, expected_phases, matmul_rate
from srpo_core.estimate import Estimate, Shapes, estimate, shapes_of
from srpo_core.files import size_text
from srpo_core.fitting import what_would_fit
from srpo_core.interfaces import Components
from srpo_core.models import load_model, published_shapes
from srpo_core.sharding import is_sharded
from srpo_core.time_words import duration_text

USABLE = 0.98
"""What a driver leaves of a card's memory."""
FILES = ("path", "transformer", "autoencoder", "clip", "t5")


@dataclass(frozen=True)
class Cards:
    """GPUs to plan for; what is None is taken from this machine's, if it has one."""

    gib: float | None = None
    """Memory of each, as sellers count it: 24, 80, ..."""
    count: int | None = None
    """None: as many as the run has processes."""
    tflops: float | None = None
    """Of bfloat16 matrix products, 10^12 operations a second."""


@dataclass(frozen=True)
class CardPlan:
    """A run on such cards."""

    config: RunConfig
    needed: Estimate
    usable: int | None
    """Bytes of a card that the run can have; None where no card is known."""
    seconds: dict[str, float]
    """Of an optimizer step, by phase; empty where nothing tells a card's speed."""
    advice: tuple[str, ...]
    """Settings with which a run that doesn't fit would, the cheapest change first."""

    @property
    def fits(self) -> bool:
        return self.usable is None or self.needed.on_card <= self.usable

    def rows(self) -> Iterator[tuple[str, str]]:
        """(what, in words); a name that is empty goes on with the row before."""
        parallel = self.config.parallel
        gpus = parallel.processes * parallel.nodes
        strategy = parallel.strategy
        yield "gpus", f"{gpus}" + (f", parallel.strategy={strategy}" if gpus > 1 else "")
        for i, (phase, size) in enumerate(self.needed.phases.items()):
            yield "memory" if not i else "", f"{phase}: {size_text(size)}"
        whole = f"{size_text(self.needed.on_card)} of each card, with what CUDA and its allocator take beside"
        if self.usable is None:
            yield "in all", f"{whole}; --card-gb says whether it fits"
        else:
            verdict = "it fits" if self.fits else "it does not fit; settings that take less:"
            yield "in all", f"{whole}; of {size_text(self.usable)} that can be had: {verdict}"
        for line in self.advice:
            yield "", line
        if self.config.model.recompute == "auto":
            yield "", "model.recompute=auto fills what is free with activations that need no recomputing"
        for i, (phase, seconds) in enumerate(self.seconds.items()):
            yield "time" if not i else "", f"{phase}: {duration_text(seconds)}"
        if self.seconds:
            total = sum(self.seconds.values())
            steps = self.config.optim.steps
            yield "", f"{duration_text(total)} a step, {duration_text(steps * total)} for {steps} of them"
            if is_sharded(parallel):
                yield "", "the traffic between GPUs, which gather parts of the model, comes on top"
        else:
            yield "time", "--tflops says what the card does in bfloat16 (dense): 165 a 4090, 312 an A100, 800 an H100"


def plan_cards(config: RunConfig, cards: Cards) -> CardPlan:
    """Plan a run that need not be ready to start: of its files only the models' headers are read, if they are named.

    ConfigError for settings of several processes that don't go together.
    """
    if cards.count is not None:
        config = with_changes(config, {"parallel.processes": cards.count, "parallel.nodes": 1})
    if cards.gib is not None and cards.gib <= 0:
        raise ConfigError(f"--card-gb {cards.gib:g}: a card has more than that")
    device = choose_device(config.parallel.device)
    components = components_of(config.model)
    shapes = shapes_of(config, components)
    check_sharing(config, shapes.flow, [(config.data.height, config.data.width)])
    needed = estimate(config, shapes)
    memory = round(cards.gib * 2**30) if cards.gib is not None else device_memory(device)
    usable = round(USABLE * memory) if memory is not None else None
    advice = what_would_fit(config, shapes, usable) if usable is not None and needed.on_card > usable else ()
    return CardPlan(config, needed, usable, _seconds(config, components, shapes, cards, device), advice)


def components_of(config: ModelConfig) -> Components:
    """A run's parts for questions of shape: by its files' headers, or as published where none is named."""
    if not any(getattr(config, name) for name in FILES):
        published = published_shapes(config)
        if published is not None:
            return published
    return load_model(config, "cpu")


def _seconds(
    config: RunConfig, components: Components, shapes: Shapes, cards: Cards, device: torch.device
) -> dict[str, float]:
    if cards.tflops is None and (device.type != "cuda" or cards.gib is not None):
        return {}
    rate = cards.tflops * 1e12 if cards.tflops is not None else matmul_rate(device, torch.bfloat16)
    work = count_work(config, components)
    return expected_phases(config, footprint_of(config, shapes.flow), work, rate, "cuda")
