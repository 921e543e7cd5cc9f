"""scripts/bench_comfyui.py: what it does to graphs and how it counts, without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import bench_comfyui  # noqa: E402
import bench_comfyui_run as run  # noqa: E402
import bench_comfyui_training as training  # noqa: E402
from bench_comfyui_files import named  # noqa: E402
from bench_comfyui_memory import DeviceMemory, Watch, process_memory, process_seconds  # noqa: E402

from srpo_core.run_state import RunState  # noqa: E402

GRAPH = {
    "1": {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}},
    "2": {"class_type": "SRPOSampler", "inputs": {"seed": 7, "steps": 50}},
    "3": {"class_type": "SRPOSampler", "inputs": {"seed": ["2", 1], "steps": 50}},
}


def test_other_seeds_leave_links_and_the_graph_itself_alone():
    before = json.dumps(GRAPH)
    first, second = run.reseeded(GRAPH), run.reseeded(GRAPH)
    seeds = {
        graph[node]["inputs"][name] for graph in (first, second) for node, name in (("1", "noise_seed"), ("2", "seed"))
    }
    assert len(seeds) == 4 and not seeds & {42, 7}
    assert first["3"] == GRAPH["3"] and json.dumps(GRAPH) == before


def test_inputs_of_a_class_are_set_anew():
    found = run.changed(GRAPH, "SRPOSampler", steps=2)
    assert [found[id]["inputs"].get("steps") for id in "123"] == [None, 2, 2]
    assert run.nodes_of(found, "SRPOSampler") == ["2", "3"]


def test_a_nodes_time_ends_where_the_next_one_begins(monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 5.5])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    times = run.Times()
    for kind, node in (
        ("executing", "1"),
        ("progress", "1"),
        ("executing", "2"),
        ("executing", "1"),
        ("execution_success", None),
    ):
        times({"type": kind, "data": {"node": node}})
    assert times.by_class(GRAPH) == {"1 RandomNoise": 2.5, "2 SRPOSampler": 3.0}


def test_every_part_is_there_with_its_graph():
    for full in (False, True):
        parts = bench_comfyui.Parts(full, 23.5, ROOT)
        assert all(callable(getattr(parts, name)) for name in parts.default)
        graphs = {
            "SRPO-workflow",
            *(name for name in parts.default if name in ("score_images", "best_of_n", "align_preview", "compare_lora")),
        }
        assert len(graphs) == 5
        assert all((ROOT / "workflows" / f"{name}{parts.suffix}.json").is_file() for name in graphs)


def test_a_part_that_fails_is_a_row_and_is_written(tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"runs": ["earlier"]}), encoding="utf-8")
    bench = run.Bench(tmp_path, out, [], cpu=True)
    bench.run_part("sum", lambda _: 1 / 0)
    earlier, now = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert earlier == "earlier"
    assert [(row["part"], row["what"]) for row in now["rows"]] == [("sum", "failed"), ("sum", "whole part")]
    assert now["rows"][0]["error"] == "ZeroDivisionError: division by zero"


def test_memory_of_a_process_is_seen():
    class NoDevice:
        def used(self):
            return None

    code = "held = bytearray(b'x') * 2**28; print(flush=True); input()"  # a quarter of a GiB
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        watch = Watch(NoDevice(), process.pid)
        memory, seconds = process_memory(process.pid), process_seconds(process.pid)
        row = watch.stop()
        process.communicate(b"\n")
    assert 0.25 <= memory < 0.4 and seconds > 0
    assert row == {"server_peak_gib": pytest.approx(memory, abs=0.05)}
    assert process_memory(process.pid) == process_seconds(process.pid) == 0


def test_names_get_the_prefix_that_comfyui_knows_once():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "text_model": torch.nn.Linear(2, 2)})
    names = [name for name, tensor in named(module, "text_model.", torch.float16, meta=True)]
    assert names == ["text_model.a.weight", "text_model.a.bias", "text_model.weight", "text_model.bias"]


def test_a_trainings_phases_have_their_first_moment_and_their_highest_memory():
    seen, own = training.Seen(), {"pid": 0, "created": 0.0, "host": "elsewhere"}
    loading = RunState("starting", **own, phase="loading the models")
    steps = [RunState("training", **own, phase="training", step=step) for step in (0, 0, 1, 2, 3, 4)]
    gibs = [9.0, 3.0, 4.0, 6.0, 5.0, 2.0, 1.0, 1.0]
    for second, (state, gib) in enumerate(zip([None, loading, *steps], gibs, strict=True)):
        seen.note(state, float(second), {"training": gib} if state else {})
    seen.note(RunState("finished", **own), 9.0, {})
    assert seen.began == {
        "before the run": 0.0, "loading the models": 1.0, "step 1": 2.0, "step 2": 4.0, "step 3": 5.0,
        "finished, its process is no longer there": 9.0,
    }  # fmt: skip
    assert seen.memory == {"loading the models": {"training": 3.0}, "step": {"training": 6.0}}


def test_a_training_keeps_its_graphs_settings_below_those_of_the_benchmark():
    given = {"name": "my-look", "recipe": "auto", "more_settings": "optim.lr=1"}
    graph = {"9": {"class_type": "SRPOTrain", "inputs": given}, **GRAPH}
    found = training._named(graph, "bench", {"recipe": "miniature"}, {"optim.lr": 2})
    assert found["9"]["inputs"] == {"name": "bench", "recipe": "miniature", "more_settings": "optim.lr=1\noptim.lr=2"}
    assert given["name"] == "my-look" and found["2"] == GRAPH["2"]


def test_memory_is_that_of_the_gpu_which_programs_see(monkeypatch):
    for visible, index in (("1,0", 1), ("GPU-1234", 0), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert DeviceMemory().index == index
