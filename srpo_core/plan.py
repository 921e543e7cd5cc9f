"""`srpo train SOURCE --check`: every check that needs no weights, and the run in a few lines, without starting it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from srpo_core import places
from srpo_core.catalogue import CATALOGUE
from srpo_core.checks import Footprint, Ready, check_run, size_notes
from srpo_core.config import MoreReward, RewardConfig, RunConfig
from srpo_core.files import free_bytes, size_text
from srpo_core.parallel import World, make_world
from srpo_core.run_folder import check_start, device_name
from srpo_core.training_data import photo_notes, photo_sizes, sources

_MODEL_FILES = ("path", "transformer", "autoencoder", "clip", "t5", "tokenizers", "lora")


def plan_run(config: RunConfig, resume: bool = False) -> list[tuple[str, str]]:
    """(what, in words) of a run that may start. ConfigError if it may not, with the reason.

    Photos are read whole; of models only headers are, where their family can do so.
    """
    check_start(config, resume)
    world = make_world(config.parallel)
    return list(_lines(config, world, check_run(config, world)))


def _lines(config: RunConfig, world: World, ready: Ready) -> Iterator[tuple[str, str]]:
    data, optim, lora, footprint, photos = config.data, config.optim, config.lora, ready.footprint, ready.inputs.photos
    micros = optim.steps * optim.accumulation
    on_photos, on_prompts = sources(data, config.seed, micros)
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
    count = optim.accumulation * data.batch_size
    yield "steps", f"{optim.steps}, each of {count} {'picture' if count == 1 else 'pictures'}"
    if on_prompts:
        visited = on_prompts * data.batch_size
        yield (
            "prompts",
            f"{len(ready.prompts):,} to train on, {visited:,} pictures of {data.width} x {data.height} rolled out",
        )
    if photos:
        for note in photo_notes(photos, photo_sizes(data, photos)):
            yield "photos", note
        visits = on_photos * data.batch_size
        yield "", f"each is trained on {visits / len(photos):.1f} times, {visits:,} in all"
    for note in size_notes(config, ready.components):
        yield "size", note
    yield from _places(config, footprint, len(ready.held_out))


def _places(config: RunConfig, footprint: Footprint, held_out: int) -> Iterator[tuple[str, str]]:
    """What the run needs room for, and how many of the held-out prompts it draws."""
    drawn = config.output.preview_prompts if config.output.preview_every else 0
    yield "previews", f"{min(drawn, held_out)} of {held_out:,} held-out prompts"
    yield "memory", f"at least {size_text(footprint.least_bytes(config))} for weights, gradients and optimizer"
    folder = Path(config.output.dir)
    each, free = size_text(footprint.checkpoint_bytes(config)), size_text(free_bytes(folder))
    yield "checkpoints", f"{each} each; {free} are free at {folder}"


def _reward_place(reward: RewardConfig | MoreReward) -> str:
    """Where its weights lie, as far as that is said or found."""
    place = reward.path or (places.find(reward.name) if reward.name in CATALOGUE else None)
    return f": {place}" if place is not None else ""


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
