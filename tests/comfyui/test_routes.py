"""Runs over HTTP, in a real server, with real runs of the miniature."""

import io
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from comfyui_side import needs_comfyui
from comfyui_training import quick_run
from PIL import Image

from srpo_core import launch
from srpo_core.checkpoint import list_checkpoints
from srpo_core.description import load_run
from srpo_core.run_state import is_alive, read_state, write_state

pytestmark = needs_comfyui
LIMIT = 180
"""Seconds in which a short run on a busy machine is done."""


def train(runs, name, steps):
    """Train a quick run to its end, or for its first steps if it is to stand at fewer than `steps`."""
    result = runs.parents[1] / "models" / "loras" / f"{name}.safetensors"
    launch.start(quick_run(runs / name, steps, {"output.result": result}))
    return runs / name


@pytest.fixture(scope="module")
def finished(server, runs):
    folder = train(runs, "done", 4)
    until(server, "done", lambda run: run["ended"])
    until(server, "done", lambda run: not is_alive(read_state(folder)))  # it has said all that it has to say
    return folder


def ask(server, path, data=None, headers=None, method=None):
    """(status, headers, body) of a request; `data` is sent as it is."""
    request = urllib.request.Request(server.url + path, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def until(server, name, condition):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        status, _, body = ask(server, f"/srpo/runs/{name}?log=20")
        run = json.loads(body)
        if status == 200 and condition(run):
            return run
        time.sleep(0.1)
    pytest.fail(json.dumps(run, indent=1))


def test_a_finished_run(server, finished):
    found = server.get("/srpo/runs")
    run = next(run for run in found["runs"] if run["name"] == "done")
    assert (run["status"], run["step"], run["steps"], run["kind"]) == ("finished", 4, 4, "lora")
    assert run["result"].endswith("done.safetensors")
    assert run["began"] < run["ended"]
    assert not (run["can_stop"] or run["can_resume"] or run["can_save"])
    whole = server.get("/srpo/runs/done?log=5")
    assert whole["curves"]["steps"] == [1, 2, 3, 4]
    assert whole["curves"]["preview"]["steps"] == [0, 2, 4]
    assert set(whole["curves"]["score"]) == {"denoise", "inversion"}
    assert server.get("/srpo/runs/done?after=3")["curves"]["steps"] == [4]
    assert 0 < len(whole["log"]) <= 5
    assert whole["folder"] == str(finished)
    assert server.get("/api/srpo/runs/done?log=5") == whole  # as the page's own fetch asks


def test_the_picture_and_its_tag(server, finished):
    status, headers, body = ask(server, "/srpo/runs/done/preview.jpg?columns=1&width=500")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/jpeg", "no-cache")
    assert 400 <= Image.open(io.BytesIO(body)).width <= 500
    known = {"If-None-Match": headers["ETag"]}
    assert ask(server, "/srpo/runs/done/preview.jpg?columns=1&width=500", headers=known)[0] == 304
    assert ask(server, "/srpo/runs/done/preview.jpg?columns=1&width=500&step=2", headers=known)[0] == 200
    status, _, body = ask(server, "/srpo/runs/done/preview.jpg?step=3")
    assert status == 404 and "there are 0, 2, 4" in json.loads(body)["error"]


def test_the_report_may_only_be_looked_at(server, finished):
    status, headers, body = ask(server, "/srpo/runs/done/report")
    assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"default-src 'none'" in body.split(b"</head>")[0]
    assert b"4 steps" in body


def test_stopped_saved_and_resumed(server, runs):
    folder = train(runs, "halted", 400)
    until(server, "halted", lambda run: run["step"] >= 1)
    status, run = server.send("/srpo/runs/halted/stop", {})
    assert (status, run["name"]) == (200, "halted")
    assert run["stopping"] or run["status"] == "stopped"
    run = until(server, "halted", lambda run: not run["can_stop"])
    assert (run["status"], run["can_resume"], run["can_save"]) == ("stopped", True, True)
    assert list_checkpoints(folder)[-1].name == f"step-{run['step']:06d}"
    status, run = server.send("/srpo/runs/halted/save", {})
    assert status == 200, run
    assert not run["can_save"]
    assert os.path.isfile(run["result"]) and f"{run['step']:06d}" in run["result"]
    step = run["step"]
    status, run = server.send("/srpo/runs/halted/resume", {"steps": step + 1})
    assert status == 200, run
    assert run["can_stop"]
    status, told = server.send("/srpo/runs/halted/resume", {})
    assert status == 409 and "at work" in told["error"]
    run = until(server, "halted", lambda run: run["ended"])
    assert (run["status"], run["step"], run["steps"]) == ("finished", step + 1, step + 1)
    assert run["curves"]["steps"] == list(range(1, step + 2))
    assert server.send("/srpo/runs/halted/stop", {})[0] == 409
    status, told = server.send("/srpo/runs/halted/resume", {})
    assert status == 409 and "finished" in told["error"]


def test_stopped_at_once(server, runs):
    folder = train(runs, "ended", 400)
    until(server, "ended", lambda run: run["status"] == "training")
    state = read_state(folder)
    status, run = server.send("/srpo/runs/ended/stop", {"now": True})
    assert (status, run["status"]) == (200, "killed")
    assert not is_alive(state)


@pytest.mark.parametrize(
    "name", ["none", "..", "%2e%2e", "..%2f..%2fmodels", "%2Fetc", "done%2Fcheckpoints", "a%00b", "x" * 300, "CON", "~"]
)
def test_what_is_no_run_is_not_found(server, finished, name):
    for path in ("", "/preview.jpg", "/report"):
        status, _, body = ask(server, f"/srpo/runs/{name}{path}")
        assert status == 404, body
    for action in ("stop", "resume", "save"):
        assert ask(server, f"/srpo/runs/{name}/{action}", b"{}", {"Content-Type": "application/json"})[0] == 404


def test_links_out_of_the_folder_are_not_followed(server, runs, finished, tmp_path):
    try:
        (runs / "link").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("no links here")
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    try:
        status, _, body = ask(server, "/srpo/runs/link")
        assert status == 404 and "link" in json.loads(body)["error"]
        assert "link" not in {run["name"] for run in server.get("/srpo/runs")["runs"]}
    finally:
        (runs / "link").unlink()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},  # what a form of another site's page can send without asking
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Origin": "http://elsewhere.example"},
        {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "application/json", "Sec-Fetch-Site": "same-site"},
        {"Content-Type": "application/json", "Origin": "null"},
    ],
    ids=str,
)
def test_other_sites_can_do_nothing(server, finished, headers):
    for action in ("stop", "resume", "save"):
        assert ask(server, f"/srpo/runs/done/{action}", b"{}", headers)[0] in (400, 403)


def test_a_request_must_be_as_it_should_be(server, finished):
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"[]", b"{", b"3", b'{"a": "' + b"x" * 10_000 + b'"}'):
        assert ask(server, "/srpo/runs/done/stop", body, json_type)[0] == 400, body
    for steps in (b"0", b"-3", b"true", b'"9"', b"1.5"):
        status, _, body = ask(server, "/srpo/runs/done/resume", b'{"steps": %s}' % steps, json_type)
        assert status == 400 and "steps" in json.loads(body)["error"]
    for query in ("after=x", "log=1.5", "after=1e9"):
        assert ask(server, f"/srpo/runs/done?{query}")[0] == 400
    assert ask(server, "/srpo/runs/done/stop", method="GET")[0] in (404, 405)
    assert ask(server, "/srpo/runs/done?log=999999999&after=-999")[0] == 200


STRANGE = {
    "reward": ({"reward": {"name": "{folder}/evil.py:load"}}, "reward.name"),
    "more": ({"reward": {"name": "miniature", "more": [{"name": "evil:load"}]}}, "reward.name"),
    "family": ({"model": {"family": "evil:load"}}, "model.family"),
    "result": ({"output": {"result": "{folder}/../../../look.safetensors"}}, "output.result"),
    "climbing": ({"output": {"result": "{models}/../look.safetensors"}}, "output.result"),
    "embeddings": ({"data": {"embeddings": "{folder}/../elsewhere"}}, "data.embeddings"),
    "machines": ({"parallel": {"nodes": 2, "rendezvous": "elsewhere.example:29500"}}, "parallel.nodes"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_run_from_a_stranger_is_not_started(server, runs, name):
    """Whoever can upload files to the output folder must not have code of theirs run, nor files written elsewhere."""
    (changes, setting), folder = STRANGE[name], runs / f"stranger-{name}"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef load(config, device): pass\n")
    text = json.dumps(changes).replace("{folder}", str(folder)).replace("{models}", str(server.base / "models"))
    config = load_run("miniature", [f"output.dir={folder}"]).model_dump()
    for section, values in json.loads(text).items():
        config[section] |= values
    (folder / "run.json").write_text(json.dumps(config))
    before = {path.name for path in folder.iterdir()}
    status, told = server.send(f"/srpo/runs/{folder.name}/resume", {})
    assert status == 409 and setting in told["error"], told
    if name != "machines":
        status, told = server.send(f"/srpo/runs/{folder.name}/save", {})
        assert status == 409 and setting in told["error"], told
    assert {path.name for path in folder.iterdir()} == before
    assert not (runs.parents[1] / "look.safetensors").exists()


def test_nothing_that_is_broken_is_an_error(server, runs):
    folder = runs / "wreck"
    folder.mkdir()
    write_state(folder, "training", 10)
    wrecks = {
        "run.json": ["{", "[]", '{"optim": {"steps": "many"}}', "\0\0"],
        "metrics.jsonl": ["{", '{"step": "x"}', "[1]\n2\n{}\n", '{"step": 1, "seconds": 3}\n', "\xff\xfe"],
        "plan.json": ["{", "3", '["a"]'],
        "result.json": ["{", "[]", '{"path": 3, "step": "x"}'],
        "state.json": ["{", "[]", '{"status": "training"}'],
    }
    for name, texts in wrecks.items():
        for text in texts:
            (folder / name).write_text(text, encoding="latin-1")
            found = server.get("/srpo/runs")["runs"]
            assert "wreck" in {run["name"] for run in found}, (name, text)
            for path in ("", "?log=9", "/preview.jpg", "/report"):
                status, _, body = ask(server, f"/srpo/runs/wreck{path}")
                assert status in (200, 404, 409), (name, text, body)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_file_that_takes_long_does_not_hold_comfyui_up(server, runs, finished):
    """A log on a disk that doesn't answer: a pipe that nobody writes to. ComfyUI and other runs answer meanwhile."""
    folder = runs / "slow"
    folder.mkdir()
    (folder / "run.json").write_text((finished / "run.json").read_text())
    os.mkfifo(folder / "train.log")
    waiting = threading.Thread(target=ask, args=(server, "/srpo/runs/slow?log=5"))
    waiting.start()
    try:
        time.sleep(0.5)
        assert waiting.is_alive()
        assert server.get("/system_stats")["system"]
        assert server.get("/srpo/runs/done")["step"] == 4
    finally:
        with open(folder / "train.log", "w"):  # whoever waits for it reads its end
            pass
        waiting.join(30)
        (folder / "train.log").unlink()
    assert not waiting.is_alive()


def test_the_pack_asks_for_no_more_than_it_says(server):
    """The routes are there under both prefixes, and a server's log has nothing to say about them."""
    for prefix in ("", "/api"):
        assert ask(server, f"{prefix}/srpo/runs")[0] == 200
    assert "follow trainings" not in server.log()
    assert sys.executable  # the runs' Python, which the commands name
