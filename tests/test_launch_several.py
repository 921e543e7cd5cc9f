"""Runs of several processes: however one ends, none is left."""

import functools
import signal
import subprocess
import sys

import psutil
import pytest
from background_runs import LIMIT, ended, no_process_left, run, until  # noqa: F401

from srpo_core import launch
from srpo_core.checkpoint import latest
from srpo_core.files import write_atomic
from srpo_core.run_state import read_state

SEVERAL = {"parallel": {"device": "cpu", "processes": 2}}


def ranks_of(state):
    """The processes of a run of several, rank 0 first, and torchrun behind them."""
    launcher = psutil.Process(state.launcher)
    ranks = [process for process in launcher.children() if "train" in process.cmdline()]
    return [*sorted(ranks, key=lambda process: process.pid != state.pid), launcher]


def gone(processes):
    return not psutil.wait_procs(processes, timeout=LIMIT)[1]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whichever_of_several_processes_is_killed_none_is_left(tmp_path, victim):
    """2 is torchrun itself."""
    folder = tmp_path / "run"
    launch.start(run(folder, 9999, output__checkpoint_every=1, **SEVERAL))
    family = ranks_of(until(folder, lambda state: latest(folder) is not None))
    family[victim].kill()
    assert gone(family)
    state = until(folder, ended)
    expected = {0: ("killed",), 1: ("failed",), 2: ("failed", "killed")}  # rank 0 may see rank 1 end before itself
    assert state.status in expected[victim]
    if state.status == "failed":
        assert "another process of this run is gone" in state.error
        assert f"the last good checkpoint is {latest(folder)}" in state.error


def test_one_that_hangs_ends_with_all_of_several_processes(tmp_path):
    folder = tmp_path / "run"
    pid = launch.start(run(folder, 9999, **SEVERAL))
    state = until(folder, lambda state: state.step >= 1)
    family = ranks_of(state)
    assert (state.launcher, len(family)) == (pid, 3)
    assert state.pid == family[0].pid
    family[1].suspend()
    assert launch.stop(folder, patience=0.3).status == "killed"
    assert not [process for process in family if process.is_running()]


def test_several_processes_in_the_foreground(tmp_path):
    """As typed: the terminal's interrupt stops the run, and the exit code says so."""
    folder = tmp_path / "run"
    write_atomic(tmp_path / "run.yaml", run(folder, 9999, **SEVERAL).model_dump_json())
    command = [sys.executable, str(launch.MAIN), "train", str(tmp_path / "run.yaml")]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeds)
    state = until(folder, lambda state: state is not None and state.step >= 1)
    family = ranks_of(state)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 3
    assert "Go on with:" in said
    assert gone(family)
    assert read_state(folder).status == "stopped"
