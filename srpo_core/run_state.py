"""What a run is doing, as a file in its folder says: state.json, written by the training process itself.

A process that is killed can't write how it ended; whoever reads the file then finds the process gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from srpo_core.config import ConfigError
from srpo_core.files import write_atomic
from srpo_core.metrics import metrics_file, read_metrics
from srpo_core.processes import birth, is_running, lineage
from srpo_core.time_words import duration_text

Status = Literal["starting", "training", "stopped", "finished", "failed", "killed"]
ACTIVE: tuple[Status, ...] = ("starting", "training")
FILE = "state.json"
STOP_FILE = "stop"
"""Its presence in a run's folder asks the run to save and end."""
LOG_FILE = "train.log"
"""What a run in the background prints."""
TAIL_BYTES = 8192
RECENT_BYTES = 1 << 16
"""End of metrics.jsonl that is read for the step and the pace."""
PACE = 8
"""Steps that the time left is guessed by."""
TELL_EVERY = 0.5
"""Seconds between two words about how far a phase is."""
SILENT = 120.0
"""Seconds without a sign of life (Telling.sign) after which a run on another machine counts as killed."""


@dataclass(frozen=True)
class RunState:
    """A run's state; `step` of `steps` is where its metrics stand."""

    status: Status
    """It is "starting" until models are loaded, while ending it loses nothing, then "training" until all is written."""
    pid: int
    created: str
    """When the process began (processes.birth): with the pid, that names it for good."""
    host: str
    error: str = ""
    """Why it failed, in the words that the command line would print."""
    step: int = 0
    steps: int = 0
    phase: str = ""
    """What it does just now, such as "encoding prompts" or "preview"; "" where that isn't told."""
    phase_done: int = 0
    phase_total: int = 0
    """Things in the phase; 0 where nothing is counted."""
    began: float = 0.0
    """When this part of the run began, in seconds since 1970."""
    ended: float | None = None
    """When it ended; of a killed one the last sign of life."""
    launcher: int = 0
    """The process that holds those of a run of several (torchrun); 0 where there is none."""
    launcher_created: str = ""
    worked: float = 0.0
    """Seconds that its parts before this one took."""

    @property
    def active(self) -> bool:
        """Whether a process works on the run."""
        return self.status in ACTIVE


_STATE = TypeAdapter(RunState)


class Telling:
    """What the process at work on a run says about it; `outcome` is how it ends where nothing goes wrong."""

    outcome: Status = "stopped"

    def __init__(self, run_dir: Path, state: RunState) -> None:
        self._run_dir, self._state, self._told = run_dir, state, 0.0
        self._write()

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Say what is done just now, and how far it is. A new phase is told at once, else every TELL_EVERY seconds."""
        now, changed = time.monotonic(), name != self._state.phase
        self._state = replace(self._state, phase=name, phase_done=done, phase_total=total)
        if changed or now - self._told >= TELL_EVERY:
            self._told = now
            with contextlib.suppress(OSError):  # a full disk is told about by what needs it
                self._tell(durable=False)

    def training(self) -> None:
        """Say that everything is loaded."""
        self._state = replace(self._state, status="training")
        self._tell()

    def end(self, status: Status, error: str = "") -> None:
        """Say how it ended."""
        error = error.encode(errors="replace").decode()  # names of files may hold what is no text
        self._state = replace(self._state, status=status, error=error, phase="", phase_done=0, phase_total=0)
        self._state = replace(self._state, ended=time.time())
        self._tell()

    def sign(self) -> None:
        """Show that the process is there, to those on other machines."""
        with contextlib.suppress(OSError):
            os.utime(self._run_dir / FILE)

    def _tell(self, durable: bool = True) -> None:
        """Write it, unless the folder is gone: a run that someone removed doesn't come back as a folder without one."""
        if self._run_dir.is_dir():
            self._write(durable)

    def _write(self, durable: bool = True) -> None:
        write_atomic(self._run_dir / FILE, json.dumps(asdict(self._state), indent=1), durable)


def write_state(run_dir: Path, status: Status, steps: int, pid: int | None = None, error: str = "") -> None:
    """Say what the process `pid` (default: this one) does in a run's folder."""
    Telling(run_dir, replace(_state_of(status, steps, pid, error), worked=_worked(read_state(run_dir))))


def _state_of(status: Status, steps: int, pid: int | None = None, error: str = "", launcher: int = 0) -> RunState:
    pid = os.getpid() if pid is None else pid
    ended = None if status in ACTIVE else time.time()
    return RunState(
        status, pid, birth(pid), socket.gethostname(), error, steps=steps, began=time.time(), ended=ended,
        launcher=launcher, launcher_created=birth(launcher) if launcher else "",
    )  # fmt: skip


def _worked(before: RunState | None) -> float:
    """Seconds that a run had taken when it was in a state; none where no step of it is left."""
    if before is None or not before.step:
        return 0.0
    return before.worked + max(0.0, (before.ended or before.began) - before.began)


def read_state(run_dir: Path) -> RunState | None:
    """A run's state by now; None where no process has said anything.

    A process that is gone without a word was killed; or it failed before training, and its log says why. A file that
    holds something else, whoever wrote it, is no word.
    """
    path = Path(run_dir) / FILE
    try:
        state, seen = _STATE.validate_json(path.read_bytes(), strict=True), path.stat().st_mtime
    except (OSError, ValueError):
        return None
    lines = recent_metrics(run_dir)
    changes: dict[str, Any] = {"step": lines[-1]["step"] if lines else 0}
    silent = state.host != socket.gethostname() and time.time() - seen > SILENT
    if state.active and (silent or not is_alive(state)):
        failed = state.status == "starting" and not silent
        changes |= {"status": "failed", "error": "\n".join(log_tail(run_dir))} if failed else {"status": "killed"}
        changes["ended"] = seen
    return replace(state, **changes)


def is_alive(state: RunState) -> bool:
    """Whether a process of the run is still there; of one on another machine its state is believed."""
    if state.host != socket.gethostname():
        return state.active
    launched = state.launcher != 0 and is_running(state.launcher, state.launcher_created)
    return launched or is_running(state.pid, state.created)


@contextlib.contextmanager
def told(run_dir: Path, steps: int, launcher: int = 0) -> Iterator[Telling]:
    """Inside the context this process works on the run; an exception that leaves it is the reason why it failed.

    `launcher` is the process that started this one as one of several, if any. A request to stop that came while they
    were starting holds; an older one is forgotten.
    """
    before, state = read_state(run_dir), _state_of("starting", steps, launcher=launcher)
    if before is not None and before.pid in lineage():
        state = replace(state, began=before.began, worked=before.worked)
    else:
        state = replace(state, worked=_worked(before))
        clear_stop(run_dir)
    telling = Telling(run_dir, state)
    try:
        yield telling
    except BaseException as error:
        telling.end("failed", "interrupted" if isinstance(error, KeyboardInterrupt) else _reason(error))
        raise
    else:
        telling.end(telling.outcome)
    finally:
        clear_stop(run_dir)


def _reason(error: BaseException) -> str:
    """An error in words; those of a bug with its kind, as messages such as "'key'" say little alone."""
    expected = isinstance(error, ConfigError | OSError) or type(error).__module__.startswith("srpo_core.")
    return str(error) if str(error) and expected else f"{type(error).__name__}: {error}".removesuffix(": ")


def ask_to_stop(run_dir: Path) -> None:
    """Ask the run in a folder to save and end; one whose folder is gone hears nothing."""
    with contextlib.suppress(FileNotFoundError):
        (run_dir / STOP_FILE).touch()


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
        if not run_dir.is_dir():
            places = "runs/one or ComfyUI/output/srpo/my-look"
            raise ConfigError(f"{run_dir}: there is no such folder; name a run's folder, such as {places}")
        raise ConfigError(f"{run_dir} holds no {FILE}: no run has trained there")
    line = f"{run_dir}: {state.status}, step {state.step} of {state.steps}"
    if state.active and state.phase not in ("", "training"):
        count = f" {state.phase_done} of {state.phase_total}" if state.phase_total else ""
        line += f", {state.phase}{count}"
    left = seconds_left(run_dir, state)
    if left is not None:
        line += f", about {duration_text(left)} left"
    if state.active:
        line += f" (process {state.pid} on {state.host})"
    return [line, *(f"  {text}" for text in state.error.splitlines())]


def seconds_left(run_dir: Path, state: RunState) -> float | None:
    """Seconds until a run at work is done, at the pace of its last steps; None where there is none to go by."""
    seconds = [line.get("seconds") for line in recent_metrics(run_dir) if line["step"]]
    totals = [one.get("total") for one in seconds if isinstance(one, dict)]
    took = [total for total in totals if isinstance(total, int | float)][-PACE:]
    return sum(took) / len(took) * (state.steps - state.step) if took and state.active else None


def recent_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The last of a run's lines, by step: cheap, however long the run is. All where a line is very long."""
    path = metrics_file(run_dir)
    try:
        with path.open("rb") as file:
            start = max(0, path.stat().st_size - RECENT_BYTES)
            file.seek(start)
            texts = file.read().splitlines()
    except OSError:
        return []
    steps: dict[int, dict[str, Any]] = {}
    for text in texts[1:] if start else texts:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            steps[int(line["step"])] = line | {"step": int(line["step"])}
    return [steps[step] for step in sorted(steps)] if steps or not start else read_metrics(run_dir)


def log_tail(run_dir: Path, lines: int = 20) -> list[str]:
    """The last lines that a run in the background printed; none where there is no log."""
    path = run_dir / LOG_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []
