"""From a run's description to the live objects that train it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from srpo_core.buckets import batch_order
from srpo_core.checks import Ready, check_run, size_notes
from srpo_core.config import RunConfig
from srpo_core.devices import as_launched, make_world, training_world
from srpo_core.embeddings import BATCH_SIZE, StoredPrompts, embedding_cache, encode
from srpo_core.errors import enough_memory
from srpo_core.fitting import memory_advice
from srpo_core.interfaces import Components, PromptBatch, TrainableFlow
from srpo_core.learner import Parts
from srpo_core.lora import add_lora, lora_alpha, lora_targets, start_from
from srpo_core.parallel import World
from srpo_core.photos import Photo
from srpo_core.preference import ControlWords
from srpo_core.progress import Display
from srpo_core.prompts import PromptSequence, ordered_sequence, prompt_sequence, shuffled_order
from srpo_core.randomness import generator_for
from srpo_core.rewards import load_rewards
from srpo_core.rewards.mixture import blind_notes
from srpo_core.rewards.trial import try_rewards
from srpo_core.run_folder import check_start
from srpo_core.session import Outcome, Session
from srpo_core.sharding import fill_parts, looks_whole, move_whole, shard
from srpo_core.speed import speed_up
from srpo_core.stopping import StopRequested
from srpo_core.trainer import PROBE_PROMPTS, Trainer
from srpo_core.training_data import TrainingData, photo_batches, photo_notes, photo_sizes, sources
from srpo_core.weights.lora_names import Lora


def train_run(config: RunConfig, resume: bool = False) -> Outcome:
    """A run from its description to its end; with `resume`, from its newest checkpoint. See Session.run.

    It is this process's part of one, if a launcher started several, whatever number the description says. A request to
    stop is heeded once every check without weights has passed.
    """
    config = as_launched(config)
    world = training_world(config.parallel)
    session, ready = Session(config, world), None
    at_once = contextlib.nullcontext  # several talk to each other meanwhile
    if world.size == 1:
        at_once = session.stop.anywhere
        check_start(config, resume)
        ready = check_run(config, world)  # before the run's folder is made; the state of several tells what is wrong

    def work() -> Outcome:
        try:
            with world.together(), at_once():
                trainer = assemble(config, session, ready)
        except StopRequested:
            return session.stopped_early()
        return trainer.work(resume)

    with world.joined():
        return session.run(resume, work)


def assemble(config: RunConfig, session: Session | None = None, ready: Ready | None = None) -> Trainer:
    """Load model and reward, encode the prompts, prepare what is trained. ConfigError names the wrong setting.

    `ready` is what check_run gave, if it was called already.
    """
    session = session or Session(config, make_world(config.parallel))
    world, display = session.world, session.display
    ready = ready or check_run(config, world)
    inputs, components = ready.inputs, ready.components
    advice = "try model.t5_memory=8bit or offload"
    with display, display.during("encoding prompts"), enough_memory("encoding prompts", advice):
        _encode_together(config, ready, session)
        data, encoded = _encode(config, ready, world.parts, display)
    components.release("text_encoder")
    words = ControlWords(config.reward.liked, config.reward.disliked)
    advice = "a LoRA (lora.rank=16) or model.dtype=bfloat16 needs less"
    with world.together(), display.during("loading the reward"), enough_memory("loading the reward", advice):
        rewards = load_rewards(config.reward, world.device)
        try_rewards(rewards, words, config.data.height, config.data.width, world.device)
    with display.during("loading the models"), enough_memory("loading the models", advice):
        flow, lora = trained_flow(config, components, world, inputs.start)
        autoencoder = components.autoencoder
    notes = photo_notes(inputs.photos, photo_sizes(config.data, inputs.photos))
    notes += size_notes(config, components) + blind_notes(rewards, config.align.branches)
    notes += [*components.notes, *(inputs.start.notes if inputs.start is not None else ())]
    parts = Parts(flow, autoencoder, rewards, words, data, encoded, components.measures, lora, notes)
    parts.notes = [*notes, *speed_up(config, parts, world, display.warn)]
    parts.less_memory = functools.partial(memory_advice, config, components, world.device)
    parts.trained_on = _digest(ready.prompts, inputs.photos)
    return Trainer(session, parts)


def _digest(prompts: Sequence[str], photos: Sequence[Photo]) -> str:
    """Of what the order of training depends on beside the settings: prompts, and photos' names, captions and sizes."""
    told = [list(prompts), [(photo.path.name, photo.caption, photo.height, photo.width) for photo in photos]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _held_out(config: RunConfig, ready: Ready) -> Sequence[str]:
    return ready.held_out[: max(config.output.preview_prompts, config.output.evaluate_prompts, PROBE_PROMPTS)]


def _encode_together(config: RunConfig, ready: Ready, session: Session) -> None:
    """Have each of several processes encode its share of what `_encode` will ask the cache for."""
    world, data, photos = session.world, config.data, ready.inputs.photos
    cache = embedding_cache(ready.components.text_encoder, config) if world.size > 1 else None
    if cache is None:
        return
    micros = config.optim.steps * config.optim.accumulation
    on_photos, on_prompts = (turns * world.parts for turns in sources(data, config.seed, micros))
    texts = list(_held_out(config, ready))
    if on_prompts:
        order = shuffled_order(config.seed, len(ready.prompts), on_prompts * data.batch_size)
        texts += [ready.prompts[index] for index in order]
    if on_photos:
        batches = batch_order(photo_sizes(data, photos), data.batch_size, config.seed, on_photos)
        texts += [photos[index].caption for _, row in batches for index in row]
    mine = cache.missing(world.share(list(dict.fromkeys(texts))))
    with world.together():
        session.display.phase("encoding prompts", len(mine))
        for start in range(0, len(mine), BATCH_SIZE):
            session.stop.check()
            encode(ready.components.text_encoder, mine[start : start + BATCH_SIZE], cache=cache)
            session.display.advance(min(len(mine), start + BATCH_SIZE))


def _encode(
    config: RunConfig, ready: Ready, parts: int, display: Display | None
) -> tuple[TrainingData, PromptBatch | StoredPrompts]:
    """What is trained on, and the held-out prompts."""
    data, text_encoder, photos = config.data, ready.components.text_encoder, ready.inputs.photos
    cache = embedding_cache(text_encoder, config)
    display = display if cache is not None else None
    encoded = encode(text_encoder, _held_out(config, ready), cache=cache, display=display)
    micros = config.optim.steps * config.optim.accumulation
    on_photos, on_prompts = (turns * parts for turns in sources(data, config.seed, micros))
    train = TrainingData(config.seed, (data.height, data.width), data.batch_size, photo_share=data.photo_share)
    if on_prompts:
        length = on_prompts * data.batch_size
        rollouts = prompt_sequence(text_encoder, ready.prompts, config.seed, length, cache, display)
        train = replace(train, rollouts=rollouts)
    if on_photos:
        sizes = photo_sizes(data, photos)

        def in_order(captions: Sequence[str], order: Sequence[int]) -> PromptSequence:
            return ordered_sequence(text_encoder, captions, order, cache, display)

        batches = photo_batches(photos, sizes, data.batch_size, config.seed, on_photos, in_order)
        train = replace(train, photos=batches)
    return train, encoded


def trained_flow(
    config: RunConfig, components: Components, world: World, start: Lora | None = None
) -> tuple[TrainableFlow, dict[str, object] | None]:
    """The flow as this process trains it, be it a part of one; and what state.json tells of its LoRA."""
    components.full_precision = not config.lora.rank and config.model.trained_memory == "float32"
    sharded = world.keeps_step and config.parallel.strategy != "replicate"
    flow = _sharded(config, components, world) if sharded else components.flow
    lora = _prepare(config, flow, start)
    if lora is not None:
        move_whole(flow.module, world.device)
    if world.context > 1:
        flow.share_tokens(world)
    return flow, lora


def _sharded(config: RunConfig, components: Components, world: World) -> TrainableFlow:
    """The flow with this process's part of each weight: read one at a time, where the family can."""
    dtype = getattr(torch, config.model.dtype)
    flow, stream = components.empty_flow() or (components.flow, None)
    _cast(flow.module.requires_grad_(not config.lora.rank), dtype if config.lora.rank else torch.float32)
    shard(flow, world, config)
    if stream is not None:
        fill_parts(flow.module, stream, torch.device("cpu") if config.parallel.offload else world.device)
    return flow


def _prepare(config: RunConfig, flow: TrainableFlow, start: Lora | None) -> dict[str, object] | None:
    """Leave a gradient to what is trained, in model.trained_memory: all weights, or a LoRA beside frozen ones.

    A LoRA beside a sharded model is whole on every process: it is put there when the model is in parts already.
    """
    module: nn.Module = flow.module.eval()
    held = getattr(torch, config.model.trained_memory)
    if not config.lora.rank:
        _cast(module.requires_grad_(True), held)
        return None
    targets = lora_targets(flow.lora_targets, config.lora.targets)
    _cast(module, getattr(torch, config.model.dtype))
    with looks_whole(module):
        add_lora(module, config.lora, targets, generator_for(config.seed, 0, 0, "lora"))
    if start is not None:
        start_from(module, config.lora, start)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(held)
    return {"rank": config.lora.rank, "alpha": lora_alpha(config.lora), "targets": list(targets)}


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers, such as tables of angles, keep the precision that the family chose for them."""
    for parameter in module.parameters():
        codes = parameter.itemsize == 1  # of a matrix in 8 bits
        if parameter.is_floating_point() and not codes and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
