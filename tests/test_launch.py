"""Runs in processes of their own: real ones, of the toy world, and of the miniature by the commands."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from background_runs import LIMIT, end_all, ended, no_process_left, run, until  # noqa: F401

from srpo_core import cli, launch
from srpo_core.assemble import train_run
from srpo_core.checkpoint import list_checkpoints
from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.description import load_run
from srpo_core.metrics import read_metrics
from srpo_core.run_state import is_alive, log_tail, read_state

QUICK = [
    "data.batch_size=1", "rollout.num_steps=2", "output.preview_every=0", "output.evaluate_prompts=0",
    "output.tensorboard=false", "output.checkpoint_every=100", "optim.schedule=constant",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end, with secrets in its environment: (its folder, states as they came, the pid of its start)."""
    folder, states = tmp_path_factory.mktemp("finished") / "a run; $(touch x) 'quoted'", []

    def watched(state):
        states.append(state)
        return ended(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("HF_TOKEN", "hf_SECRET")
        pid = launch.start(run(folder, 2), environment={"OTHER_KEY": "sk_SECRET"})
    try:
        watched(read_state(folder))
        until(folder, watched)
        yield folder, states, pid
    finally:
        end_all(folder)


def test_a_run_to_its_end(finished):
    folder, states, pid = finished
    first, last = states[0], states[-1]
    assert first.pid == pid
    assert first.active
    assert (last.status, last.step, last.steps, last.pid) == ("finished", 2, 2, pid)
    assert (last.phase, last.phase_total) == ("", 0)
    assert first.began <= last.began < last.ended <= time.time()
    assert {"encoding prompts", "loading the models", "training"} & {state.phase for state in states}
    assert "finished after step 2" in "\n".join(log_tail(folder))
    assert json.loads((folder / "run.json").read_text())["optim"]["steps"] == 2
    assert (folder / "scripts" / "train.sh").is_file()


def test_words_of_the_command_reach_it_as_they_are(finished):
    folder, states, _ = finished
    assert states[-1].status == "finished"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not Path("x").exists()


def test_no_secret_is_written(finished):
    for path in finished[0].rglob("*"):
        assert path.is_dir() or b"_SECRET" not in path.read_bytes(), path


def test_gone_on_with_by_its_folder_where_that_was_moved_to(tmp_path):
    """With more steps, and with the prompts that lie in the folder."""
    folder, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    folder.mkdir()
    (folder / "prompts.txt").write_text("a large red circle on a blue background\n")
    train_run(run(folder, 1, data__prompts=f"{folder}/prompts.txt"))
    moved.parent.mkdir()
    folder.rename(moved)
    with pytest.raises(ConfigError, match="finished at step 1; give more steps"):
        launch.resume(moved)
    with pytest.raises(ConfigError, match="not this one"):
        launch.resume(moved, 2, check=refuse)
    launch.resume(moved, 2)
    last = until(moved, ended)
    assert (last.status, last.step) == ("finished", 2), last.error
    assert [line["step"] for line in read_metrics(moved)] == [1, 2]
    assert load_run(str(moved / "run.json")).data.prompts == str(moved / "prompts.txt")
    assert not folder.exists()


def test_more_steps_than_a_falling_schedule_has(tmp_path):
    train_run(run(tmp_path / "run", 2, optim__schedule="linear"))
    with pytest.raises(ConfigError, match=r"optim.steps: 2 there, 4 now") as error:
        launch.resume(tmp_path / "run", 4)
    assert "optim.schedule=linear has lr fall until the last step" in str(error.value)
    assert "lora.start" in str(error.value)


def refuse(config):
    raise ConfigError("not this one")


def test_a_description_that_changes_behind_its_back_is_not_trained(tmp_path):
    """Whoever can write into the folder can't slip in another one after it was checked."""
    folder = tmp_path / "run"
    launch.start(run(folder, 2))
    (folder / "run.json").write_text(run(folder, 9999).model_dump_json())
    state = until(folder, ended)
    assert state.status == "failed"
    assert "has changed since the run was started" in state.error


def test_stopped_between_steps_and_resumed(tmp_path):
    """While it is at work nobody else trains there, or on the CPU."""
    folder = tmp_path / "run"
    launch.start(run(folder, 9999))
    until(folder, lambda state: state.step >= 1)
    with pytest.raises(ConfigError, match="at work on this run"):
        launch.start(run(folder, 9999), resume=True)
    with pytest.raises(ConfigError, match=re.escape(str(folder))):
        launch.start(run(tmp_path / "other", 2))
    assert not (tmp_path / "other").exists()
    state = launch.stop(folder, patience=LIMIT)
    assert state.status == "stopped"
    assert list_checkpoints(folder)[-1].name == f"step-{state.step:06d}"
    assert not is_alive(state)
    launch.check(run(tmp_path / "other", 2))
    launch.start(run(folder, state.step + 1), resume=True)
    last = until(folder, ended)
    assert (last.status, last.step) == ("finished", state.step + 1)
    assert [line["step"] for line in read_metrics(folder)][-2:] == [state.step, state.step + 1]


def test_two_who_start_a_run_at_once(tmp_path, monkeypatch):
    """Two pages that resume it, say: one has it, and the other one reads so; the run's state stays its own."""
    folder, both, prepare = tmp_path / "run", threading.Barrier(2), launch._prepare

    def prepared(*given):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)  # so that nobody is late
        return prepare(*given)

    monkeypatch.setattr(launch, "_prepare", prepared)
    monkeypatch.setenv("SRPO_LOCKS", str(tmp_path / "locks"))
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(launch.start, run(folder, 9999)) for _ in range(2)]
    (pid,) = [start.result() for start in starts if start.exception() is None]
    (error,) = filter(None, [start.exception() for start in starts])
    assert isinstance(error, ConfigError) and "at work on this run" in str(error)
    assert read_state(folder).pid == pid


def test_the_time_of_a_run_is_that_of_all_its_parts(tmp_path):
    parts = []
    for steps in (1, 2):
        launch.start(run(tmp_path, steps), resume=steps > 1)
        until(tmp_path, ended)
        parts.append(read_state(tmp_path))
    first, last = parts
    assert first.worked == 0
    assert last.worked == first.ended - first.began > 0


def test_stopped_while_it_starts(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 9999))
    state = launch.stop(folder, patience=LIMIT)
    assert (state.status, state.step) == ("stopped", 0)
    assert not (folder / "stop").exists()


def test_a_killed_run_is_found_killed(tmp_path):
    folder = tmp_path / "run"
    pid = launch.start(run(folder, 9999))
    until(folder, lambda state: state.step >= 1)
    os.kill(pid, signal.SIGKILL)
    state = until(folder, ended)
    assert state.status == "killed"
    assert state.step >= 1


def test_a_run_that_fails_before_training_says_why(tmp_path):
    folder = tmp_path / "run"
    launch.start(run(folder, 2, data__prompts=f"{tmp_path}/none.txt"))
    state = until(folder, ended)
    assert state.status == "failed"
    assert "none.txt" in state.error


def test_one_that_does_not_heed_is_ended(tmp_path):
    folder = tmp_path / "run"
    pid = launch.start(run(folder, 9999))
    until(folder, lambda state: state.status == "training")
    os.kill(pid, signal.SIGSTOP)
    assert launch.stop(folder, patience=0.3).status == "killed"


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


def test_one_process_is_started_plainly_and_several_by_torchrun():
    def words(**settings):
        return launch.train_command("/a b/run.json", True, ParallelConfig(**settings), python="python")[1:-4]

    torchrun = ["-m", "torch.distributed.run"]
    assert launch.train_command("/a b/run.json", True)[-3:] == ["train", "/a b/run.json", "--resume"]
    assert words() == []
    assert words(processes=2) == [*torchrun, "--standalone", "--nproc-per-node=2"]
    several = {"nodes": 2, "node_rank": 1, "processes": 4}
    assert words(**several, rendezvous="[fd00::5]:29500") == [
        *torchrun, "--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=fd00::5", "--master-port=29500",
    ]  # fmt: skip
    for rendezvous in ("", "host", "host:", ":29500", "host:99999", "$(x):29500", "a b:29500"):
        with pytest.raises(ConfigError, match="write host:port"):
            words(**several, rendezvous=rendezvous)
    with pytest.raises(ConfigError, match=r"node_rank=2: of parallel.nodes=2 machines the last one is 1"):
        words(nodes=2, node_rank=2, rendezvous="a:1")


def test_what_comfyui_set_for_itself_is_left_out(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,backend:cudaMallocAsync")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("HF_TOKEN", "secret")
    environment = launch.child_environment({"CUDA_VISIBLE_DEVICES": "1"})
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert (environment["HF_TOKEN"], environment["CUDA_VISIBLE_DEVICES"]) == ("secret", "1")


def test_scripts_lie_where_the_run_is(tmp_path):
    """A further machine's part has none: they would take its folder for the run's."""
    several = {"device": "cpu", "nodes": 2, "node_rank": 1, "rendezvous": "localhost:29500"}
    launch._prepare(run(tmp_path, 2, parallel=several), resume=False)
    assert (tmp_path / "node-1" / "run.json").is_file()
    assert not list(tmp_path.rglob("*.sh"))
