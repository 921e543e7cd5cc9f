"""Runs in processes of their own, for tests that start some: of the toy world, so that a second or two is Python's."""

import os
import socket
import time
from pathlib import Path

import pytest
from tiny import tiny_config
from toy_run import SETTINGS

from srpo_core import launch
from srpo_core.run_state import log_tail, read_state

LIMIT = 300
"""Seconds in which a short run on a busy machine is done: what is waited for has always come much earlier."""


@pytest.fixture(autouse=True)
def no_process_left(tmp_path, monkeypatch):
    """Whatever a test that fails has started ends with it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the toy world is
    yield
    end_all(tmp_path)


def end_all(folder):
    """End the processes of the runs below a folder."""
    for file in folder.rglob("state.json"):
        state = read_state(file.parent)
        if state is not None and state.pid != os.getpid() and state.host == socket.gethostname():
            launch.kill(state)


def run(folder, steps, **more):
    settings = {"optim__steps": steps, "output__preview_every": 0, "output__checkpoint_every": 100, **more}
    return tiny_config(folder, **SETTINGS, **settings)


def until(folder, condition):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        state = read_state(folder)
        if condition(state):
            return state
        if state is not None and not state.active:
            break
        time.sleep(0.05)
    pytest.fail(f"{read_state(folder)}\n" + "\n".join(log_tail(folder)))


def ended(state):
    return not state.active
