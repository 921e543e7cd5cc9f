"""What a run is doing, as a file in its folder says: state.json, written by the training process itself.

A process that is killed can't write how it ended; whoever reads the file then finds the process gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from srpo_core.config import ConfigError
from srpo_core.files import write_atomic
from srpo_core.metrics import read_metrics

Status = Literal["starting", "training", "stopped", "finished", "failed", "killed"]
ACTIVE: tuple[Status, ...] = ("starting", "training")
FILE = "state.json"
STOP_FILE = "stop"
"""Its presence in a run's folder asks the run to finish its step, save and end."""
LOG_FILE = "train.log"
"""What a run in the background prints."""
TAIL_BYTES = 8192
PACE = 8
"""Steps that the time left is guessed by."""


@dataclass(frozen=True)
class RunState:
    """A run's state; `step` of `steps` is where its metrics stand."""

    status: Status
    pid: int
    created: float
    """When the process began, in seconds since 1970: with the pid, that names it for good."""
    host: str
    error: str = ""
    """Why it failed, in the words that the command line would print."""
    step: int = 0
    steps: int = 0

    @property
    def active(self) -> bool:
        """Whether a process works on the run."""
        return self.status in ACTIVE


def write_state(run_dir: Path, status: Status, steps: int, pid: int | None = None, error: str = "") -> None:
    """Say what the process `pid` (default: this one) does in a run's folder."""
    process = psutil.Process(pid)
    record = RunState(status, process.pid, process.create_time(), socket.gethostname(), error, steps=steps)
    write_atomic(run_dir / FILE, json.dumps(asdict(record), indent=1))


def read_state(run_dir: Path) -> RunState | None:
    """A run's state by now; None where no process has said anything.

    A process that is gone without a word was killed; or it failed before training, and its log says why.
    """
    try:
        state = RunState(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    lines = read_metrics(run_dir)
    changes = {"step": lines[-1]["step"] if lines else 0}
    if state.active and not is_alive(state):
        failed = state.status == "starting"
        changes |= {"status": "failed", "error": "\n".join(log_tail(run_dir))} if failed else {"status": "killed"}
    return replace(state, **changes)


def is_alive(state: RunState) -> bool:
    """Whether the process that wrote a state is still there; of one on another machine that is believed."""
    if state.host != socket.gethostname():
        return True
    try:
        process = psutil.Process(state.pid)
        gone = process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - state.created) > 1
    except psutil.NoSuchProcess:
        return False
    return not gone


@contextlib.contextmanager
def told(run_dir: Path, steps: int) -> Iterator[None]:
    """Inside the context the run is training; an exception that leaves it is written down as the reason it failed.

    A request to stop that came while this process was starting holds; an older one is forgotten.
    """
    before = read_state(run_dir)
    if before is None or before.pid != os.getpid():
        clear_stop(run_dir)
    write_state(run_dir, "training", steps)
    try:
        yield
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        write_state(run_dir, "failed", steps, error=reason)
        raise
    finally:
        clear_stop(run_dir)


def ask_to_stop(run_dir: Path) -> None:
    """Ask the run in a folder to finish its step, save and end."""
    write_atomic(run_dir / STOP_FILE, f"{os.getpid()}\n")


def stop_asked(run_dir: Path) -> bool:
    """Whether someone asked the run to end."""
    return (run_dir / STOP_FILE).exists()


def clear_stop(run_dir: Path) -> None:
    """Forget that someone asked."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def describe(run_dir: Path) -> list[str]:
    """A run's state in words: a line, and below it why it failed. ConfigError where there is no run."""
    state = read_state(run_dir)
    if state is None:
        raise ConfigError(f"{run_dir} holds no {FILE}: no run has trained there")
    line = f"{run_dir}: {state.status}, step {state.step} of {state.steps}"
    left = seconds_left(run_dir, state)
    if left is not None:
        line += f", about {round(left) // 60}:{round(left) % 60:02d} left (process {state.pid} on {state.host})"
    return [line, *(f"  {text}" for text in state.error.splitlines())]


def seconds_left(run_dir: Path, state: RunState) -> float | None:
    """Seconds until a run at work is done, at the pace of its last steps; None where there is none to go by."""
    took = [line["seconds"]["total"] for line in read_metrics(run_dir) if line["step"] and "seconds" in line][-PACE:]
    return sum(took) / len(took) * (state.steps - state.step) if took and state.active else None


def log_tail(run_dir: Path, lines: int = 20) -> list[str]:
    """The last lines that a run in the background printed; none where there is no log."""
    path = run_dir / LOG_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []
