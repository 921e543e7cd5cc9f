"""What a run will do, need and take, in a few lines before it starts, after every check that needs no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from srpo_core import gpus, places
from srpo_core.catalogue import CATALOGUE
from srpo_core.checkpoint import latest, read_state
from srpo_core.checks import Ready, check_run, size_notes
from srpo_core.config import ConfigError, MoreReward, RewardConfig, RunConfig
from srpo_core.device_locks import device_key
from srpo_core.devices import make_world
from srpo_core.duration import Pace, count_work, expected_pace, matmul_rate, own_pace, run_seconds
from srpo_core.estimate import Estimate, estimate, shapes_of
from srpo_core.files import free_bytes, size_text
from srpo_core.fitting import what_would_fit
from srpo_core.parallel import World
from srpo_core.run_folder import check_start, device_name
from srpo_core.time_words import duration_text
from srpo_core.training_data import photo_notes, photo_sizes, sources

_MODEL_FILES = ("path", "transformer", "autoencoder", "clip", "t5", "tokenizers", "lora")
HOPELESS = 1.1
"""A run whose estimate is more than this times what is free should not be started."""


@dataclass(frozen=True)
class Plan:
    """A run that may start, in words and in numbers."""

    rows: tuple[tuple[str, str], ...]
    """(what, in words); a name that is empty goes on with the row before."""
    peak_bytes: int
    """Predicted peak of the memory of each card, with what CUDA itself takes."""
    seconds: float | None
    """Expected length of what is left of the run; None where nothing tells."""
    total_bytes: int | None
    """Memory of the card, the smallest where there are several; None on a device that has none of its own."""
    free_bytes: int | None
    """What of it the run can have: what is free, and what this process holds itself and would give back."""
    advice: tuple[str, ...] = ()
    """Settings with which a run that doesn't fit would, with their predicted peaks, the cheapest change first."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is no more than what is free."""
        return self.free_bytes is None or self.peak_bytes <= self.free_bytes

    @property
    def refusal(self) -> str | None:
        """Why the run should not be started, with what would make it fit; None where it may, or where it is close."""
        if self.free_bytes is None or self.peak_bytes <= HOPELESS * self.free_bytes:
            return None
        needs, free = size_text(self.peak_bytes), size_text(self.free_bytes)
        reason = f"the run needs about {needs} of the card's memory, and {free} are free; settings that take less:"
        return "\n  ".join((reason, *self.advice))


def plan_run(config: RunConfig, resume: bool = False) -> Plan:
    """What a run that may start will do and need. ConfigError if it may not, with the reason.

    Photos are read whole; of models only headers are, where their family can do so.
    """
    check_start(config, resume)
    world = make_world(config.parallel)
    ready = check_run(config, world)
    shapes = shapes_of(config, ready.components)
    needed = estimate(config, shapes)
    card = _card(config, world.device)
    total, free = card or (None, None)
    advice = what_would_fit(config, shapes, free) if free is not None and needed.on_card > free else ()
    done = _steps_done(config) if resume else 0
    pace = _pace(config, ready, world.device, resume)
    seconds = run_seconds(config, pace, done) if pace is not None else None
    plan = Plan((), needed.on_card, seconds, total, free, advice)
    rows = (*_lines(config, world, ready), *_needs(config, ready, needed, plan), *_time(config, plan, pace, done))
    return Plan(rows, needed.on_card, seconds, total, free, advice)


def _card(config: RunConfig, device: torch.device) -> tuple[int, int] | None:
    """(bytes in all, bytes free) of the fullest card that the run would take; None where it takes none."""
    if device.type != "cuda":
        return None
    try:
        known = [gpu for gpu in gpus.find(config.parallel) if gpu.total is not None and gpu.free is not None]
    except ConfigError:  # they are taken: that is said when the run is started
        known = []
    if known:
        return min(gpu.total for gpu in known), min(gpu.free + _held_here(gpu.key) for gpu in known)
    free, total = torch.cuda.mem_get_info(device)
    return total, free + torch.cuda.memory_reserved(device)


def _held_here(key: str) -> int:
    """Bytes of a GPU that this process's own tensors and their cache take."""
    if not torch.cuda.is_initialized():
        return 0
    devices = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    return sum(torch.cuda.memory_reserved(device) for device in devices if device_key(device) == key)


def _steps_done(config: RunConfig) -> int:
    newest = latest(config.output.dir)
    return read_state(newest)["step"] if newest is not None else 0


def _pace(config: RunConfig, ready: Ready, device: torch.device, resume: bool) -> Pace | None:
    """By the run's own steps, else by arithmetic; None for a model that can't be counted, or on a full device."""
    own = own_pace(config.output.dir, config.output.preview_prompts) if resume else None
    if own is not None:
        return own
    try:
        work = count_work(config, ready.components)
        rate = matmul_rate(device, getattr(torch, config.model.dtype))
    except Exception:  # a family of the user's own may not run on meta: a run without a forecast is as good
        return None
    return expected_pace(config, ready.footprint, work, rate, device.type)


def _lines(config: RunConfig, world: World, ready: Ready) -> Iterator[tuple[str, str]]:
    """What is trained, on what, by which rewards."""
    data, optim, lora, footprint, photos = config.data, config.optim, config.lora, ready.footprint, ready.inputs.photos
    trained, frozen = _millions(footprint.trained), _millions(footprint.frozen)
    where = f"{footprint.layers} layers ({lora.targets})"
    of_lora = f"a LoRA of rank {lora.rank} on {where}: {trained} parameters beside {frozen} frozen ones"
    yield "trains", of_lora if lora.rank else f"all {trained} parameters"
    yield "model", f"{config.model.family}, {config.model.dtype} on {device_name(world.device)}"
    for name in _MODEL_FILES:
        if (value := getattr(config.model, name)) is not None:
            yield "", f"{name}: {value}"
    for one in (config.reward, *config.reward.more):
        yield "reward", f"{one.name}{_reward_place(one)}"
    processes = config.parallel.processes * config.parallel.nodes
    count = optim.accumulation * data.batch_size * processes
    among = f" on {processes} processes" if processes > 1 else ""
    yield "steps", f"{optim.steps}, each of {count} {'picture' if count == 1 else 'pictures'}{among}"
    on_photos, on_prompts = (n * processes for n in sources(data, config.seed, optim.steps * optim.accumulation))
    if on_prompts:
        visited = f"{on_prompts * data.batch_size:,} pictures of {data.width} x {data.height} rolled out"
        yield "prompts", f"{len(ready.prompts):,} to train on, {visited}"
    if photos:
        for note in photo_notes(photos, photo_sizes(data, photos)):
            yield "photos", note
        visits = on_photos * data.batch_size
        yield "", f"each is trained on {visits / len(photos):.3g} times, {visits:,} in all"
    for note in size_notes(config, ready.components):
        yield "size", note
    drawn = config.output.preview_prompts if config.output.preview_every else 0
    yield "previews", f"{min(drawn, len(ready.held_out))} of {len(ready.held_out):,} held-out prompts"


def _needs(config: RunConfig, ready: Ready, needed: Estimate, plan: Plan) -> Iterator[tuple[str, str]]:
    """Memory and disk."""
    least = size_text(ready.footprint.least_bytes(config))
    yield (
        "memory",
        f"about {size_text(plan.peak_bytes)} at its peak ({needed.phase}), {least} of it for weights, gradients and"
        " optimizer",
    )
    if plan.free_bytes is not None:
        card = f"{size_text(plan.free_bytes)} of the card's {size_text(plan.total_bytes)} are free"
        yield "", card if plan.fits else f"warning: that is more than there is: {card}; settings that take less:"
    for line in plan.advice:
        yield "", line
    folder = Path(config.output.dir)
    each, room = size_text(ready.footprint.checkpoint_bytes(config)), size_text(free_bytes(folder))
    yield "checkpoints", f"{each} each; {room} are free at {folder}"


def _time(config: RunConfig, plan: Plan, pace: Pace | None, done: int) -> Iterator[tuple[str, str]]:
    """How long it takes, and how much of it is done."""
    if plan.seconds is None or pace is None:
        return
    left = config.optim.steps - done
    steps = f"{left} steps of {duration_text(pace.step)}" + (f" ({done} are done)" if done else "")
    yield "time", f"about {duration_text(plan.seconds)}: {steps}, previews of {duration_text(pace.picture)} a picture"


def _reward_place(reward: RewardConfig | MoreReward) -> str:
    """Where its weights lie, as far as that is said or found."""
    place = reward.path or (places.find(reward.name) if reward.name in CATALOGUE else None)
    return f": {place}" if place is not None else ""


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
