"""How long a run takes: by its own steps where it has some, else by arithmetic over what the device can do.

Arithmetic: the operations of a step, counted on the models' outlines, over the rate of a matrix product that is tried
on the device, times the share of it that runs have shown. A GPU works while the host starts what comes next, so a small
pass takes as long as starting its operations; what a LoRA and matrices in fewer bits add comes on top. The numbers are
fitted to steps of FLUX.1-dev's shapes on an H100 and an H200 (scripts/results/memory.json, bench_step.json), whole ones
within 15 %. Equal steps differed by a third on a busy host: say "about".
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from srpo_core.checks import Footprint
from srpo_core.compiling import compiles
from srpo_core.config import RunConfig
from srpo_core.interfaces import Components, PromptBatch
from srpo_core.metrics import read_metrics
from srpo_core.training_data import sources

PROBE_SIDE = {"cuda": 4096, "mps": 4096, "cpu": 1024}
"""Sides of the matrices that a device is tried with: a few milliseconds of work and 100 MB at most."""
PROBE_SECONDS, PROBE_TRIES = 0.2, 5
SHARE = {"cuda": 0.46, "mps": 0.4, "cpu": 0.42}
"""Of that rate, in a model's forward and backward passes."""
DECODER_SHARE = {"cuda": 0.06, "mps": 0.12, "cpu": 0.55}
BLOCK_SECONDS = 1.85e-3
"""What starting a block's operations on a GPU takes in a forward pass, while those before it run."""
LORA_SECONDS, UNPACK_SECONDS = 0.32e-3, 0.63e-3
"""What a forward pass on a GPU takes longer for a layer's LoRA, and for a block whose frozen matrices are unpacked."""
UNPACKED = ("8bit", "4bit")
"""Forms of model.frozen_memory whose numbers are made from their codes in each pass."""
BACKWARD = 2
"""A backward pass starts so many times the operations of a forward pass."""
AGAIN = {True: 1.0, "auto": 0.5, False: 0.0}
"""How many forward passes are made again, by model.recompute; auto keeps what fits, of which nothing tells."""
FORWARD = 0.6
"""What a forward pass takes of what SHARE, an average with the longer backward pass, makes of it."""
COMPILED, FP8 = 0.74, 0.79
"""What compiled blocks take of the others' time, and blocks with matrices in fp8 of that (H200)."""
STEADY, STEADY_BACKWARD = 1.3, 2.4
"""How much longer a rollout and a gradient take with parallel.deterministic (H200)."""
BANDWIDTH = 2e12
"""Bytes a second that an optimizer on a GPU reads and writes."""
DRIFT_PICTURES = 2
RECENT = 20
"""Steps whose pace tells that of the rest."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a run's parts."""

    step: float
    """An optimizer step and what is due after each."""
    picture: float
    """A held-out picture, drawn and scored."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations for one picture."""

    forward: float
    """Of the model, with its prompt."""
    decode: float
    blocks: int


def count_work(config: RunConfig, components: Components) -> Work:
    """Counted on the models' outlines on meta, which takes about a second for a large model."""
    flow, autoencoder = _on_meta(components.outline()), _on_meta(components.autoencoder_outline())
    meta = torch.device("meta")
    latents = torch.empty(1, *flow.latent_shape(config.data.height, config.data.width), device=meta)
    embeds = {name: torch.empty(1, *shape, device=meta) for name, shape in components.embeds_outline().items()}
    prompts = PromptBatch(("",), embeds)
    sigma = torch.empty(1, device=meta)
    forward = _operations(lambda: flow.velocity(latents, sigma, prompts, config.align.guidance))
    blocks = sum(isinstance(module, flow.block_types) for module in flow.module.modules())
    return Work(forward, _operations(lambda: autoencoder.decode(latents)), blocks)


def _on_meta(part: Any) -> Any:
    """A flow or autoencoder whose module is a copy on meta, in float32; the part itself stays as it is."""
    outline = copy.copy(part)
    module: nn.Module = part.module
    held = [*module.parameters(), *module.buffers()]
    memo = {id(one): one.detach().to("meta") if not isinstance(one, nn.Parameter) else _empty(one) for one in held}
    outline.module = copy.deepcopy(module, memo)
    return outline


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    floating = parameter.is_floating_point()
    return nn.Parameter(parameter.detach().to("meta", torch.float32 if floating else None), requires_grad=False)


@torch.no_grad()
def _operations(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on the device, by the fastest of some tries.

    Takes about a quarter of a second.
    """
    side = PROBE_SIDE.get(device.type, 1024)
    matrix = torch.ones(side, side, device=device, dtype=dtype)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = matrix @ matrix
        float(result[0, 0])  # waits for the device
        return (time.perf_counter() - start) / count

    seconds(2)
    count = max(1, min(100, round(PROBE_SECONDS / PROBE_TRIES / max(seconds(1), 1e-6))))
    return 2 * side**3 / min(seconds(count) for _ in range(PROBE_TRIES))


def expected_pace(config: RunConfig, footprint: Footprint, work: Work, rate: float, kind: str) -> Pace:
    """By arithmetic, on a device of type `kind` that does `rate` operations a second in a matrix product."""
    batch = _forward(config, footprint, work, rate, kind, config.data.batch_size) / config.data.batch_size
    picture = config.output.preview_steps * batch + work.decode / (rate * DECODER_SHARE.get(kind, 0.2))
    return Pace(sum(expected_phases(config, footprint, work, rate, kind).values()), picture)


def expected_phases(config: RunConfig, footprint: Footprint, work: Work, rate: float, kind: str) -> dict[str, float]:
    """Seconds of an optimizer step's phases; see `expected_pace`."""
    data, align, model, optim = config.data, config.align, config.model, config.optim
    again = AGAIN[model.recompute]
    steady = config.parallel.deterministic and kind == "cuda"
    passes = 2 + FORWARD * again + (not config.lora.rank)  # back to the input, and to weights that are trained
    busy, started = passes * data.batch_size * work.forward / (rate * _share(config, kind)), 1 + again + BACKWARD
    aligned = max(busy, started * _starting(config, work, kind))
    aligned += started * _lora(config, footprint, kind) + (2 + again) * _unpacking(config, work, kind)
    aligned += (2 + again) * data.batch_size * work.decode / (rate * DECODER_SHARE.get(kind, 0.2))
    aligned *= STEADY_BACKWARD if steady else 1.0
    on_photos, on_prompts = sources(data, config.seed, optim.steps * optim.accumulation)
    calls = config.rollout.calls or config.rollout.num_steps
    faster = FP8 if config.rollout.precision == "fp8" and kind == "cuda" else 1.0
    faster *= STEADY if steady else 1.0
    rolled_out = calls * faster * _forward(config, footprint, work, rate, kind, data.batch_size)
    held = footprint.held(config) + 2 * footprint.held_while_training(config)
    return {
        "rollout": optim.accumulation * rolled_out * on_prompts / (on_photos + on_prompts),
        "gradient step": optim.accumulation * len(align.branches) * align.draws_per_rollout * aligned,
        "optimizer": 2 * footprint.trained * held / BANDWIDTH if kind == "cuda" else 0.0,
        "drift": _forward(config, footprint, work, rate, kind, DRIFT_PICTURES),
    }


def _share(config: RunConfig, kind: str) -> float:
    """Of the rate of a matrix product, in the model's passes."""
    return SHARE.get(kind, 0.4) / (COMPILED if _compiled(config, kind) else 1.0)


def _compiled(config: RunConfig, kind: str) -> bool:
    return compiles(config) and kind == "cuda"


def _starting(config: RunConfig, work: Work, kind: str) -> float:
    """Seconds to start a forward pass's operations; few are left of compiled blocks."""
    return 0.0 if kind == "cpu" or _compiled(config, kind) else work.blocks * BLOCK_SECONDS


def _lora(config: RunConfig, footprint: Footprint, kind: str) -> float:
    """Seconds that a LoRA adds to a forward pass; compiled, it is one with its layers."""
    return 0.0 if kind == "cpu" or _compiled(config, kind) else footprint.layers * LORA_SECONDS


def _unpacking(config: RunConfig, work: Work, kind: str) -> float:
    """Seconds that frozen matrices in fewer bits add to a pass."""
    return work.blocks * UNPACK_SECONDS if kind != "cpu" and config.model.frozen_memory in UNPACKED else 0.0


def _forward(config: RunConfig, footprint: Footprint, work: Work, rate: float, kind: str, pictures: int) -> float:
    """Seconds of a forward pass."""
    busy = pictures * work.forward / (rate * _share(config, kind))
    beside = _lora(config, footprint, kind) + _unpacking(config, work, kind)
    return max(busy, _starting(config, work, kind)) + beside


def own_pace(run_dir: Path | str, preview_prompts: int) -> Pace | None:
    """By the last steps that the run in a folder has made; None where it has made none, or drew no preview."""
    lines = [line["seconds"] for line in read_metrics(run_dir) if line["step"] and "total" in line.get("seconds", {})]
    if not lines:
        return None
    step = statistics.median(line["total"] - line.get("preview", 0.0) for line in lines[-RECENT:])
    drawn = [line["preview"] for line in lines if "preview" in line]
    return Pace(step, statistics.median(drawn) / preview_prompts if drawn else 0.0)


def run_seconds(config: RunConfig, pace: Pace, done: int = 0) -> float:
    """From step `done` to the end: steps, previews and evaluation; loading and encoding are left out."""
    output, steps = config.output, config.optim.steps
    if output.preview_every:
        previews = steps // output.preview_every - done // output.preview_every + (not done)
        previews += bool(steps % output.preview_every and done < steps)
    else:
        previews = 0
    evaluations = 2 - bool(done) if output.evaluate_prompts else 0
    pictures = previews * output.preview_prompts + evaluations * output.evaluate_prompts
    return (steps - done) * pace.step + pictures * pace.picture
