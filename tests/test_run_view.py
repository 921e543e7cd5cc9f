"""Runs as a page shows them: whatever state their folders are in, and from nowhere else."""

import io
import itertools
import json
import math
import os
import shlex
import sys

import pytest
import torch
from fake_runs import PROMPTS, make_run
from PIL import Image

from srpo_core import run_view
from srpo_core.checkpoint import save
from srpo_core.config import ConfigError
from srpo_core.description import load_run
from srpo_core.metrics import read_metrics
from srpo_core.preview import contact_sheet, from_pil, save_preview, split_sheet
from srpo_core.run_curves import MOST_POINTS, curves
from srpo_core.run_pictures import NoPreview, before_now, preview_jpeg, preview_pair, preview_steps, wrapped
from srpo_core.run_state import ask_to_stop, write_state

SIZE = (40, 56)
KEYS = {
    "name", "status", "stopping", "phase", "phase_done", "phase_total", "step", "steps", "seconds_left", "began",
    "worked", "ended", "error", "result", "kind", "base", "reward", "preview_step", "version", "can_stop", "can_resume",
    "can_continue", "can_save",
}  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """A folder of runs with one in it, of 40 steps, finished."""
    make_run(tmp_path / "runs" / "look", steps=40, evaluation=False)
    return tmp_path / "runs"


def pictures(count=5, size=SIZE, seed=0):
    """Images [n, 3, H, W] that 8 bits hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator).float() / 255


def names(count):
    return [f"prompt {i}" for i in range(count)]


def test_a_summary_is_json_and_says_the_same_for_every_run(runs):
    (runs / "empty").mkdir()  # no run
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    (runs / "begun").mkdir()
    (runs / "begun" / "state.json").write_text('{"status": "training"}')  # half written
    found = {one["name"]: one for one in run_view.summaries(runs)}
    assert set(found) == {"look", "broken", "begun"}
    for one in found.values():
        assert set(one) == KEYS
        json.loads(json.dumps(one, allow_nan=False))
    assert found["look"]["status"] == "finished"
    assert (found["look"]["step"], found["look"]["steps"]) == (40, 40)
    assert (found["look"]["kind"], found["look"]["base"], found["look"]["reward"]) == ("full", "miniature", "miniature")
    assert found["look"]["can_continue"]
    assert "run.json" in found["broken"]["error"]
    assert not found["broken"]["can_resume"]


def test_what_may_be_done_with_a_run(runs):
    folder = make_run(runs / "half", steps=10, of=40, evaluation=False)
    at_rest = run_view.summary(folder)
    assert (at_rest["status"], at_rest["step"], at_rest["steps"]) == ("stopped", 10, 40)
    assert (at_rest["can_stop"], at_rest["can_resume"], at_rest["can_save"]) == (False, True, False)
    save(folder, 10, {"weights": {"a": torch.zeros(2)}}, {"lora": None})
    assert run_view.summary(folder)["can_save"]
    result = folder / "half-10.safetensors"
    record = {"path": None, "step": 0, "error": "", "files": {str(result): 10}}
    (folder / "result.json").write_text(json.dumps(record))
    assert run_view.summary(folder)["can_save"], "the file that is named was removed"
    result.write_bytes(b"")
    assert (run_view.summary(folder)["can_save"], run_view.summary(folder)["result"]) == (False, str(result))
    write_state(folder, "training", 40)  # by this very process
    working = run_view.summary(folder)
    assert (working["can_stop"], working["can_resume"], working["can_save"]) == (True, False, False)
    assert working["seconds_left"] > 0
    assert not working["stopping"]
    ask_to_stop(folder)
    assert run_view.summary(folder)["stopping"]
    words = run_view.in_words(run_view.summary(folder) | {"seconds_left": 12_000})
    assert "stopping, step 10 of 40, about 3 h 20 min left" in words


def test_more_steps_need_a_schedule_that_does_not_end(runs):
    folder = make_run(runs / "ends", steps=4, evaluation=False, optim={"steps": 4, "schedule": "linear"})
    assert not run_view.summary(folder)["can_continue"]


def test_the_version_changes_when_something_does_and_only_then(runs):
    folder = make_run(runs / "half", steps=10, of=40, evaluation=False)
    versions = [run_view.summary(folder)["version"], run_view.summary(folder)["version"]]
    assert versions[0] == versions[1]
    changes = (
        lambda: (folder / "train.log").write_text("a line"),
        lambda: (folder / "metrics.jsonl").open("a").write('{"step": 11}\n'),
        lambda: (folder / "plan.json").write_text("[]"),
        lambda: write_state(folder, "failed", 40, error="the disk is full"),
    )
    for change in changes:
        change()
        versions.append(run_view.summary(folder)["version"])
    assert len(set(versions)) == 1 + len(changes)


def test_the_newest_run_comes_first(runs):
    for name in ("b", "a", "c"):
        (runs / name).mkdir()
        write_state(runs / name, "stopped", 1)
        state = runs / name / "state.json"
        record = json.loads(state.read_text()) | {"began": {"a": 1e9, "b": 3e9, "c": 2e9}[name]}
        state.write_text(json.dumps(record))
    order = [one.name for one in run_view.list_runs(runs)]
    assert [name for name in order if name != "look"] == ["b", "c", "a"]
    assert run_view.list_runs(runs / "none") == []


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "/", "../runs/look", "look/", "look/previews", "./look", "LOOK", "look\0", "x" * 300, "none"],
)
def test_a_name_is_a_name_in_the_folder(runs, name):
    with pytest.raises(run_view.NoRun):
        run_view.find_run(runs, name)
    with pytest.raises(run_view.NoRun):
        run_view.find_run(runs, str(runs / "look"))
    assert run_view.find_run(runs, "look") == runs / "look"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_other_places_are_not_followed(runs, tmp_path):
    secret = make_run(tmp_path / "elsewhere" / "secret", steps=2, evaluation=False)
    (runs / "link").symlink_to(secret, target_is_directory=True)
    (runs / "alias").symlink_to(runs / "look", target_is_directory=True)
    make_run(runs / "mixed", steps=2, evaluation=False)
    (runs / "mixed" / "train.log").symlink_to("/etc/hostname")
    for name in ("link", "alias", "mixed"):
        with pytest.raises(run_view.NoRun, match="link"):
            run_view.find_run(runs, name)
    assert [folder.name for folder in run_view.list_runs(runs)] == ["look"]
    (tmp_path / "other").symlink_to(runs, target_is_directory=True)  # the folder of runs itself may lie elsewhere
    assert run_view.find_run(tmp_path / "other", "look").name == "look"


def test_curves_are_the_metrics(runs):
    lines = read_metrics(runs / "look")
    found = run_view.detail(runs / "look")["curves"]
    assert found["steps"] == list(range(1, 41))
    assert found["loss"] == [line["loss"] for line in lines[1:]]
    assert found["score"]["inversion"] == [line["score"]["inversion"] for line in lines[1:]]
    assert found["preview"]["steps"] == [0, 10, 20, 30, 40]
    assert found["preview"]["look"] == [lines[step]["preview"]["look"] for step in (0, 10, 20, 30, 40)]


@pytest.mark.parametrize("cut", [0, 1, 17, 39, 40])
def test_curves_in_parts_are_the_whole(runs, cut):
    """What a page has of the first steps and what it asks for later is what it would have been told at once."""

    def joined(a, b):
        return {key: joined(a[key], b[key]) if isinstance(a[key], dict) else a[key] + b[key] for key in a if key in b}

    lines = run_view.metric_lines(runs / "look")
    first = curves([line for line in lines if line["step"] <= cut])
    rest = run_view.detail(runs / "look", after=cut)["curves"]
    whole = curves(lines)
    for name in ("score", "reward", "preview"):  # a part without steps names no branches
        for part in (first, rest):
            part[name] = {key: [] for key in whole[name]} | part[name]
    assert joined(first, rest) == whole


def test_what_is_no_number_is_null(runs):
    lines = [
        {"step": 1, "loss": None, "score": {"denoise": 0.1}, "grad_norm": "much"},
        {"step": 2, "loss": True, "score": 3, "reward": {"denoise": math.inf}},
        {"step": 3, "score": {"inversion": 2}, "preview": {"word:Real": 1.0, "look": 0.5}},
    ]
    found = curves(lines)
    assert found["loss"] == found["grad_norm"] == [None] * 3
    assert found["score"] == {"denoise": [0.1, None, None], "inversion": [None, None, 2]}
    assert found["reward"] == {"denoise": [None] * 3}
    assert found["preview"] == {"steps": [3], "look": [0.5]}
    assert curves([]) == {
        "steps": [], "loss": [], "grad_norm": [], "score": {}, "reward": {}, "preview": {"steps": []},
    }  # fmt: skip


def test_a_long_run_is_thinned_and_its_end_kept():
    steps = curves([{"step": step} for step in range(50_000)])["steps"]
    assert len(steps) <= MOST_POINTS
    assert steps[-1] == 49_999
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1


def test_the_course_changes_when_steps_are_trained_anew(runs):
    folder = runs / "look"
    course = run_view.detail(folder)["course"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41}\n')
    assert run_view.detail(folder)["course"] == course
    text = (folder / "metrics.jsonl").read_text()
    (folder / ".tmp").write_text(text)
    os.replace(folder / ".tmp", folder / "metrics.jsonl")  # as a resumed run drops what came after its checkpoint
    assert run_view.detail(folder)["course"] != course


def test_plan_log_and_command(runs):
    folder = runs / "look"
    (folder / "plan.json").write_text('[["steps", "40"], ["odd"], 3, ["memory", "19 GiB"]]')
    (folder / "train.log").write_text("\n".join(f"line {i}" for i in range(50)))
    found = run_view.detail(folder, log=3)
    assert found["plan"] == [["steps", "40"], ["memory", "19 GiB"]]
    assert found["log"] == ["line 47", "line 48", "line 49"]
    assert run_view.detail(folder)["log"] == []
    words = shlex.split(found["command"]) if os.name != "nt" else []
    assert words[:1] + words[2:] == [sys.executable, "train", str(folder / "run.json"), "--resume"]
    (folder / "plan.json").write_text("[")
    assert run_view.detail(folder)["plan"] == []


@pytest.mark.parametrize("width", [40, 96, 128, 191, 192, 193, 720])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_pictures_come_out_of_a_sheet_as_they_went_in(width, count):
    images = pictures(count, (24, width))
    assert torch.equal(split_sheet(contact_sheet(images, names(count)), count, 24, width), images)
    with pytest.raises(ValueError, match="no sheet"):
        split_sheet(contact_sheet(images, names(count)), count + 4, 24, width)


def preview(folder, step, images, prompts=None, relative=None):
    prompts = prompts or names(len(images))
    scores = {"relative": [0.01 * step + i for i in range(len(images))] if relative is None else relative}
    save_preview(folder, step, prompts, images, scores)


def test_before_and_now(tmp_path):
    early, late = pictures(3), pictures(3, seed=1)
    with pytest.raises(NoPreview, match="no preview yet"):
        preview_pair(tmp_path, SIZE)
    preview(tmp_path, 0, early)
    before, now = preview_pair(tmp_path, SIZE)
    assert before.step == now.step == 0
    preview(tmp_path, 10, pictures(3, seed=2))
    preview(tmp_path, 20, late)
    before, now = preview_pair(tmp_path, SIZE)
    assert (before.step, now.step, preview_steps(tmp_path)) == (0, 20, [0, 10, 20])
    assert torch.equal(before.images, early) and torch.equal(now.images, late)
    assert now.scores == pytest.approx([0.2, 1.2, 2.2])
    assert preview_pair(tmp_path, SIZE, 10)[1].step == 10
    with pytest.raises(NoPreview, match="there are 0, 10, 20"):
        preview_pair(tmp_path, SIZE, 15)


def test_only_the_same_prompts_from_the_same_noise_are_compared(tmp_path):
    """A resumed run may draw other prompts; noise goes by the place of a prompt."""
    preview(tmp_path, 0, pictures(3), ["a", "b", "c"])
    preview(tmp_path, 10, pictures(3, seed=1), ["a", "c", "b"])
    before, now = preview_pair(tmp_path, SIZE)
    assert (before.prompts, before.step, now.step) == (["a"], 0, 10)
    preview(tmp_path, 20, pictures(2, seed=2), ["x", "y"])
    before, now = preview_pair(tmp_path, SIZE)
    assert before.step == now.step == 20
    preview(tmp_path, 30, pictures(2, seed=3), ["x", "z"])
    before, now = preview_pair(tmp_path, SIZE)
    assert (before.prompts, before.step, now.step) == (["x"], 20, 30)


def test_a_preview_that_is_being_written_is_not_there_yet(tmp_path):
    preview(tmp_path, 0, pictures(3))
    preview(tmp_path, 10, pictures(3))
    preview(tmp_path, 20, pictures(3))
    sheet = tmp_path / "previews" / "step-000020.png"
    sheet.write_bytes(sheet.read_bytes()[:2000])
    (tmp_path / "previews" / "step-000030.png").write_bytes(b"")
    (tmp_path / "previews" / "step-abc.json").write_text("{}")
    assert preview_pair(tmp_path, SIZE)[1].step == 10
    with pytest.raises(NoPreview, match="step 20 can't be read"):
        preview_pair(tmp_path, SIZE, 20)


def test_the_picture_shows_every_pair(tmp_path):
    """Flat colours stand where their pictures should, left before and right now, at the width that was asked for."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1.0]]).view(3, 3, 1, 1).expand(3, 3, 40, 40)
    preview(tmp_path, 0, colours)
    preview(tmp_path, 7, 1 - colours)
    for columns, width in ((1, 300), (2, 800), (4, 1600), (16, 400), (4, 128)):
        sheet = before_now(*preview_pair(tmp_path, (40, 40)), columns, width)
        assert width * 0.9 - 8 <= sheet.width <= width
        pixels = from_pil(sheet)
        for colour in (*colours[:, :, 0, 0], *(1 - colours)[:, :, 0, 0]):
            same = (pixels - colour.view(3, 1, 1)).abs().amax(0) < 0.02
            assert same.sum() > (sheet.width / (2 * min(columns, 3, max(1, width // 192))) * 0.7) ** 2
    one = before_now(*preview_pair(tmp_path, (40, 40), 0), 2, 800)
    assert 780 <= one.width <= 800 < one.height


def test_the_jpeg_is_made_again_only_when_previews_change(tmp_path):
    preview(tmp_path, 0, pictures(3))
    first = preview_jpeg(tmp_path, SIZE, None, 2, 600)
    assert preview_jpeg(tmp_path, SIZE, None, 2, 600) is first
    assert Image.open(io.BytesIO(first)).format == "JPEG"
    preview(tmp_path, 10, pictures(3, seed=1))
    assert preview_jpeg(tmp_path, SIZE, None, 2, 600) != first


def test_captions_fit_and_break_at_spaces():
    text = "a photograph of an old fisherman who mends his nets on a stone pier at dawn"
    two = wrapped(text, 300, 12)
    assert len(two) == 2 and text.startswith(two[0]) and text[len(two[0])] == " "
    assert wrapped(text, 3000, 12) == [text]
    assert wrapped("", 100, 12) == []
    cut = wrapped("x" * 300, 120, 12)
    assert len(cut) == 2 and cut[1].endswith("...")


def test_the_report_is_made_anew_when_the_run_has_moved_on(runs):
    folder = runs / "look"
    page = run_view.report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    (folder / "report.html").write_text("kept")
    assert run_view.report(folder) == "kept"
    later = (folder / "report.html").stat().st_mtime + 10
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.1}\n')
    os.utime(folder / "metrics.jsonl", (later, later))
    assert "41 steps" in run_view.report(folder)
    write_state(folder, "training", 50)
    os.utime(folder / "metrics.jsonl", (later + 10, later + 10))
    (folder / "report.html").unlink()
    run_view.report(folder)
    assert not (folder / "report.html").exists(), "a run at work writes its own"


def test_a_report_is_text_whatever_the_prompts_say(runs):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    folder = make_run(runs / "evil", steps=10, reward={"name": "miniature", "liked": [evil]})
    for file in (folder / "previews").glob("*.json"):
        file.write_text(file.read_text().replace(PROMPTS[0], evil.replace('"', '\\"')))
    evaluation = folder / "evaluation" / "evaluation.json"
    evaluation.write_text(evaluation.read_text().replace(PROMPTS[0], evil.replace('"', '\\"')))
    page = run_view.report(folder)
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_a_run_without_a_record_has_no_report(runs):
    (runs / "begun").mkdir()
    write_state(runs / "begun", "training", 10)
    with pytest.raises(ConfigError, match=r"run\.json"):
        run_view.report(runs / "begun")


def test_a_run_of_this_folder_is_read_as_it_is_described(runs):
    assert run_view.run_config(runs / "look") == load_run(str(runs / "look" / "run.json"))
    assert run_view.run_config(runs / "none") is None
