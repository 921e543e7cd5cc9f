"""How fast a training step is on this GPU, with FLUX.1-dev's shapes and the published recipe, setting by setting.

    PYTHONPATH=. python scripts/bench_step.py --out bench_step.json [--seconds 540] [--rows NAME ...]
    PYTHONPATH=. python scripts/bench_step.py --row "mine: model.compile=true data.batch_size=2" --profile step.txt

Needs no files: transformer, autoencoder, HPS v2's ViT-H-14 and prompts are random numbers made on the device. Each row
is a real learner in a process of its own; times are medians of the steps after the first ones, by the device's clock.
Every row begins with the same numbers, and ends with a rollout beside that of the exact path, of the same weights and
noise: nothing compiled, PyTorch's attention, every call. So does a row of one picture a step with its gradient, the
exact path's reward in float32.
Rows are written to --out as they come, and none is begun when less of --seconds is left than the longest before it
took. `--tiny` shrinks the models, to try the script on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_load import machine
from bench_memory import RandomFlux, gib, numbers
from bench_step_errors import gradient_error, rollout_error, waits

from srpo_core.assemble import trained_flow
from srpo_core.config import RunConfig
from srpo_core.description import load_run
from srpo_core.deterministic import deterministic
from srpo_core.devices import make_world
from srpo_core.duration import count_work, matmul_rate
from srpo_core.learner import Learner, Parts
from srpo_core.metrics import Clock
from srpo_core.parallel import World
from srpo_core.preference import ControlWords
from srpo_core.prompts import prompt_sequence
from srpo_core.rewards.clip import ClipReward, OpenClip
from srpo_core.rewards.clip_files import new_open_clip
from srpo_core.rewards.mixture import WeightedReward
from srpo_core.rollout_copy import RolloutCopy
from srpo_core.speed import speed_up
from srpo_core.training_data import TrainingData
from srpo_core.weights.eight_bit import to_fp8_rows
from srpo_core.weights.fp8_linear import scaled_product
from srpo_core.weights.loading import fill

KEPT = "model.recompute=false"
SMALL = "model.trained_memory=bfloat16 optim.states=8bit"
COMPILED = f"model.compile=true {KEPT} {SMALL}"
FAST = f"{COMPILED} rollout.precision=fp8"
CARD_24 = "lora.rank=16 lora.targets=attention model.recompute=true"
LORA = "lora.rank=32 model.trained_memory=float32 optim.states=float32"
ROWS = {
    "exact, eager": f"model.attention=native {SMALL}",
    "eager, kept activations": f"{KEPT} {SMALL}",
    "compiled": COMPILED,
    "compiled, fp8 rollout": FAST,
    "compiled, fp8 rollout, 15 calls": f"{FAST} rollout.calls=15",
    "compiled, fp8 rollout, 12 calls": f"{FAST} rollout.calls=12",
    "12 calls, reward in bfloat16": f"{FAST} rollout.calls=12 reward.dtype=bfloat16",
    "12 calls, what fits is kept": f"{FAST} model.recompute=auto rollout.calls=12 reward.dtype=bfloat16",
    "12 calls, what fits is kept, each call made": (
        f"{FAST} model.recompute=auto rollout.calls=12 reward.dtype=bfloat16 rollout.cuda_graph=false"
    ),
    "12 calls, both branches in one pass": f"{FAST} rollout.calls=12 reward.dtype=bfloat16 align.at_once=2",
    "12 calls, deterministic": f"{FAST} rollout.calls=12 reward.dtype=bfloat16 parallel.deterministic=true",
    "LoRA, compiled, fp8 rollout": f"{FAST} {LORA}",
    "LoRA, compiled, fp8 rollout, batch 4": f"{FAST} {LORA} data.batch_size=4",
    "LoRA, compiled, recomputed, fp8 rollout, batch 8": f"{FAST} {LORA} model.recompute=true data.batch_size=8",
    "compiled, recomputed, fp8 rollout, batch 4": f"{FAST} model.recompute=true data.batch_size=4",
    "LoRA for 24 GB": f"{CARD_24} model.frozen_memory=8bit",
    "LoRA for 24 GB, compiled, base and rollouts in fp8": (
        f"{CARD_24} model.frozen_memory=fp8 rollout.precision=fp8 model.compile=true"
    ),
    "4 micro-batches, rolled out together": f"{FAST} model.recompute=true optim.accumulation=4 rollout.at_once=4",
}
"""By name: settings on top of the published recipe at batch 1."""
TINY = "data.height=64 data.width=64"
WARM_UP, MEASURED = 2, 4
FP8_SIDE = {"cuda": 8192, "cpu": 256}


def describe(settings: str, tiny: bool, steps: int = WARM_UP + MEASURED) -> RunConfig:
    """The run of a row: the published recipe with its settings."""
    base = ["model.family=bench_memory:load", "data.prompts=builtin", "optim.accumulation=1", "reward.name=hpsv2"]
    base += [f"optim.steps={steps + 3}", "output.dir=unused"]
    return load_run("flux-dev-exact", [*base, *settings.split(), *(TINY.split() if tiny else [])])


def build(config: RunConfig, tiny: bool, world: World) -> tuple[RandomFlux, Parts, Learner]:
    """Random parts and a learner of them."""
    components = RandomFlux(config.model, world.device, *(((1, 1), 2) if tiny else ((19, 38), 24)))
    flow, _ = trained_flow(config, components, world)
    words = ControlWords(config.reward.liked, config.reward.disliked)
    length = config.optim.steps * config.optim.accumulation * config.data.batch_size * world.parts
    prompts = prompt_sequence(components.text_encoder, components.prompts["train"], 0, length)
    data = TrainingData(config.seed, (config.data.height, config.data.width), config.data.batch_size, prompts)
    reward = WeightedReward(
        "hpsv2", random_reward(world.device, tiny, getattr(torch, config.reward.dtype)), margin=config.reward.margin
    )
    held_out = components.text_encoder(components.prompts["eval"][:1])
    parts = Parts(flow, components.autoencoder, [reward], words, data, held_out)
    for note in speed_up(config, parts, world, lambda text: print(f"# {text}", flush=True)):
        print(f"# {note}", flush=True)
    return components, parts, Learner(config, world, parts)


def pictures_of(config: RunConfig) -> int:
    """How many pictures a step has."""
    return config.data.batch_size * config.optim.accumulation


def random_reward(device: torch.device, tiny: bool, dtype: torch.dtype) -> ClipReward:
    """HPS v2's shapes with random weights."""
    from open_clip import get_model_config

    model = new_open_clip(get_model_config("ViT-B-32" if tiny else "ViT-H-14"), quick_gelu=False)
    return ClipReward(OpenClip(fill(model, numbers(model, device), dtype, device, "random weights")))


def measure(config: RunConfig, tiny: bool, profile: Path | None, compare: bool) -> dict[str, object]:
    """A row: seconds by phase, memory, rates, and how far its rollouts and gradients are from the exact ones."""
    start = time.perf_counter()
    components, parts, learner = build(config, tiny, make_world(config.parallel))
    device, row = learner.world.device, {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        row["built_gib"] = gib(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    row["build_seconds"] = round(time.perf_counter() - start, 1)
    start, steps, memory, count = time.perf_counter(), [], [], config.optim.steps - 3
    for number in range(1, count + 1):
        if number == WARM_UP + 1:
            if device.type == "cuda":
                torch.cuda.reset_accumulated_memory_stats()
            row["warm_up_seconds"] = round(time.perf_counter() - start, 1)
        clock = Clock(learner.world.synchronize, device)
        metrics = learner.step(number, clock)
        steps.append(clock.seconds | {"step": clock.total()})
        told = {name: round(value, 3) for name, value in steps[-1].items()}
        print(f"# step {number}: {told} loss {metrics.loss:.6f} gradient {metrics.grad_norm:.6f}", flush=True)
        if device.type == "cuda":
            memory.append([gib(torch.cuda.memory_allocated()), gib(torch.cuda.max_memory_allocated())])
    row["first_step_seconds"] = round(steps[0]["step"], 1)
    measured = steps[WARM_UP:]
    seconds = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
    row["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    row["least_seconds"] = round(min(step["step"] for step in measured), 4)
    row["loss"], row["grad_norm"] = metrics.loss, metrics.grad_norm
    row["seconds_per_picture"] = round(seconds["step"] / pictures_of(config), 4)
    if device.type == "cuda":
        row["peak_gib"] = gib(torch.cuda.max_memory_allocated())
        row["reserved_gib"] = gib(torch.cuda.max_memory_reserved())
        row["recorded_gib"] = gib(learner.recorded_bytes())
        row["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        row["held_and_peak_gib_after_steps"] = {number: memory[number - 1] for number in sorted({1, 2, 3, count})}
    print("ROW " + json.dumps(row), flush=True)  # if what follows should fail
    print("# the host's waits, rates, errors", flush=True)
    if device.type == "cuda":
        row["waits"] = waits(lambda: learner.step(count + 1, Clock(lambda: None)))
    row |= rates(config, components, seconds["step"], device)
    if parts.rollout_copy is not None:
        row["seconds_of_codes"] = round(codes_seconds(parts.rollout_copy, learner.world), 4)
    row["rollout_error"] = rollout_error(config, parts, learner)
    if profile is not None:
        profile.write_text(profiled(lambda: learner.step(count + 2, Clock(lambda: None)), device))
    if compare:
        try:
            reward = random_reward(device, tiny, torch.float32)
            row |= gradient_error(config, parts, learner, reward, count + 3)
        except torch.OutOfMemoryError as error:
            row["gradient_error"] = {"error": f"two gradients don't fit: {error}"[:300]}
    return row


def rates(config: RunConfig, components: RandomFlux, step: float, device: torch.device) -> dict[str, object]:
    """Operations of a step that the recipe needs (recomputing isn't counted), their rate, and the ceilings of today.

    The floor is what a step would take if all were matrix products at the ceilings. The reward is left out (0.3 %).
    """
    work, pictures = count_work(config, components), pictures_of(config)
    calls = config.rollout.calls or config.rollout.num_steps
    rolled = pictures * calls * work.forward
    passes = 3 if not config.lora.rank else 2  # back to weights and inputs, or to inputs alone
    aligned = pictures * len(config.align.branches) * (passes * work.forward + 2 * work.decode)
    bf16, fp8 = matmul_rate(device, torch.bfloat16), fp8_rate(device)
    floor = rolled / (fp8 if config.rollout.precision == "fp8" else bf16) + aligned / bf16
    return {
        "host_microseconds_a_launch": round(1e6 * launch_seconds(device), 1),
        "tflop": round((rolled + aligned) / 1e12, 1),
        "tflop_per_second": round((rolled + aligned) / step / 1e12, 1),
        "ceilings_tflop_per_second": {"bf16": round(bf16 / 1e12), "fp8 by rows": round(fp8 / 1e12)},
        "floor_seconds": round(floor, 3),
        "share_of_ceiling": round(floor / step, 3),
    }


def launch_seconds(device: torch.device) -> float:
    """What the host takes to queue a small operation, as far as it is free to."""
    number = torch.zeros(1, device=device)
    times = []
    for _ in range(5):
        float(number)  # waits until the device has done what was queued
        start = time.perf_counter()
        for _ in range(500):  # fewer than a GPU's queue holds
            number.add_(1)
        times.append((time.perf_counter() - start) / 500)
    return statistics.median(times)


def fp8_rate(device: torch.device) -> float:
    """Operations a second of a large product in fp8 with a scale for each row; that of bfloat16 where there is none."""
    side = FP8_SIDE[device.type]
    matrix = torch.randn(side, side, device=device)
    codes, scale = to_fp8_rows(matrix)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = scaled_product(codes, scale, codes, scale)
        float(result[0, 0])
        return (time.perf_counter() - start) / count

    try:
        seconds(3)
        return 2 * side**3 / min(seconds(20 if device.type == "cuda" else 1) for _ in range(3))
    except RuntimeError:
        return matmul_rate(device, torch.bfloat16)


def codes_seconds(twin: RolloutCopy, world: World) -> float:
    """What making the codes of a copy takes, a part of the rollout's time."""
    clock = Clock(world.synchronize, world.device)
    with clock.phase("codes"), twin.filled():
        pass
    return clock.seconds["codes"]


def profiled(step: Callable[[], object], device: torch.device) -> str:
    """A table of what one step spends its time on: a GPU's kernels, or a CPU's operations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as prof:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return prof.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)


def child(args: argparse.Namespace) -> None:
    """Measure one row and print it as JSON, last of all."""
    config = describe(args.one, args.tiny, args.steps)
    if args.cap_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    try:
        with deterministic(config.parallel.deterministic):
            row = measure(config, args.tiny, args.profile, compare=not args.cap_gib and pictures_of(config) == 1)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:1500]}
        if torch.cuda.is_available():
            row["peak_gib"] = gib(torch.cuda.max_memory_allocated())
    print("ROW " + json.dumps({"settings": args.one, **row}), flush=True)


def rows_of(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    """Each row as soon as its steps are done, and again with what came after them."""
    wanted = {name: ROWS[name] for name in args.rows} if args.rows else {} if args.row else ROWS
    wanted |= dict(row.split(": ", 1) for row in args.row)
    began, longest = time.perf_counter(), 0.0
    for name, settings in wanted.items():
        left = args.seconds - (time.perf_counter() - began)
        if left < longest:
            print(f"no time left for: {name}", flush=True)
            continue
        start = time.perf_counter()
        command = [sys.executable, __file__, "--one", settings, *(["--tiny"] if args.tiny else [])]
        command += ["--profile", str(args.profile)] if args.profile else []
        command += ["--cap-gib", str(args.cap_gib)] if args.cap_gib else []
        command += ["--steps", str(args.steps)]
        row: dict[str, object] = {"settings": settings, "said": []}
        row |= {"cap_gib": args.cap_gib} if args.cap_gib else {}
        for line in told(command, left):
            if line.startswith("ROW "):
                row |= json.loads(line[4:])
                yield name, row  # as far as it has come, if this program is ended
            elif line.startswith("# "):
                row["said"].append(line[2:])
                print(line, flush=True)
            else:
                row["warned"] = [*row.get("warned", []), line[:300]][-20:]
        if "seconds" not in row and "error" not in row:
            row["error"] = "the process gave no row: " + " ".join(row.get("warned", ["no time left"])[-3:])
        longest = max(longest, time.perf_counter() - start)
        yield name, row | {"seconds_of_the_process": round(time.perf_counter() - start, 1)}


def told(command: list[str], seconds: float) -> Iterator[str]:
    """What a process says, line by line as it comes; it is ended after so many seconds, or if this one is."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            yield from (line.rstrip("\n") for line in process.stdout if line.strip())
        finally:
            timer.cancel()
            process.kill()


def main() -> None:
    """Measure the rows, one by one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="which of the script's rows; all")
    parser.add_argument("--row", action="append", default=[], help='a row of your own, "name: key=value key=value"')
    parser.add_argument("--seconds", type=float, default=3600.0, help="a row that hasn't ended by then is ended")
    parser.add_argument("--profile", type=Path, help="file for a table of what a step spends its time on")
    parser.add_argument(
        "--cap-gib",
        type=float,
        default=0.0,
        help="memory that a row may take, as a smaller card's; no gradients compared",
    )
    parser.add_argument("--steps", type=int, default=WARM_UP + MEASURED, help=f"of a row; those after {WARM_UP} count")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        child(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # a row's process goes with this one
    about = machine("PYTHONPATH=. python scripts/bench_step.py --out bench_step.json")
    rows: dict[str, object] = {}
    for name, row in rows_of(args):
        rows[name] = row
        keys = ("seconds", "seconds_per_picture", "warm_up_seconds", "peak_gib", "reserved_gib", "tflop_per_second",
                "share_of_ceiling", "rollout_error", "gradient_error", "gradient_repeated", "error")  # fmt: skip
        if "seconds_of_the_process" in row:
            print(f"{name}: {json.dumps({key: row[key] for key in keys if key in row})}", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
