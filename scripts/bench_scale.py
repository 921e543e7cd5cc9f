"""What a training step takes on several GPUs, with FLUX.1-dev's shapes and the published recipe, a picture for each.

    PYTHONPATH=. torchrun --nproc-per-node=1 scripts/bench_scale.py --out scale.json
    PYTHONPATH=. torchrun --nproc-per-node=2 scripts/bench_scale.py --out scale.json

All weights are trained, in parts (parallel.strategy=shard) in float32 with float32 moments. One GPU has no room for
that: it trains weights in bfloat16 with moments in 8 bits, by the same model calls. Efficiency is a GPU's pictures a
second among N over those of one alone; --out keeps the rows of every launch. Needs no files (scripts/bench_step.py).
Times are medians of the steps after the first two, of the slowest process. `--tiny` shrinks the models, to try it with
gloo on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench_memory import gib
from bench_step import build, describe, launch_seconds, profiled

from srpo_core.config import ParallelConfig
from srpo_core.devices import training_world
from srpo_core.metrics import Clock
from srpo_core.parallel import World

ALONE = "model.trained_memory=bfloat16 optim.states=8bit"
SHARDED = "model.trained_memory=float32 optim.states=float32 parallel.strategy=shard"
KEPT = "parallel.gathered=step model.compile=true model.recompute=auto"
ROWS = {
    "gathered by layer": "",
    "gathered for the rollout": "parallel.gathered=rollout",
    "gathered for the step": "parallel.gathered=step",
    "gathered for the step, compiled": "parallel.gathered=step model.compile=true",
    "gathered for the step, compiled, what fits is kept": KEPT,
    "what fits is kept, each rollout call made": f"{KEPT} rollout.cuda_graph=false",
    "what fits is kept, both branches in one pass": f"{KEPT} align.at_once=2",
    "what fits is kept, gradients in bfloat16": f"{KEPT} parallel.gradients=bfloat16",
    "what fits is kept, gradients and reward in bfloat16": f"{KEPT} parallel.gradients=bfloat16 reward.dtype=bfloat16",
    "12 calls": f"{KEPT} rollout.calls=12",
    "12 calls, both branches in one pass": f"{KEPT} rollout.calls=12 align.at_once=2",
    "two share a picture of 704 x 720": "parallel.context=2 parallel.gathered=step data.width=704",
    "the whole model on each, 12 calls, fp8 rollout": (
        "parallel.strategy=replicate model.trained_memory=bfloat16 optim.states=8bit model.compile=true"
        " model.recompute=auto rollout.calls=12 rollout.precision=fp8 reward.dtype=bfloat16"
    ),
}
"""By name: settings on top of the recipe and of SHARDED; one GPU has no use for those of parallel."""
WARM_UP, MEASURED = 2, 8


def settings_of(row: str, world: World) -> str:
    """A row's settings on this number of GPUs."""
    if world.size > 1:
        return f"{SHARDED} parallel.processes={world.size} {row}"
    return " ".join([ALONE, *(word for word in row.split() if not word.startswith("parallel."))])


def measure(settings: str, tiny: bool, profile: Path | None) -> dict[str, object]:
    """Seconds by phase, of the slowest process, and each one's memory."""
    config = describe(settings, tiny, WARM_UP + MEASURED)
    world = training_world(config.parallel)
    cuda = world.device.type == "cuda"
    start = time.perf_counter()
    _, _, learner = build(config, tiny, world)
    world.exchange(None)
    row: dict[str, object] = {"settings": settings, "build_seconds": round(time.perf_counter() - start, 1)}
    steps = []
    for number in range(1, WARM_UP + MEASURED + 1):
        if cuda and number == WARM_UP + 1:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_accumulated_memory_stats()
        clock = Clock(world.synchronize, world.device)
        metrics = learner.step(number, clock)
        each = world.exchange(clock.seconds | {"step": clock.total()})
        steps.append({name: max(one[name] for one in each) for name in each[0]})
        if world.is_main:
            told = {name: round(value, 3) for name, value in steps[-1].items()}
            print(f"# step {number}: {told} loss {metrics.loss:.6f} gradient {metrics.grad_norm:.6f}", flush=True)
    row["pictures"] = world.parts
    row["first_step_seconds"] = round(steps[0]["step"], 1)
    measured = steps[WARM_UP:]
    row["seconds"] = {name: round(statistics.median(step[name] for step in measured), 4) for name in measured[0]}
    row["each_step_seconds"] = [round(step["step"], 3) for step in measured]
    if cuda:
        row["held_gib"] = world.exchange(gib(torch.cuda.memory_allocated()))
        row["peak_gib"] = world.exchange(gib(torch.cuda.max_memory_allocated()))
        row["reserved_gib"] = world.exchange(gib(torch.cuda.max_memory_reserved()))
        row["recorded_gib"] = world.exchange(gib(learner.recorded_bytes()))
        row["host_microseconds_a_launch"] = world.exchange(round(1e6 * launch_seconds(world.device), 1))
        row["allocator_retries"] = world.exchange(torch.cuda.memory_stats()["num_alloc_retries"])
    if profile is not None:
        told = profiled(lambda: learner.step(WARM_UP + MEASURED + 1, Clock(lambda: None)), world.device)
        if world.is_main:
            profile.write_text(told, encoding="utf-8")
    return row


def gathering_rate(world: World, tiny: bool) -> float:
    """Bytes a second that a process gets from the others as they gather a tensor of 1 GiB (NCCL's bus bandwidth)."""
    count = 2**16 if tiny else 2**29
    part = torch.randn(count // world.size, device=world.device).bfloat16()
    whole = part.new_empty(part.numel() * world.size)
    times = []
    for _ in range(10):
        clock = Clock(world.synchronize, world.device)
        with clock.phase("gathering"):
            dist.all_gather_into_tensor(whole, part)
        times.append(clock.seconds["gathering"])
    return (whole.nbytes - part.nbytes) / statistics.median(times)


def keep(out: Path, world: World, name: str, row: dict[str, object]) -> None:
    """Put a row beside those of other launches, with their efficiency where one GPU's is there."""
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    record |= {"device": device, "torch": torch.__version__}
    record.setdefault(str(world.size), {})[name] = row
    alone = record.get("1", {}).get(name)
    for size in filter(str.isdecimal, record if alone else ()):
        if size != "1" and name in record[size]:
            several = record[size][name]
            each = several["pictures"] / int(size) / several["seconds"]["step"]
            several["efficiency"] = round(each * alone["seconds"]["step"] / alone["pictures"], 3)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the rows, one by one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("bench_scale.json"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", action="append", default=[], help='a row of your own, "name: key=value key=value"')
    parser.add_argument("--profile", type=Path, help="file for a table of what the last row's step spends its time on")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    world = training_world(ParallelConfig(strategy="shard"))
    wanted = {name: ROWS[name] for name in args.rows} | dict(row.split(": ", 1) for row in args.row)
    done: dict[str, dict[str, object]] = {}
    with world.joined():
        rate = gathering_rate(world, args.tiny) if world.size > 1 else None
        for name, row in wanted.items():
            settings = settings_of(row, world)
            told = done[settings] = dict(done.get(settings) or measure(settings, args.tiny, args.profile))
            told |= {} if rate is None else {"gathering_gb_per_second": round(rate / 1e9, 2)}
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            if world.is_main:
                keep(args.out, world, name, told)
                print(f"{world.size} x {name}: {json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main()
