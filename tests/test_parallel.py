"""Training with two processes: real ones, which torchrun starts, and gloo between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny import tiny_config

from srpo_core import launch
from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, read_tensors
from srpo_core.config import RunConfig
from srpo_core.evaluate import read_evaluation
from srpo_core.learner import Learner
from srpo_core.metrics import Clock, over_processes, read_metrics
from srpo_core.run_state import RunState, is_alive, log_tail, read_state

TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS), str(TESTS.parent)])
ENVIRONMENT = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
LIMIT = 180
"""Seconds in which a short run on a busy machine is done."""
ONE_BRANCH = {
    "align__branches": ["denoise"], "rollout__same_noise": False, "optim__ema_decay": 0.9, "optim__steps": 4,
    "output__evaluate_prompts": 3, "output__keep_checkpoints": 9,
}  # fmt: skip
"""With one branch a micro-batch is one backward pass: sums of two have one order, and so the same last digits."""


@pytest.fixture(autouse=True)
def no_process_left(tmp_path):
    """Whatever a test that fails has started ends with it."""
    yield
    for file in tmp_path.rglob("state.json"):
        state = read_state(file.parent)
        if state is not None and state.pid != os.getpid():
            launch.kill(state)


def until(folder: Path, condition) -> RunState:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        state = read_state(folder)
        if state is not None and condition(state):
            return state
        time.sleep(0.05)
    pytest.fail(f"{read_state(folder)}\n" + "\n".join(log_tail(folder, 40)))


def train(config: RunConfig, resume: bool = False) -> RunState:
    """Train in processes of its own, to the end."""
    launch.start(config, resume, ENVIRONMENT)
    return until(Path(config.output.dir), lambda state: not state.active)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, average and optimizer's state, bit for bit."""
    for name in ("weights", "ema", "optimizer"):
        ours, theirs = read_tensors(one, name), read_tensors(other, name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


def learner_from(checkpoint: Path, folder: Path, **settings) -> Learner:
    """A learner in this process that goes on from a checkpoint."""
    learner = assemble(tiny_config(folder, **ONE_BRANCH | settings)).learner
    learner.restore(checkpoint)
    return learner


def test_what_processes_can_rely_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(TESTS / "parallel_laws.py"), str(tmp_path)],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank-0").exists()
    assert (tmp_path / "rank-1").exists()


def test_two_processes_are_one_with_twice_the_micro_batches(tmp_path):
    """Weights, averages, optimizer, pictures and scores, bit for bit; and each goes on where the other stood."""
    two, one = tmp_path / "two", tmp_path / "one"
    state = train(tiny_config(two, parallel__processes=2, **ONE_BRANCH))
    assert (state.status, state.step) == ("finished", 4), state.error
    assemble(tiny_config(one, optim__accumulation=2, **ONE_BRANCH)).train()
    for step in (2, 4):
        assert same_tensors(checkpoint_folder(two, step), checkpoint_folder(one, step))
    assert read_evaluation(two) == read_evaluation(one)
    drawn = [path.relative_to(one) for path in (*one.glob("evaluation/**/*.png"), *one.glob("previews/*"))]
    assert len(drawn) == 6 + 2 * 3
    for path in drawn:
        assert (two / path).read_bytes() == (one / path).read_bytes()
    for ours, theirs in zip(read_metrics(two), read_metrics(one), strict=True):
        assert ours.get("preview") == theirs.get("preview")
        assert ours.get("source") == theirs.get("source")
        for name in ("loss", "sigma", "grad_norm", "velocity_drift") if ours["step"] else ():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    told = (two / launch.LOG_FILE).read_text()
    assert told.count("finished after step 4") == told.count("preview at step 4") == 1
    assert "ChildFailedError" not in told

    longer = tiny_config(two, **ONE_BRANCH | {"optim__steps": 6})  # one process goes on with what two began
    assert assemble(longer).train(resume=True).finished
    learner = learner_from(checkpoint_folder(two, 4), tmp_path / "reference", optim__steps=6)
    for step in (5, 6):
        learner.step(step, Clock(lambda: None))
    reached = read_tensors(checkpoint_folder(two, 6), "weights")
    assert all(torch.equal(reached[name], p.detach()) for name, p in learner.trained.items())


def test_stopped_by_a_file_and_gone_on_with_by_more_processes(tmp_path):
    folder = tmp_path / "run"
    settings = ONE_BRANCH | {"optim__steps": 2, "output__evaluate_prompts": 0}
    assemble(tiny_config(folder, **settings)).train()  # one process begins
    launch.start(tiny_config(folder, parallel__processes=2, **settings | {"optim__steps": 5000}), True, ENVIRONMENT)
    until(folder, lambda state: state.step >= 4)
    state = launch.stop(folder, LIMIT)
    assert state.status == "stopped", state.error
    assert latest(folder) == checkpoint_folder(folder, state.step)
    assert not is_alive(state)
    told = (folder / launch.LOG_FILE).read_text()
    assert "2 instead of 1 processes train from here on" in told
    assert "ChildFailedError" not in told
    record = json.loads((latest(folder) / "state.json").read_text())
    assert record["processes"] == 2
    learner = learner_from(checkpoint_folder(folder, 2), tmp_path / "reference", optim__steps=9, optim__accumulation=2)
    for step in (3, 4):
        learner.step(step, Clock(lambda: None))
    reached = read_tensors(checkpoint_folder(folder, 4), "weights")
    assert all(torch.equal(reached[name], p.detach()) for name, p in learner.trained.items())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_process_that_dies_ends_the_run_with_a_reason(tmp_path):
    folder = tmp_path / "run"
    launch.start(
        tiny_config(folder, parallel__processes=2, optim__steps=100_000, output__preview_every=0), False, ENVIRONMENT
    )
    state = until(folder, lambda state: state.step >= 2)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(state.launcher).children()}
    assert ranks[0].pid == state.pid
    ranks[1].send_signal(signal.SIGKILL)
    last = until(folder, lambda state: not state.active)
    assert last.status == "failed"
    assert "another process of this run is gone" in last.error
    assert f"the last good checkpoint is {latest(folder)}" in last.error
    psutil.wait_procs(ranks.values(), timeout=60)
    assert not any(child.is_running() for child in ranks.values())


def test_measurements_are_put_together():
    """Floats are means, counts are sums, whatever the nesting; what some lack is that of the others."""
    parts = [
        {"loss": 1.0, "score": {"denoise": 0.5}, "source": {"rollouts": 2, "photos": 1}},
        {"loss": 2.0, "score": {"denoise": 1.0}, "source": {"rollouts": 2}},
    ]
    wanted = {"loss": 1.5, "score": {"denoise": 0.75}, "source": {"rollouts": 4, "photos": 1}}
    assert over_processes(parts) == wanted
