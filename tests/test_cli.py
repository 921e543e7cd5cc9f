"""The command line: commands, settings, messages, exit codes, and every way to start it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_runs import make_run
from tiny import tiny_config

from srpo_core import cli, commands, run_sources
from srpo_core.errors import TrainingError

PROJECT = Path(__file__).parents[1]
MAIN = PROJECT / "srpo_core" / "__main__.py"


def description(folder, **settings):
    """A file that describes a tiny run in folder/run."""
    path = folder / "tiny.json"
    path.write_text(tiny_config(folder / "run", **settings).model_dump_json())
    return str(path)


def start(*arguments, cwd, **environment):
    """Run a command in its own process, away from the project and without its tests on the path."""
    env = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_no_arguments_print_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in (
        "train",
        "sample",
        "score",
        "export",
        "report",
        "doctor",
        "settings",
        "srpo train miniature",
        "exit codes",
    ):
        assert name in out


def test_every_command_has_help_and_a_function(capsys):
    for name in ("train", "sample", "score", "export", "report", "download", "doctor", "settings"):
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert callable(getattr(commands, name))
    assert "usage: srpo train" in capsys.readouterr().out


def test_unknown_commands_and_options(capsys):
    for arguments in (["trian"], ["train"], ["train", "miniature", "--bogus"], ["doctor", "--bogus"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    for arguments in (["sample", "x", "--count", "0"], ["sample", "x", "--seed", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert "unrecognized arguments: --bogus" in capsys.readouterr().err


@pytest.mark.parametrize("guidance", ["nan", "-1", "101", "much"])
def test_guidance_has_limits(capsys, guidance):
    with pytest.raises(SystemExit):
        cli.main(["sample", "miniature", f"--guidance={guidance}"])
    assert "argument --guidance: " in capsys.readouterr().err


def test_settings_may_stand_anywhere():
    args = cli.parse(["train", "miniature", "optim.lr=1", "--resume", "seed=2"])
    assert args.overrides == ["optim.lr=1", "seed=2"]
    assert args.resume


@pytest.mark.parametrize("entry", ["path", "module", "folder"])
def test_ways_to_start(tmp_path, entry):
    if entry == "module":
        result = start("-m", "srpo_core", "--version", cwd=PROJECT)
    else:
        result = start(MAIN if entry == "path" else MAIN.parent, "--version", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout == f"srpo {cli.version()}\n"
    assert cli.version()[0].isdigit()


def test_a_start_by_path_leaves_other_modules_alone(tmp_path):
    """Neither a srpo_core elsewhere nor modules beside ours get in the way, even with ours on the path."""
    copy = tmp_path / "copy"
    shutil.copytree(MAIN.parent, copy / "srpo_core", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (copy / "srpo_core" / "json.py").write_text("raise RuntimeError('shadowed')")
    decoy = tmp_path / "decoy" / "srpo_core"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise RuntimeError('wrong package')")
    (decoy / "cli.py").write_text("")
    path = os.pathsep.join([str(decoy.parent), str(copy / "srpo_core")])
    result = start(copy / "srpo_core" / "__main__.py", "settings", "optim.lr", cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "optim.lr = 5e-06" in result.stdout


def test_help_loads_nothing_heavy(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from srpo_core import cli; cli.build_parser();"
        "print(sorted({'torch', 'numpy', 'pydantic', 'diffusers', 'PIL', 'rich'} & set(sys.modules)))"
    )
    assert start("-c", code, cwd=tmp_path).stdout == "[]\n"
    began = time.perf_counter()
    start(MAIN, "--help", cwd=tmp_path)
    assert time.perf_counter() - began < 1.0  # 0.05 s on an idle machine


def test_a_run_from_start_to_report(tmp_path, capsys):
    source = description(tmp_path, output__evaluate_prompts=2)
    assert cli.main(["train", source, "optim.steps=3"]) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert (run / "report.html").is_file()
    for text in ("report.html", "step-000003", "metrics.jsonl", f"export {run}", f"sample {run}"):
        assert text in out
    assert cli.main(["sample", str(run), "--prompt", "a tree", "--steps", "2"]) == 0
    pictures = list((run / "samples" / "step-000003").glob("*.png"))
    assert len(pictures) == 1
    assert (
        cli.main(["score", str(pictures[0].parent), "--source", str(run), "--liked", "Real, Detail", "--measures"]) == 0
    )
    scores = json.loads((pictures[0].parent / "srpo_scores.json").read_text())
    assert scores["reward"]["liked"] == ["Real", "Detail"]
    assert "brightness" in scores["mean"]
    assert cli.main(["export", str(run), "--out", str(run / "whole.safetensors")]) == 0
    assert "models/diffusion_models" in capsys.readouterr().out
    assert cli.main(["export", str(run), "--out", str(run / "whole.safetensors")]) == 2
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert cli.main(["train", str(run), "--resume", "optim.steps=4"]) == 0
    assert cli.main(["train", str(run)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, capsys, monkeypatch):
    def broken(folders, out=None):
        raise RuntimeError("no page today")

    monkeypatch.setattr("srpo_core.report.write_report", broken)
    assert cli.main(["train", description(tmp_path), "optim.steps=1"]) == 0
    assert "not written (no page today)" in capsys.readouterr().out


def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from srpo_core.session import STOPPED_EXIT_CODE, Outcome
    from srpo_core.trainer import Trainer

    outcome = Outcome(step=2, finished=False, run_dir=tmp_path / "run")
    monkeypatch.setattr(Trainer, "work", lambda self, resume: outcome)
    assert cli.main(["train", description(tmp_path)]) == STOPPED_EXIT_CODE == 3
    assert f"train {tmp_path / 'run'} --resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such-preset"], "unknown preset 'no-such-preset'"),
        (["train", "TINY", "optim.stps=3"], "did you mean 'optim.steps'"),
        (["train", "TINY", "reward.name=nothing"], "reward.name='nothing': unknown reward"),
        (["train", "TINY", "data.height=17"], "data.height=17"),
        (["train", "TINY", "data.prompts=none.txt"], "no such file"),
        (["train", "FOLDER"], "is no run folder"),
        (["sample", "TINY", "--checkpoint", "last"], "a preset has no checkpoints"),
        (["sample", "TINY", "--prompt", "a", "--prompts", "b"], "not both"),
        (["sample", "TINY", "data.height=17"], "data.height=17"),
        (["score", "FOLDER", "--source", "TINY"], "holds no pictures"),
        (["export", "FOLDER"], "run.json"),
        (["report", "FOLDER"], "is no run folder"),
        (["settings", "nothing.like.it"], "no setting's name contains"),
        (["settings", "flux-dev"], "the preset's values: srpo settings --source flux-dev"),
    ],
)
def test_wrong_settings_are_one_line_and_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"TINY": description(tmp_path), "FOLDER": str(tmp_path / "empty")}
    assert cli.main([places.get(part, part) for part in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("srpo: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(TrainingError("NaN at step 3"), 1), (OSError(28, "No space left"), 1), (KeyboardInterrupt(), 130)],
)
def test_failures_on_the_way(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(commands, "doctor", fail)
    assert cli.main(["doctor"]) == code
    err = capsys.readouterr().err
    assert err.startswith("srpo: ")
    assert "Traceback" not in err


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(commands, "doctor", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_settings_lists_every_setting(capsys, tmp_path):
    from srpo_core.description import describe_fields, preset_names

    assert cli.main(["settings"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} = " in out for name, *_ in describe_fields())
    assert all(name in out for name in preset_names())
    assert cli.main(["settings", "steps", "--source", description(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "optim.steps = 4    (int)" in out
    assert "optim.lr" not in out


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fine"] is True


def test_hints_repeat_how_the_program_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/srpo", "train"])
    assert run_sources.command_line("report", "my run") == "srpo report 'my run'"
    monkeypatch.setattr(sys, "argv", ["/x/srpo_core/__main__.py", "train"])
    assert run_sources.command_line("report") == f"{sys.executable} /x/srpo_core/__main__.py report"


def test_a_command_to_type_is_quoted_for_the_shell_that_is_here(monkeypatch):
    words = [r"C:\Program Files\python.exe", "train", r"C:\runs\my look\run.json"]
    assert shlex.split(run_sources.typed(words)) == words
    monkeypatch.setattr(run_sources, "os", SimpleNamespace(name="nt"))
    assert run_sources.typed(words) == r'"C:\Program Files\python.exe" train "C:\runs\my look\run.json"'


def test_a_run_folder_stands_for_its_description(tmp_path):
    run = make_run(tmp_path / "run", evaluation=False, previews=False)
    assert run_sources.run_source(str(run)) == str(run / "run.json")
    assert run_sources.run_source("x.yaml") == "x.yaml"


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    run = make_run(tmp_path / "run", evaluation=False, previews=False)
    moved = run.rename(tmp_path / "moved")
    assert run_sources.train_config(str(moved)).output.dir == str(moved)
    assert run_sources.train_config(str(moved), ["output.dir=other"]).output.dir == "other"
