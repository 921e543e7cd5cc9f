"""What makes a run faster, put on its parts in the order in which one builds on another."""

from __future__ import annotations

from collections.abc import Callable

import torch

from srpo_core.attention import choose_attention
from srpo_core.compiling import WARNING, compiles, make_compiler
from srpo_core.config import RunConfig
from srpo_core.learner import Parts
from srpo_core.parallel import World
from srpo_core.replay import can_record, make_replay
from srpo_core.rollout_copy import RolloutCopy

TOKENS_SHARED = (
    "model.compile=true with parallel.context above 1: the compiler can't take blocks that share a picture's tokens,"
    " so they run without"
)


def speed_up(config: RunConfig, parts: Parts, world: World, report: Callable[[str], None]) -> list[str]:
    """Attention kernels, compiled blocks, the copy for rollouts and its recorder, as the run's settings ask for them.

    The flow is ready to be trained. Returns notes for the user; `report` is told of what can't be done later on.
    ConfigError for what the device or the model can't do.
    """
    notes, flow, device = [], parts.flow, world.device
    if hasattr(flow, "attention"):
        prompts = parts.held_out.select(range(1)).to(device)
        prompts = prompts.select([0] * config.data.batch_size)
        latents = torch.zeros(len(prompts), *flow.latent_shape(config.data.height, config.data.width), device=device)
        wanted = config.model.attention
        if config.parallel.deterministic and wanted == "auto":
            wanted = "flash"  # times measured would choose now this kernel, now that one
        alone = config.parallel.context == 1
        with world.in_step():  # it calls the model
            parts.attention, told = choose_attention(wanted, flow, prompts, latents, config.rollout.guidance, alone)
        flow.attention = parts.attention
        notes += [told] if told else []
    compiler = None
    if config.model.compile and not compiles(config):
        notes.append(TOKENS_SHARED)
    elif config.model.compile:
        compiler = make_compiler(device, report, one_shape=config.data.photos is None or not config.data.bucket_step)
        if compiler is not None:
            compiler.blocks(flow.module, flow.block_types)
            parts.compiler = compiler
            notes.append(WARNING)
    if config.rollout.precision == "fp8":
        parts.rollout_copy = RolloutCopy(flow, getattr(torch, config.model.dtype), compiler)
    if can_record(config, flow, device):
        parts.replay = make_replay(device, report)
    return notes
