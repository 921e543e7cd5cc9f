"""`srpo train`, `plan`, `status` and `stop`: runs planned, started, looked at and stopped, and what is said of them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

from srpo_core.config import RunConfig
from srpo_core.run_sources import command_line, train_config


def train(args: Namespace) -> int:
    """Train, write the report, say where everything is."""
    config = train_config(args.source, args.overrides)
    if args.check:
        return _check(config, args.resume)
    if args.background:
        return _start(config, args.resume)
    from srpo_core import gpus, launch, result

    if launch.is_several(config.parallel) and not _is_one_of_several():
        return _train_several(config, args.resume)
    result.check(config)
    if not _is_one_of_several():
        os.environ.update(
            gpus.environment(config.parallel, gpus.find(config.parallel))
        )  # CUDA reads it when it starts, which is later
    from srpo_core.assemble import train_run
    from srpo_core.session import STOPPED_EXIT_CODE

    outcome = train_run(config, resume=args.resume)
    if _is_one_of_several():
        return 0  # torchrun takes another number for a failure; the run's state says how it ended
    if not outcome.finished:
        _say_stopped(config, outcome.step)
        return STOPPED_EXIT_CODE
    _say_where(config, Path(outcome.run_dir))
    return 0


def _is_one_of_several() -> bool:
    """Whether torchrun started this process."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _train_several(config: RunConfig, resume: bool) -> int:
    """Train in processes that torchrun starts, and wait for them."""
    from srpo_core import launch
    from srpo_core.session import STOPPED_EXIT_CODE

    state = launch.foreground(config, resume)
    if state is not None and state.status == "finished":
        _say_where(config, Path(config.output.dir))
        return 0
    if state is not None and state.status == "stopped":
        _say_stopped(config, state.step)
        return STOPPED_EXIT_CODE
    reason = state.error or state.status if state is not None else "its processes ended before they began"
    print(f"srpo: {reason}", file=sys.stderr)
    return 1


def _say_stopped(config: RunConfig, step: int) -> None:
    state = "the state is saved" if step else "there is nothing to save yet"
    print(f"\nStopped after step {step} of {config.optim.steps}; {state}.")
    print(f"Go on with:  {command_line('train', config.output.dir, '--resume')}")


def _start(config: RunConfig, resume: bool) -> int:
    """Check a run, then start it in a process of its own."""
    from srpo_core import launch
    from srpo_core.run_state import LOG_FILE

    launch.check(config, resume)
    _check(config, resume)
    pid, run_dir = launch.start(config, resume), config.output.dir
    print(f"\nStarted as process {pid}; what it prints goes to {Path(run_dir) / LOG_FILE}")
    print(f"Look:  {command_line('status', run_dir)}\nStop:  {command_line('stop', run_dir)}")
    return 0


def status(args: Namespace) -> int:
    """Print a few lines about each run."""
    from srpo_core.run_state import FILE, describe

    runs = [Path(run) for run in args.runs] or [file.parent for file in sorted(Path("runs").glob(f"*/{FILE}"))]
    if not runs:
        print("no run in the folder runs has a state; name a run's folder")
    for run in runs:
        print("\n".join(describe(run)))
    return 0


def stop(args: Namespace) -> int:
    """Stop runs; 0 where none is at work any more."""
    from srpo_core import launch
    from srpo_core.run_state import describe

    for run in map(Path, args.runs):
        launch.stop(run, args.patience)
        print("\n".join(describe(run)))
    return 0


def _check(config: RunConfig, resume: bool) -> int:
    from srpo_core import result
    from srpo_core.plan import plan_run

    lines = plan_run(config, resume).rows
    if (place := result.check(config)) is not None:
        lines = [*lines, ("result", str(place))]
    print("The run is fine to start:\n" + "".join(f"  {name:<12} {text}\n" for name, text in lines), end="")
    return 0


def plan(args: Namespace) -> int:
    """Say what a run takes of a card; the exit code is that of wrong settings where it doesn't fit."""
    from srpo_core.card_plan import Cards, plan_cards

    planned = plan_cards(train_config(args.source, args.overrides), Cards(args.card_gb, args.gpus, args.tflops))
    print("".join(f"  {name:<8} {text}\n" for name, text in planned.rows()), end="")
    return 0 if planned.fits else 2


def _say_where(config: RunConfig, run_dir: Path) -> None:
    from srpo_core.checkpoint import best, latest
    from srpo_core.report import write_report

    try:
        page = str(write_report([run_dir]))
    except Exception as error:  # the run itself is done and saved: a page that fails must not look like a failed run
        page = f"not written ({error})"
    newest, finest = latest(run_dir), best(run_dir)
    lines = [("report", page), ("checkpoint", newest)]
    if finest is not None and finest != newest:
        lines.append(("best", finest))
    places = {
        "previews": run_dir / "previews",
        "evaluation": run_dir / "evaluation",
        "curves": run_dir / "metrics.jsonl",
    }
    lines += [(name, path) for name, path in places.items() if path.exists()]
    print(f"\nDone: {config.optim.steps} steps. Everything is in {run_dir}")
    print("".join(f"  {name:<11} {path}\n" for name, path in lines))
    kind = "a LoRA file for ComfyUI and diffusers" if config.lora.rank else "weights for diffusers and ComfyUI"
    print(f"Next:\n  {command_line('export', run_dir)}\n      {kind}")
    print(f"  {command_line('sample', run_dir)}\n      pictures of held-out prompts, or of your own with --prompt TEXT")
    print(f"  {command_line('report', run_dir)}\n      the report again; with several runs (seeds), one page about all")
