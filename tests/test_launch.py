"""Runs in processes of their own: real ones, of the miniature with few steps."""

import os
import signal
import socket
import time

import pytest

from srpo_core import cli, launch
from srpo_core.checkpoint import list_checkpoints
from srpo_core.config import ConfigError
from srpo_core.description import load_run
from srpo_core.metrics import read_metrics
from srpo_core.run_state import is_alive, log_tail, read_state, write_state

QUICK = [
    "data.batch_size=1", "rollout.num_steps=2", "output.preview_every=0", "output.evaluate_prompts=0",
    "output.tensorboard=false", "output.checkpoint_every=100", "optim.schedule=constant",
]  # fmt: skip
LIMIT = 120
"""Seconds in which a short run on a busy machine is done."""


@pytest.fixture(autouse=True)
def no_process_left(tmp_path):
    """Whatever a test that fails has started ends with it."""
    yield
    for file in tmp_path.rglob("state.json"):
        state = read_state(file.parent)
        if state is not None and state.pid != os.getpid() and state.host == socket.gethostname():
            launch.kill(state)


def run(folder, steps, *more):
    return load_run("miniature", [*QUICK, f"optim.steps={steps}", f"output.dir={folder}", *more])


def until(folder, condition):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        state = read_state(folder)
        if condition(state):
            return state
        time.sleep(0.05)
    pytest.fail(f"{read_state(folder)}\n" + "\n".join(log_tail(folder)))


def ended(state):
    return not state.active


def test_a_run_to_its_end(tmp_path):
    pid = launch.start(run(tmp_path / "run", 2))
    first = read_state(tmp_path / "run")
    assert first.pid == pid
    assert first.active
    last = until(tmp_path / "run", ended)
    assert (last.status, last.step, last.steps, last.pid) == ("finished", 2, 2, pid)
    assert "finished after step 2" in "\n".join(log_tail(tmp_path / "run"))


def test_stopped_between_steps_and_resumed(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 500))
    until(folder, lambda state: state.step >= 1)
    with pytest.raises(ConfigError, match="at work on this run"):
        launch.start(run(folder, 500), resume=True)
    state = launch.stop(folder, patience=LIMIT)
    assert state.status == "stopped"
    assert list_checkpoints(folder)[-1].name == f"step-{state.step:06d}"
    assert not is_alive(state)
    launch.start(run(folder, state.step + 1), resume=True)
    last = until(folder, ended)
    assert (last.status, last.step) == ("finished", state.step + 1)
    assert [line["step"] for line in read_metrics(folder)][-2:] == [state.step, state.step + 1]


def test_stopped_while_it_starts(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 500))
    state = launch.stop(folder, patience=LIMIT)
    assert (state.status, state.step) == ("stopped", 0)
    assert not (folder / "stop").exists()


def test_a_killed_run_is_found_killed(tmp_path):
    folder = tmp_path / "run"
    pid = launch.start(run(folder, 500))
    until(folder, lambda state: state.step >= 1)
    os.kill(pid, signal.SIGKILL)
    state = until(folder, ended)
    assert state.status == "killed"
    assert state.step >= 1


def test_a_run_that_fails_before_training_says_why(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 2, f"data.prompts={tmp_path}/none.txt"))
    state = until(folder, ended)
    assert state.status == "failed"
    assert "none.txt" in state.error


def test_one_that_does_not_heed_is_ended(tmp_path):
    folder = tmp_path / "run"
    pid = launch.start(run(folder, 500))
    until(folder, lambda state: state.status == "training")
    os.kill(pid, signal.SIGSTOP)
    assert launch.stop(folder, patience=0.3).status == "killed"


def test_a_reused_pid_is_not_the_run(tmp_path):
    write_state(tmp_path, "training", 10)
    assert read_state(tmp_path).status == "training"
    text = (tmp_path / "state.json").read_text()
    created = read_state(tmp_path).created
    (tmp_path / "state.json").write_text(text.replace(str(created), str(created - 100)))
    assert read_state(tmp_path).status == "killed"
    (tmp_path / "state.json").write_text("{")
    assert read_state(tmp_path) is None


def test_a_process_of_another_machine_is_let_be(tmp_path):
    """Its pid may be anyone's here: this very process, say."""
    write_state(tmp_path, "training", 10)
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace(f'"host": "{read_state(tmp_path).host}"', '"host": "elsewhere"'))
    with pytest.raises(ConfigError, match="runs on elsewhere"):
        launch.stop(tmp_path, patience=0.1)
    assert (tmp_path / "stop").exists()


def test_words_of_the_command_reach_it_as_they_are(tmp_path):
    odd = tmp_path / "a run; $(touch x) 'quoted'"
    launch.start(run(odd, 1))
    assert until(odd, ended).status == "finished"
    assert not (tmp_path / "x").exists()


def test_the_commands(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "miniature", *QUICK, "optim.steps=500", f"output.dir={folder}"]
    assert cli.main([*words, "--background"]) == 0
    said = capsys.readouterr().out
    assert "The run is fine to start" in said
    assert f" stop {folder}\n" in said
    until(folder, lambda state: state.step >= 1)
    assert cli.main(["status", str(folder)]) == 0
    assert " left (process " in capsys.readouterr().out
    assert cli.main([*words, "--background", "--resume"]) == 2
    assert "is at work on this run" in capsys.readouterr().err
    assert cli.main(["stop", str(folder), "--patience", str(LIMIT)]) == 0
    assert f"{folder}: stopped, step " in capsys.readouterr().out
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no run has trained there" in capsys.readouterr().err


def test_the_reason_of_a_failure_is_told(tmp_path, capsys):
    write_state(tmp_path, "failed", 10, error="the disk\nis full")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: failed, step 0 of 10\n  the disk\n  is full\n"
