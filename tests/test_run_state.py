"""What a run's folder says about it, to whoever reads it."""

import json
import os
import shutil
import sys
import time

import psutil
import pytest

from srpo_core import cli, launch
from srpo_core.config import ConfigError, RunConfig
from srpo_core.run_state import (
    ask_to_stop,
    describe,
    read_state,
    recent_metrics,
    seconds_left,
    stop_asked,
    told,
    write_state,
)


def test_a_reused_pid_is_not_the_run(tmp_path):
    write_state(tmp_path, "training", 10)
    assert read_state(tmp_path).status == "training"
    text = (tmp_path / "state.json").read_text()
    created = read_state(tmp_path).created
    (tmp_path / "state.json").write_text(text.replace(created, f"{created}0"))
    assert read_state(tmp_path).status == "killed"
    (tmp_path / "state.json").write_text("{")
    assert read_state(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps what the clock said then")
def test_a_clock_that_is_set_changes_nothing(tmp_path, monkeypatch):
    """What psutil gives for a start moves with the clock, as the time of the machine's own start does."""
    write_state(tmp_path, "training", 10)
    created, own = read_state(tmp_path).created, psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: own(process) + 3600)
    assert read_state(tmp_path).status == "training"
    write_state(tmp_path, "training", 10)
    assert read_state(tmp_path).created == created


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "x"}, {"pid": None}, {"pid": 1.5}, {"created": 1.5}, {"created": None}, {"error": 5}, {"host": 3},
        {"launcher": "x"}, {"status": "odd"}, {"phase_total": "x"}, {"steps": []},
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_no_word(tmp_path, change):
    write_state(tmp_path, "training", 10)
    record = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(record | {"later": 1}))
    assert read_state(tmp_path).status == "training"
    (tmp_path / "state.json").write_text(json.dumps(record | change))
    assert read_state(tmp_path) is None


@pytest.mark.parametrize("change", [{"pid": -1}, {"pid": 2**70}, {"pid": 0, "launcher": -5}])
def test_a_number_that_is_no_process(tmp_path, change):
    write_state(tmp_path, "training", 10)
    record = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(record | change))
    assert read_state(tmp_path).status == "killed"
    launch.kill(read_state(tmp_path))


def test_a_request_while_it_starts_holds(tmp_path):
    """By a process that it comes from, be it the next above or torchrun further up; an older one is forgotten."""
    write_state(tmp_path, "starting", 10, os.getppid())
    ask_to_stop(tmp_path)
    with told(tmp_path, 10):
        assert stop_asked(tmp_path)
    ask_to_stop(tmp_path)
    (tmp_path / "state.json").unlink()
    with told(tmp_path, 10):
        assert not stop_asked(tmp_path)
    ask_to_stop(tmp_path / "removed")
    assert not (tmp_path / "removed").exists()


def test_a_run_whose_folder_is_removed_doesnt_make_it_again(tmp_path):
    run = tmp_path / "run"
    with told(run, 4) as telling:
        shutil.rmtree(run)
        telling.phase("preview", 1, 2)
        telling.training()
    assert not run.exists()
    with pytest.raises(ConfigError, match="no such folder"):
        describe(run)


def test_a_process_of_another_machine_is_let_be(tmp_path):
    """Its pid may be anyone's here: this very process, say."""
    write_state(tmp_path, "training", 10)
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace(f'"host": "{read_state(tmp_path).host}"', '"host": "elsewhere"'))
    with pytest.raises(ConfigError, match="runs on elsewhere"):
        launch.stop(tmp_path, patience=0.1)
    assert (tmp_path / "stop").exists()


def test_a_silent_machine_is_given_up(tmp_path):
    write_state(tmp_path, "training", 10)
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace(f'"host": "{read_state(tmp_path).host}"', '"host": "elsewhere"'))
    assert read_state(tmp_path).status == "training"
    long_ago = time.time() - 1000
    os.utime(file, (long_ago, long_ago))
    state = read_state(tmp_path)
    assert (state.status, round(state.ended)) == ("killed", round(long_ago))
    launch.check_idle(RunConfig.model_validate({"output": {"dir": str(tmp_path)}}))


def test_the_newest_lines_are_read_without_the_others(tmp_path):
    line = {"step": 1, "seconds": {"total": 2.0}, "text": "x" * 1000}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 301):
            file.write(json.dumps(line | {"step": step}) + "\n")
        file.write('{"step": 301, "sec')
    write_state(tmp_path, "training", 310)
    state = read_state(tmp_path)
    assert state.step == 300
    assert seconds_left(tmp_path, state) == pytest.approx(20.0)
    assert "step 300 of 310, about 20 s left" in describe(tmp_path)[0]
    assert len(recent_metrics(tmp_path)) < 70
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | {"text": "x" * 200_000}) + "\n")
    assert read_state(tmp_path).step == 1


def test_a_phase_is_told_at_once_and_how_far_it_is_now_and_then(tmp_path):
    with told(tmp_path, 10) as telling:
        assert read_state(tmp_path).status == "starting"
        telling.phase("encoding prompts", 0, 9)
        telling.training()
        telling.phase("preview", 0, 4)
        state = read_state(tmp_path)
        assert (state.status, state.phase, state.phase_done, state.phase_total) == ("training", "preview", 0, 4)
        assert describe(tmp_path)[0].startswith(f"{tmp_path}: training, step 0 of 10, preview 0 of 4 (process ")
        for done in range(1000):
            telling.phase("preview", done, 1000)
        assert read_state(tmp_path).phase_done < 1000
        telling.outcome = "finished"
    assert (read_state(tmp_path).status, read_state(tmp_path).phase) == ("finished", "")


def test_the_reason_of_a_failure_is_told(tmp_path, capsys):
    write_state(tmp_path, "failed", 10, error="the disk\nis full")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: failed, step 0 of 10\n  the disk\n  is full\n"


def test_a_reason_that_is_no_text(tmp_path):
    with pytest.raises(OSError), told(tmp_path, 10):
        raise OSError("no file \udcff.png")
    assert (read_state(tmp_path).status, read_state(tmp_path).error) == ("failed", "no file ?.png")


def test_a_state_that_names_another_process_ends_none(tmp_path):
    """Whoever can write into the folder could name any; this one trains nothing."""
    write_state(tmp_path, "training", 10)
    launch.kill(read_state(tmp_path))
    assert read_state(tmp_path).status == "training"
