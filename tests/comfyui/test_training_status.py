"""SRPO Training Status in a real server."""

import json
import os
import socket
import time

import numpy as np
import pytest
import torch
from comfyui_side import needs_comfyui
from comfyui_training import quick_run
from PIL import Image
from safetensors.torch import load_file

from srpo_core import launch
from srpo_core.checkpoint import latest
from srpo_core.export import export_run
from srpo_core.preview import from_pil
from srpo_core.run_pictures import preview_pair
from srpo_core.run_state import read_state

pytestmark = needs_comfyui


@pytest.fixture(scope="module")
def run(server):
    """A finished run of two steps."""
    folder = server.base / "output" / "srpo" / "status-run"
    launch.start(quick_run(folder, 2))
    end = time.monotonic() + 180
    try:
        while time.monotonic() < end and read_state(folder).active:
            time.sleep(0.1)
        assert read_state(folder).status == "finished", read_state(folder)
        yield folder
    finally:
        state = read_state(folder)
        if state.host == socket.gethostname() and state.pid != os.getpid():
            launch.kill(state)


def graph(run, **more):
    return {"status": {"class_type": "SRPOTrainingStatus", "inputs": {"run": run}}, **more}


SAVED = {
    "before": {"class_type": "SaveImage", "inputs": {"images": ["status", 1], "filename_prefix": "before"}},
    "now": {"class_type": "SaveImage", "inputs": {"images": ["status", 2], "filename_prefix": "now"}},
    "lora": {"class_type": "SaveLoRA", "inputs": {"lora": ["status", 4], "prefix": "status/lora", "steps": 2}},
    "finished": {"class_type": "PreviewAny", "inputs": {"source": ["status", 5]}},
    "path": {"class_type": "PreviewAny", "inputs": {"source": ["status", 6]}},
}


def test_what_it_gives(server, run):
    result = server.run(graph("status-run", **SAVED))
    assert result.status == "success", result.error
    shown = result.outputs["status"]
    assert shown["srpo_run"] == ["status-run"]
    assert shown["text"][0].startswith("status-run: finished, step 2 of 2")
    assert result.outputs["finished"]["text"] == ["True"] or result.outputs["finished"]["text"] == ["true"]
    assert result.outputs["path"]["text"][0].strip('"') == str(run)
    pair = preview_pair(run, (128, 128))
    for side, one in zip(("before", "now"), pair, strict=True):
        files = result.outputs[side]["images"]
        assert len(files) == len(one.images) == 2
        for picture, image in zip(files, one.images, strict=True):
            path = server.base / "output" / picture["subfolder"] / picture["filename"]
            drawn = np.asarray(Image.open(path).convert("RGB"))
            assert torch.equal(from_pil(Image.fromarray(drawn)), image)


def test_its_lora_is_the_exports(server, run, tmp_path):
    server.run(graph("status-run", **SAVED))
    saved = load_file(next(iter((server.base / "output" / "status").glob("lora*.safetensors"))))
    exported = load_file(export_run(run, tmp_path / "lora.safetensors"))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)


def test_it_runs_each_time_and_pages_learn_of_it(server, run):
    for _ in range(2):
        result = server.run(graph("status-run"))
        assert "status" not in result.cached
        assert {"node": "status", "run": "status-run"} in result.of("srpo.run")
    assert server.get("/srpo/runs")["nodes"]["status"] == "status-run"


def test_without_a_name_it_is_the_run_that_began_last(server, run):
    later = run.parent / "later"
    later.mkdir(exist_ok=True)
    state = json.loads((run / "state.json").read_text())
    (later / "state.json").write_text(json.dumps(state | {"began": time.time() + 1000, "status": "failed"}))
    try:
        assert server.run(graph("")).outputs["status"]["srpo_run"] == ["later"]
    finally:
        (later / "state.json").unlink()
    assert server.run(graph(" status-run ")).outputs["status"]["srpo_run"] == ["status-run"]


def test_what_is_not_there_yet_holds_nothing_else_up(server, run):
    """A run without step, preview and checkpoint: what needs them doesn't run, and the text says why."""
    begun = run.parent / "begun"
    begun.mkdir(exist_ok=True)
    (begun / "run.json").write_text((run / "run.json").read_text())
    result = server.run(graph("begun", **SAVED))
    assert result.outputs["status"]["text"][0].startswith("begun: stopped, step 0 of 2")
    assert "now" not in result.outputs and "lora" not in result.outputs
    assert result.outputs["finished"]["text"] in (["False"], ["false"])
    assert result.status == "success"
    told = result.outputs["status"]["text"][0]
    assert "there is no checkpoint yet" in told and "there is no preview yet" in told


@pytest.mark.parametrize("name", ["none", "../srpo/status-run", "/etc", "status-run/"])
def test_a_wrong_name_is_refused(server, run, name):
    result = server.run(graph(name))
    assert result.status == "error" and "there is no run" in result.error


def test_a_run_of_all_weights_has_no_lora(server, run):
    full = run.parent / "full"
    checkpoint = full / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True, exist_ok=True)
    config = quick_run(full, 2, {"lora.rank": 0})
    (full / "run.json").write_text(config.model_dump_json())
    state = json.loads((latest(run) / "state.json").read_text()) | {"lora": None}
    (checkpoint / "state.json").write_text(json.dumps(state))
    result = server.run(graph("full", lora=SAVED["lora"]))
    assert result.status == "success"
    assert "trained all parameters" in result.outputs["status"]["text"][0]
