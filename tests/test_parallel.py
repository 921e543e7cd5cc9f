"""Training with two processes: real ones, which torchrun starts, and gloo between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from background_runs import LIMIT, no_process_left, until  # noqa: F401
from tiny import tiny_config

from srpo_core import launch
from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, read_tensors
from srpo_core.config import RunConfig
from srpo_core.evaluate import read_evaluation
from srpo_core.learner import Learner
from srpo_core.metrics import Clock, over_processes, read_metrics
from srpo_core.run_state import is_alive, read_state

TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS), str(TESTS.parent)])
ENVIRONMENT = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
ONE_BRANCH = {
    "align__branches": ["denoise"], "rollout__same_noise": False, "optim__ema_decay": 0.9, "optim__steps": 4,
    "output__evaluate_prompts": 3, "output__keep_checkpoints": 9,
}  # fmt: skip
"""With one branch a micro-batch is one backward pass: sums of two have one order, and so the same last digits."""


def train(config: RunConfig, description: Path) -> str:
    """Train as typed, in the foreground and to the end; all that is said."""
    description.write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, str(launch.MAIN), "train", str(description)],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


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
    told = train(tiny_config(two, parallel__processes=2, **ONE_BRANCH), tmp_path / "two.json")
    state = read_state(two)
    assert (state.status, state.step) == ("finished", 4)
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
    assert told.count("finished after step 4") == told.count("preview at step 4") == told.count("Done: ") == 1
    assert (two / "report.html").is_file()
    assert "ChildFailedError" not in told, told

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
    assert "ChildFailedError" not in told, told
    record = json.loads((latest(folder) / "state.json").read_text())
    assert record["processes"] == 2
    learner = learner_from(checkpoint_folder(folder, 2), tmp_path / "reference", optim__steps=9, optim__accumulation=2)
    for step in (3, 4):
        learner.step(step, Clock(lambda: None))
    reached = read_tensors(checkpoint_folder(folder, 4), "weights")
    assert all(torch.equal(reached[name], p.detach()) for name, p in learner.trained.items())


def test_measurements_are_put_together():
    """Floats are means, counts are sums, whatever the nesting; what some lack is that of the others."""
    parts = [
        {"loss": 1.0, "score": {"denoise": 0.5}, "source": {"rollouts": 2, "photos": 1}},
        {"loss": 2.0, "score": {"denoise": 1.0}, "source": {"rollouts": 2}},
    ]
    wanted = {"loss": 1.5, "score": {"denoise": 0.75}, "source": {"rollouts": 4, "photos": 1}}
    assert over_processes(parts) == wanted
