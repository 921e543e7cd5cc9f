"""A request to stop is heeded within a model call, wherever a run is, and costs no more than the step it is in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from background_runs import LIMIT
from tiny import tiny_config, weights_hash
from toy_run import SETTINGS as TOY

from srpo_core import launch
from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, read_tensors
from srpo_core.metrics import read_metrics
from srpo_core.run_state import ask_to_stop, read_state
from srpo_core.stopping import StopRequested, StopSignals
from srpo_core.trainer import Trainer

SETTINGS = {
    "optim__steps": 3, "optim__accumulation": 2, "optim__ema_decay": 0.9, "optim__schedule": "cosine",
    "align__draws_per_rollout": 2, "output__preview_every": 2, "output__evaluate_prompts": 3,
}  # fmt: skip
PROBE = 3 + 1  # a rollout and the base's velocity
EVALUATION = 2 * 2  # Euler steps of two batches
BASE_PREVIEW = 2
STEP = 2 * (3 + 2 * 2)  # micro-batches of a rollout and two draws of two branches
CALLS = {
    "the probe": (2, 0),
    "the evaluation before training": (PROBE + 3, 0),
    "the preview of the base": (PROBE + EVALUATION + 1, 0),
    "the first rollout": (PROBE + EVALUATION + BASE_PREVIEW + 2, 0),
    "a branch": (PROBE + EVALUATION + BASE_PREVIEW + STEP + 1 + 3 + 2, 1),
    "the second micro-batch": (PROBE + EVALUATION + BASE_PREVIEW + STEP + 1 + STEP // 2 + 1, 1),
    "a preview": (PROBE + EVALUATION + BASE_PREVIEW + 2 * (STEP + 1) + 1, 2),
    "the evaluation after training": (PROBE + EVALUATION + BASE_PREVIEW + 3 * (STEP + 1) + 2 * 2 + 1, 3),
}
"""Calls of the model after which a request comes, and the step that is saved then."""
BEFORE_STEP_0 = ("the probe", "the evaluation before training", "the preview of the base")


def watch(trainer: Trainer, at: int, ask: Callable[[], None]) -> list[int]:
    """Ask while the model is called for the `at`-th time; the list grows by one with each call."""
    calls, velocity = [], trainer.flow.velocity

    def watched(*args):
        calls.append(len(calls) + 1)
        if len(calls) == at:
            ask()
        return velocity(*args)

    trainer.flow.velocity = watched
    return calls


def course(run_dir: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run that was never interrupted, and a fingerprint of its weights."""
    run_dir = tmp_path_factory.mktemp("whole")
    trainer = assemble(tiny_config(run_dir, **SETTINGS))
    trainer.train()
    return run_dir, weights_hash(trainer.flow.module)


@pytest.mark.parametrize("moment", CALLS)
def test_stopped_anywhere_and_resumed_it_is_the_same_run_bit_for_bit(tmp_path, whole, moment):
    at, step = CALLS[moment]
    trainer = assemble(tiny_config(tmp_path, **SETTINGS))
    calls = watch(trainer, at, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = trainer.train()
    assert (outcome.step, outcome.finished) == (step, False)
    assert len(calls) == at
    assert read_state(tmp_path).status == "stopped"
    told = [line["step"] for line in read_metrics(tmp_path)]
    assert told == list(range(step + 1)) or (moment in BEFORE_STEP_0 and not told)
    assert (latest(tmp_path) is None) == (step == 0)
    assert all(parameter.grad is None for parameter in trainer.flow.module.parameters())

    resumed = assemble(tiny_config(tmp_path, **SETTINGS))
    assert resumed.train(resume=True).finished
    theirs, fingerprint = whole
    assert weights_hash(resumed.flow.module) == fingerprint
    for name in ("weights", "ema", "optimizer"):
        one, other = (read_tensors(checkpoint_folder(run, 3), name) for run in (tmp_path, theirs))
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one)
    assert course(tmp_path) == course(theirs)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        path.name for path in (theirs / "checkpoints").iterdir()
    }


def test_a_step_is_dropped_whole(tmp_path):
    """A request during any of a step's model calls is heeded before the next one, and leaves the weights alone."""
    settings = SETTINGS | {"output__preview_every": 0, "output__evaluate_prompts": 0}
    first = assemble(tiny_config(tmp_path / "first", **settings | {"optim__steps": 1}))
    first.train()
    for call in (1, 3, 4, 5, 8, 9, 11, STEP):
        run_dir = tmp_path / str(call)
        trainer = assemble(tiny_config(run_dir, **settings))
        calls = watch(trainer, PROBE + STEP + 1 + call, lambda: signal.raise_signal(signal.SIGINT))
        assert trainer.train().step == 1
        assert len(calls) == PROBE + STEP + 1 + call
        assert weights_hash(trainer.flow.module) == weights_hash(first.flow.module)


def test_a_request_in_the_folder_is_heeded_during_a_step(tmp_path):
    trainer = assemble(tiny_config(tmp_path, optim__steps=1, optim__accumulation=4096, output__preview_every=0))
    calls = watch(trainer, PROBE + 5, lambda: ask_to_stop(tmp_path))
    assert trainer.train().step == 0
    assert len(calls) < 4096 * 5
    assert not (tmp_path / "stop").exists()


def test_a_run_whose_folder_is_removed_ends(tmp_path):
    """Nobody could ask it to stop any more, and it doesn't bring its folder's weights back."""
    trainer = assemble(tiny_config(tmp_path / "run", **SETTINGS | {"optim__steps": 10_000}))
    at, _ = CALLS["a branch"]
    watch(trainer, at, lambda: shutil.rmtree(tmp_path / "run"))
    assert not trainer.train().finished
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_stop_is_no_error_that_others_could_swallow():
    with pytest.raises(StopRequested):
        try:
            raise StopRequested
        except Exception:
            pytest.fail("swallowed")


def test_work_that_loses_nothing_ends_anywhere():
    wanted = []
    signals = StopSignals(lambda: wanted.append("told"), lambda: bool(wanted))
    with signals as stop, pytest.raises(StopRequested), stop.anywhere():
        wanted.append("asked")
        while True:
            time.sleep(0.01)
    assert wanted == ["asked", "told"]
    with pytest.raises(StopRequested), stop.anywhere():
        pytest.fail("it was asked before")


SLOW = """
import time
import toy_run

def load(config, device):
    components = toy_run.load(config, device)
    components.text_encoder = lambda prompts: time.sleep(3600)
    return components

def load_reward(config, device):
    for _ in range(360000):
        try:
            time.sleep(0.01)
        except Exception:
            pass
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("what", "how"), [("model__family", "a file"), ("reward__name", "a signal")])
def test_loading_and_encoding_are_left_at_once(tmp_path, what, how):
    (tmp_path / "slow.py").write_text(SLOW)
    folder, name = tmp_path / "run", {"model__family": "slow:load", "reward__name": "slow:load_reward"}[what]
    section, _, key = what.partition("__")
    settings = TOY | {section: TOY[section] | {key: name}}
    (tmp_path / "run.json").write_text(tiny_config(folder, **settings).model_dump_json())
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, str(launch.MAIN), "train", str(tmp_path / "run.json")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while (state := read_state(folder)) is None or not state.phase:
            assert process.poll() is None
            time.sleep(0.05)
        if how == "a file":
            ask_to_stop(folder)
        else:
            process.terminate()
        assert process.wait(timeout=LIMIT) == 3
        assert "stopped before a step was trained" in process.stdout.read()
        assert read_state(folder).status == "stopped"
        assert not (folder / "stop").exists()
    finally:
        process.kill()
        process.wait()
