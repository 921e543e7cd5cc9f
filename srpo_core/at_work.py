"""A process at work on a run: what it holds meanwhile, what it says, and what it notices."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from srpo_core.config import ParallelConfig, RunConfig
from srpo_core.device_locks import device_key
from srpo_core.device_locks import held as device_held
from srpo_core.parallel import World
from srpo_core.processes import birth, is_running
from srpo_core.run_folder import check_start, held
from srpo_core.run_state import Telling, told

LOOK_EVERY = 1.0
SIGN_EVERY = 10
"""Looks between two signs of life."""


def work_folder(config: RunConfig) -> Path:
    """Where a machine's part of a run tells of itself: output.dir on the first one, else node-1, node-2, ... in it."""
    rank = config.parallel.node_rank if config.parallel.nodes > 1 else 0
    return Path(config.output.dir) / (f"node-{rank}" if rank else "")


@contextlib.contextmanager
def at_work(config: RunConfig, world: World, resume: bool = False) -> Iterator[Telling | None]:
    """Inside the context this process trains the run: its folder and its device are taken, its state is told.

    Gives what tells the state on each machine's first process, None on others. ConfigError if the run can't start in
    output.dir or go on there, or if another process trains there or on the device.
    """
    launcher = os.getppid() if world.size > 1 else 0
    with contextlib.ExitStack() as stack:
        telling = None
        if world.is_main:
            check_start(config, resume)
            stack.enter_context(held(Path(config.output.dir)))
        if world.is_main or os.environ.get("LOCAL_RANK") == "0":
            telling = stack.enter_context(told(work_folder(config), config.optim.steps, launcher))
        stack.enter_context(_device(config.parallel, world, config.output.dir))
        stack.enter_context(_watch(telling, launcher))
        yield telling


def _device(parallel: ParallelConfig, world: World, run_dir: str) -> contextlib.AbstractContextManager[None]:
    return device_held(parallel, device_key(world.device), Path(run_dir).absolute())


@contextlib.contextmanager
def _watch(telling: Telling | None, launcher: int) -> Iterator[None]:
    """Show signs of life; end this process if the one that holds all of the run is gone, as nobody else would."""
    done = threading.Event()
    began = birth(launcher) if launcher else ""

    def is_held() -> bool:  # POSIX gives an orphan another parent
        return is_running(launcher, began) if os.name == "nt" else os.getppid() == launcher

    def look() -> None:
        for count in itertools.count():
            if done.wait(LOOK_EVERY):
                return
            if launcher and not is_held():
                print("srpo: the process that started this one is gone", file=sys.stderr, flush=True)
                os._exit(1)
            if telling is not None and count % SIGN_EVERY == 0:
                telling.sign()

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
