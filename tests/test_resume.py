"""Stopping and going on: bit for bit the run that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from background_runs import LIMIT
from tiny import tiny_config, weights_hash

from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, list_checkpoints, load_weights, read_tensors
from srpo_core.config import ConfigError
from srpo_core.evaluate import read_evaluation
from srpo_core.metrics import read_metrics
from srpo_core.run_folder import changed_settings, held
from srpo_core.session import Outcome

KINDS = {
    "full": {},
    "lora": {"lora__rank": 2, "model__dtype": "bfloat16"},
    "mixture": {"reward__more": [{"name": "tiny:load_reward", "scale": 0.5, "offset": 0.1, "weight": 3.0}]},
}
COURSE = {
    "optim__steps": 7, "optim__warmup_steps": 3, "optim__schedule": "cosine", "optim__accumulation": 2,
    "optim__ema_decay": 0.9, "align__draws_per_rollout": 2, "output__checkpoint_every": 3, "output__preview_every": 2,
}  # fmt: skip


def interrupt_at(trainer, step: int, number: int = signal.SIGINT) -> None:
    """Have a signal arrive in the middle of a step, which is then dropped."""
    learn = trainer.learner.step

    def interrupted(current, clock):
        if current == step:
            signal.raise_signal(number)
        return learn(current, clock)

    trainer.learner.step = interrupted


def whole_and_resumed(tmp_path, **settings):
    """The trainers of a run left alone ("whole") and of one interrupted and resumed ("broken"), which end alike."""
    whole = assemble(tiny_config(tmp_path / "whole", **settings))
    whole.train()
    broken = assemble(tiny_config(tmp_path / "broken", **settings))
    interrupt_at(broken, 5)
    broken.train()
    resumed = assemble(tiny_config(tmp_path / "broken", **settings))
    resumed.train(resume=True)
    assert weights_hash(resumed.flow.module) == weights_hash(whole.flow.module)
    return whole, resumed


def fail_at(trainer, step: int) -> None:
    """Have the process die in the middle of a step."""
    learn = trainer.learner.step

    def failing(current, clock):
        if current == step:
            raise KeyboardInterrupt
        return learn(current, clock)

    trainer.learner.step = failing


def course(run_dir: Path) -> list[dict]:
    """The run's lines without what depends on the machine."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in read_metrics(run_dir)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    settings = COURSE | KINDS[kind]
    whole = assemble(tiny_config(tmp_path / "whole", **settings))
    whole.train()
    broken = assemble(tiny_config(tmp_path / "broken", **settings))
    interrupt_at(broken, 5)
    outcome = broken.train()
    assert (outcome.step, outcome.finished) == (4, False)
    assert latest(tmp_path / "broken").name == "step-000004"
    resumed = assemble(tiny_config(tmp_path / "broken", **settings))
    assert resumed.train(resume=True).finished
    assert weights_hash(resumed.flow.module) == weights_hash(whole.flow.module)
    for name in ("weights", "ema", "optimizer"):
        ours, theirs = (read_tensors(checkpoint_folder(tmp_path / run, 7), name) for run in ("whole", "broken"))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)
    assert course(tmp_path / "broken") == course(tmp_path / "whole")


def test_stopping_between_checkpoints_saves(tmp_path):
    trainer = assemble(tiny_config(tmp_path, output__checkpoint_every=4, output__preview_every=0))
    interrupt_at(trainer, 4, signal.SIGTERM)
    assert trainer.train() == Outcome(3, False, tmp_path)
    assert latest(tmp_path).name == "step-000003"


def test_what_came_after_the_checkpoint_is_dropped_and_done_again(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=6, output__checkpoint_every=2)).train()
    before = course(tmp_path)
    newest = latest(tmp_path)
    for path in newest.iterdir():
        path.unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    trainer = assemble(tiny_config(tmp_path, optim__steps=6, output__checkpoint_every=2))
    trainer.train(resume=True)
    assert course(tmp_path) == before


def test_a_line_that_a_killed_run_did_not_write_comes_from_its_checkpoint(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=2)).train()
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assemble(tiny_config(tmp_path, optim__steps=3)).train(resume=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_more_steps_may_be_asked_for(tmp_path):
    whole = assemble(tiny_config(tmp_path / "whole", optim__steps=6))
    whole.train()
    assemble(tiny_config(tmp_path / "longer", optim__steps=3)).train()
    longer = assemble(tiny_config(tmp_path / "longer", optim__steps=6))
    longer.train(resume=True)
    assert weights_hash(longer.flow.module) == weights_hash(whole.flow.module)


def test_resuming_with_other_settings_is_refused(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=2)).train()
    changed = tiny_config(tmp_path, optim__steps=3, optim__lr=2e-3, data__batch_size=1)
    with pytest.raises(ConfigError, match=r"(?s)data.batch_size: 2 there, 1 now.*optim.lr: 0.001 there, 0.002 now"):
        assemble(changed).train(resume=True)
    cosine = {"optim__schedule": "cosine", "optim__lr": 2e-3, "data__batch_size": 1}
    with pytest.raises(ConfigError, match=r"optim.schedule: 'constant' there"):
        assemble(tiny_config(tmp_path, optim__steps=4, **cosine)).train(resume=True)


@pytest.mark.parametrize("changed", [False, True])
def test_prompts_that_changed_since_are_told(tmp_path, capsys, changed):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na blue dog\n", encoding="utf-8")
    run = {"data__prompts": str(prompts), "output__checkpoint_every": 1}
    assemble(tiny_config(tmp_path / "run", optim__steps=1, **run)).train()
    if changed:
        prompts.write_text("a red cat\na blue dog\na house\n", encoding="utf-8")
    capsys.readouterr()
    assert assemble(tiny_config(tmp_path / "run", optim__steps=2, **run)).train(resume=True).finished
    assert ("the prompts or photos are others" in " ".join("".join(capsys.readouterr()).split())) is changed


def test_two_processes_never_train_in_one_folder(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=1)).train()
    with held(tmp_path), pytest.raises(ConfigError, match="another process is training there"):
        assemble(tiny_config(tmp_path, optim__steps=2)).train(resume=True)
    assert assemble(tiny_config(tmp_path, optim__steps=2)).train(resume=True).step == 2


def test_a_folder_with_a_run_is_not_started_over(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=1)).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match="already holds a run; go on with it"):
        assemble(tiny_config(tmp_path, optim__steps=1)).train()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_resuming_where_nothing_was_saved_starts_from_the_base(tmp_path, capsys):
    assert assemble(tiny_config(tmp_path / "new", optim__steps=1)).train(resume=True).step == 1
    assert "no checkpoint in" in capsys.readouterr().out
    stopped = assemble(tiny_config(tmp_path / "early"))
    fail_at(stopped, 1)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    with pytest.raises(ConfigError, match="already holds a run"):
        assemble(tiny_config(tmp_path / "early")).train()
    assert assemble(tiny_config(tmp_path / "early", optim__lr=2e-3)).train(resume=True).finished
    assert [line["step"] for line in read_metrics(tmp_path / "early")] == [0, 1, 2, 3, 4]


def test_a_run_that_failed_before_its_first_step_may_be_started_over(tmp_path):
    failed = assemble(tiny_config(tmp_path, output__preview_every=0))
    fail_at(failed, 1)
    with pytest.raises(KeyboardInterrupt):
        failed.train()
    assert assemble(tiny_config(tmp_path, data__batch_size=1)).train().finished


def test_the_base_is_evaluated_once(tmp_path):
    settings = {"optim__steps": 3, "output__evaluate_prompts": 3}
    trainer = assemble(tiny_config(tmp_path, **settings))
    interrupt_at(trainer, 3, signal.SIGTERM)
    assert trainer.train().step == 2
    before = read_evaluation(tmp_path)["before"]
    picture = tmp_path / "evaluation" / "before" / "000.png"
    written = picture.stat().st_mtime_ns
    assemble(tiny_config(tmp_path, **settings)).train(resume=True)
    record = read_evaluation(tmp_path)
    assert picture.stat().st_mtime_ns == written and record["before"] == before and record["after_step"] == 3


def test_a_second_signal_aborts_at_once(tmp_path):
    trainer, before = assemble(tiny_config(tmp_path)), signal.getsignal(signal.SIGINT)
    learn = trainer.learner.step

    def twice(current, clock):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return learn(current, clock)

    trainer.learner.step = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before


TRAIN = """
import sys, time, torch
from pathlib import Path
from srpo_core.assemble import assemble
from srpo_core.description import load_run

torch.set_num_threads(1)
trainer, asked, held = assemble(load_run(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
learn = trainer.learner.step

def step(current, clock):
    while current == held and not asked.exists():
        time.sleep(0.01)
    return learn(current, clock)

trainer.learner.step = step
sys.exit(0 if trainer.train(resume=bool(sys.argv[4])).finished else 3)
"""


def start(run_dir: Path, resume: bool) -> subprocess.Popen:
    """A training process on the tiny family, which waits at step HELD until it has been asked to stop."""
    tests = Path(__file__).parent
    settings = run_dir.with_suffix(".json")
    settings.write_text(json.dumps(tiny_config(run_dir, **KILLED).model_dump()))
    path = os.pathsep.join([str(tests), str(tests.parent)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [str(settings), str(asked_of(run_dir)), str(HELD), "resume" if resume else ""]
    return subprocess.Popen([sys.executable, "-c", TRAIN, *words], env=environment, stdout=subprocess.DEVNULL)


def asked_of(run_dir: Path) -> Path:
    """The file that tells a training process that a signal has been sent."""
    return run_dir.with_suffix(".asked")


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not any(line["step"] >= step for line in read_metrics(run_dir)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


HELD = 18
KILLED = {"optim__steps": 20, "optim__ema_decay": 0.9, "output__checkpoint_every": 1, "output__preview_every": 0}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kill_minus_nine_and_sigterm_lose_nothing(tmp_path):
    run_dir = tmp_path / "killed"
    process = start(run_dir, resume=False)
    wait_for_step(process, run_dir, 6)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(read_metrics(run_dir))
    for folder in list_checkpoints(run_dir):
        load_weights(folder, assemble(tiny_config(tmp_path / "other")).flow.module)
    assert int(latest(run_dir).name[-6:]) >= done - 1

    process = start(run_dir, resume=True)
    wait_for_step(process, run_dir, 12)
    process.terminate()
    asked_of(run_dir).touch()
    assert process.wait(timeout=LIMIT) == 3
    assert int(latest(run_dir).name[-6:]) == len(read_metrics(run_dir))

    resumed = assemble(tiny_config(run_dir, **KILLED))
    assert resumed.train(resume=True).finished
    whole = assemble(tiny_config(tmp_path / "whole", **KILLED))
    whole.train()
    assert weights_hash(resumed.flow.module) == weights_hash(whole.flow.module)
    assert course(run_dir) == course(tmp_path / "whole")
    assert not list(run_dir.rglob(".tmp*"))


@pytest.mark.parametrize(
    ("name", "value", "free"),
    [
        ("model__compile", True, True), ("model__attention", "math", True), ("model__recompute", "auto", True),
        ("rollout__at_once", 2, True), ("rollout__calls", 2, False), ("rollout__precision", "fp8", False),
        ("reward__margin", 0.5, False),
    ],
)  # fmt: skip
def test_what_only_makes_a_run_faster_may_change(tmp_path, name, value, free):
    changed = list(changed_settings(tiny_config(tmp_path), tiny_config(tmp_path, **{name: value})))
    assert [setting for setting, *_ in changed] == ([] if free else [name.replace("__", ".")])
