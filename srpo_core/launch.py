"""`srpo train` in a process of its own, which outlives the one that starts it; found again by its run's folder."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from srpo_core.config import ConfigError, RunConfig
from srpo_core.files import write_atomic
from srpo_core.run_folder import check_start
from srpo_core.run_state import LOG_FILE, RunState, ask_to_stop, clear_stop, is_alive, read_state, write_state

MAIN = Path(__file__).with_name("__main__.py")


def train_command(run_file: Path | str, resume: bool = False, python: str = sys.executable) -> list[str]:
    """The command that trains a run's description, a word each: for this process's Python, and for no shell."""
    return [python, str(MAIN), "train", str(run_file), *(["--resume"] if resume else [])]


def start(config: RunConfig, resume: bool = False, environment: Mapping[str, str] | None = None) -> int:
    """Start a run's training in a process of its own; its pid. What it prints goes to train.log in its folder.

    The description is run.json there. ConfigError if the run can't start there, or is at work already.
    """
    run_dir = Path(config.output.dir)
    check_idle(config)
    check_start(config, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_file = run_dir / "run.json"
    write_atomic(run_file, config.model_dump_json(indent=1))
    clear_stop(run_dir)
    command = train_command(run_file.resolve(), resume)
    with (run_dir / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})}, **_apart(),
        )  # fmt: skip
    state = read_state(run_dir)
    if state is None or state.pid != process.pid:  # it may have begun to tell of itself
        write_state(run_dir, "starting", config.optim.steps, process.pid)
    return process.pid


def check_idle(config: RunConfig) -> None:
    """ConfigError if a process works on the run already."""
    state = read_state(Path(config.output.dir))
    if state is not None and state.pid != os.getpid() and is_alive(state):
        raise ConfigError(
            f"output.dir={config.output.dir!r}: process {state.pid} is at work on this run; stop it first, or name"
            " another folder"
        )


def _apart() -> dict[str, object]:
    """What keeps a process alive, and out of its parent's Ctrl-C, when the parent ends."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def stop(run_dir: Path, patience: float = 60.0) -> RunState | None:
    """Have a run finish its step, save and end; after `patience` seconds end its processes. Its state then.

    ConfigError if it runs on another machine and is not done by then.
    """
    state = read_state(run_dir)
    if state is None or not state.active:
        return state
    ask_to_stop(run_dir)
    end = time.monotonic() + patience
    while is_alive(state) and time.monotonic() < end:
        time.sleep(0.05)
    kill(state)
    return read_state(run_dir)


def kill(state: RunState) -> None:
    """End a run's process and all that it started, now. ConfigError if it runs on another machine."""
    if not is_alive(state):
        return
    if state.host != socket.gethostname():
        raise ConfigError(f"process {state.pid} runs on {state.host}, and can be ended only there")
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(state.pid)
        family = [process, *process.children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=10)
