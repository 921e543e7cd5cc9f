"""From a run's description to the live objects that train it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from srpo_core.config import ConfigError, RunConfig
from srpo_core.interfaces import Components, PromptBatch, TrainableFlow
from srpo_core.lora import add_lora, lora_alpha, lora_targets
from srpo_core.models import load_model
from srpo_core.parallel import make_world
from srpo_core.photos import find_photos
from srpo_core.preference import ControlWords
from srpo_core.prompts import PromptSequence, encode, prompt_sequence, read_prompts, without_held_out
from srpo_core.randomness import generator_for
from srpo_core.registry import resolve
from srpo_core.rewards import REWARDS, load_reward
from srpo_core.trainer import PROBE_PROMPTS, RunPrompts, Trainer


def assemble(config: RunConfig) -> Trainer:
    """Load model and reward, encode the prompts, prepare what is trained. ConfigError names the wrong setting."""
    world = make_world(config.parallel)
    _check_files(config)
    components = load_model(config.model, world.device)
    flow, autoencoder, measures = components.flow, components.autoencoder, components.measures
    _check_size(config, flow)
    prompts = _encode_prompts(config, components)
    del components  # the text encoder has done its work
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    lora = _prepare(config, flow)
    words = ControlWords(config.reward.liked, config.reward.disliked)
    reward = load_reward(config.reward, world.device)
    return Trainer(config, world, flow, autoencoder, reward, words, prompts, measures, lora)


def _check_files(config: RunConfig) -> None:
    """Read the user's prompts and captions, find the reward, before models are loaded, which can take minutes."""
    for setting in ("prompts", "eval_prompts"):
        value = getattr(config.data, setting)
        if value != "builtin":
            read_prompts(value, f"data.{setting}")
    if config.data.photos is not None:
        find_photos(config.data.photos)
    resolve(REWARDS, "reward", config.reward.name)


def _check_size(config: RunConfig, flow: TrainableFlow) -> None:
    try:
        flow.latent_shape(config.data.height, config.data.width)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data.height={config.data.height}, data.width={config.data.width}: {error}") from error


def _encode_prompts(config: RunConfig, components: Components) -> RunPrompts:
    data, builtin = config.data, components.prompts
    held_out = read_prompts(data.eval_prompts, "data.eval_prompts", builtin.get("eval", ()))
    count = max(config.output.preview_prompts, config.output.evaluate_prompts, PROBE_PROMPTS)
    encoded: PromptBatch = encode(components.text_encoder, held_out[:count])
    length = config.optim.steps * config.optim.accumulation * data.batch_size
    if data.photos is not None:
        paths, captions = zip(*find_photos(data.photos), strict=True)
        train: PromptSequence = prompt_sequence(components.text_encoder, captions, config.seed, length, paths)
    else:
        prompts = without_held_out(read_prompts(data.prompts, "data.prompts", builtin.get("train", ())), held_out)
        train = prompt_sequence(components.text_encoder, prompts, config.seed, length)
    return RunPrompts(train, encoded)


def _prepare(config: RunConfig, flow: TrainableFlow) -> dict[str, object] | None:
    """Leave a gradient to what is trained, in float32: all weights, or a LoRA beside frozen ones in model.dtype."""
    module: nn.Module = flow.module.eval()
    if not config.lora.rank:
        _cast(module.requires_grad_(True), torch.float32)
        return None
    targets = lora_targets(flow.lora_targets, config.lora.targets)
    _cast(module, getattr(torch, config.model.dtype))
    add_lora(module, config.lora, targets, generator_for(config.seed, 0, 0, "lora"))
    return {"rank": config.lora.rank, "alpha": lora_alpha(config.lora), "targets": list(targets)}


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers, such as tables of angles, keep the precision that the family chose for them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
