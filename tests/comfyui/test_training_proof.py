"""Training from a graph, as a user lives through it: real servers, real trainings, real kills."""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from comfyui_miniature import ran
from comfyui_server import PACK, Server
from comfyui_shown import node, shown, texts
from comfyui_side import needs_comfyui
from comfyui_training import (
    Watcher,
    at_work,
    cancelled,
    end_trainings,
    graph,
    lora_file,
    meanwhile,
    refusal,
    runs,
    state,
    steps,
    trainings,
    tree,
    until,
)
from safetensors import safe_open
from safetensors.torch import load_file

from srpo_core.checkpoint import list_checkpoints
from srpo_core.miniature.looks import look
from srpo_core.run_state import is_alive, read_state

sys.path.append(str(PACK / "scripts"))

from graphs import schemas
from graphs.prompt import prompt_of

pytestmark = needs_comfyui

BOLD = """
data.batch_size=4
optim.lr=6e-4
optim.warmup_steps=2
optim.schedule=constant
output.preview_steps=12
output.evaluate_prompts=0
"""


@pytest.fixture(autouse=True)
def nothing_at_work(server):
    """Every test begins without a training, and leaves none."""
    assert trainings(server.base) == []
    yield
    left = trainings(server.base)
    end_trainings(server.base)
    assert left == []


def looks(server, result, name):
    """The mean look, from pixels, of the pictures under a node: 0 is disliked, 1 liked."""
    pictures = [torch.from_numpy(picture).movedim(-1, 0) / 255 for picture in shown(server, result, name)]
    return look(torch.stack(pictures))["look"].mean().item()


def test_the_whole_graph_trains_and_uses_what_it_learned(server):
    """workflows/train_miniature.json, with fewer and bolder steps: what it draws after training is liked better."""
    workflow = json.loads((PACK / "workflows" / "train_miniature.json").read_text(encoding="utf-8"))
    prompt = prompt_of(workflow, schemas.load())
    (trainer,) = (id for id, one in prompt.items() if one["class_type"] == "SRPOTrain")
    (compare,) = (id for id, one in prompt.items() if one["class_type"] == "SRPOCompare")
    prompt[trainer]["inputs"].update(name="learns", steps=18, preview_every=9, more_settings=BOLD)
    prompt |= {f"side {i}": node("PreviewImage", images=[trainer, i]) for i in (2, 3)}
    result = ran(server, prompt)
    before, after = (looks(server, result, f"side {i}") for i in (2, 3))
    assert after > before + 0.4, (before, after)
    assert lora_file(server, "learns").is_file()
    assert result.outputs[compare]["srpo_table"], "the result was not compared in the same queue"


def tensors(path):
    assert path.is_file(), path
    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved_step(folder):
    found = list_checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


MOMENTS = ("", "loading", "encoding", "training", "preview", "saving", "training", "training", "preview", "saving")
"""Phases in which a run is cancelled, one after the other."""


def test_ten_cancels_cost_nothing(server):
    """Cancelled at random moments, a run goes on each time; its result is that of a run left alone."""
    rng, folder, last = random.Random(5), runs(server) / "cancelled", 32
    given = graph("cancelled", steps=last, checkpoint_every=3)
    before = 0
    for phase in MOMENTS:
        pid = state(folder).get("pid")

        def moment(phase=phase, pid=pid):
            until(lambda: state(folder).get("pid", pid) != pid, "a new process")
            at_work(folder, phase)
            time.sleep(rng.uniform(0, 0.25))

        result, seconds = cancelled(server, given, moment)
        assert result.of("execution_interrupted"), (phase, result.error)
        assert trainings(server.base) == []
        assert seconds < 60, phase
        now = read_state(folder)
        assert now.status == "stopped", (phase, now)
        assert before <= saved_step(folder) < last
        assert steps(folder)[: saved_step(folder) + 1] == list(range(saved_step(folder) + 1)) or not steps(folder)
        before = saved_step(folder)
    assert before >= 1
    ran(server, given)
    ran(server, graph("left-alone", steps=last, checkpoint_every=3))
    assert steps(folder) == list(range(last + 1))
    assert same(tensors(lora_file(server, "cancelled")), tensors(lora_file(server, "left-alone")))


def test_a_killed_trainer_is_told_and_its_run_goes_on(server):
    folder, given = runs(server) / "killed", graph("killed", steps=12)
    with meanwhile(lambda: os.kill(at_work(folder, "training", step=3)["pid"], signal.SIGKILL)):
        result = server.run(given)
    assert result.status == "error"
    assert "killed" in result.error
    assert "go on" in result.error  # what to try
    saved = saved_step(folder)
    assert saved >= 2
    ran(server, given)
    assert steps(folder) == list(range(13))
    assert lora_file(server, "killed").is_file()


def test_several_processes_end_together(server):
    """One process of two is killed: both end, which the node says. Cancel ends both; one alone goes on from there."""
    folder, given = runs(server) / "several", graph("several", steps=50, processes=2)

    def kill_one():
        first = at_work(folder, "training", step=1)
        (other,) = (one for one in trainings(server.base) if one.pid not in (first["pid"], first["launcher"]))
        other.kill()

    with meanwhile(kill_one):
        result = server.run(given)
    assert "another process of this run is gone" in result.error
    assert trainings(server.base) == []
    last = state(folder)["pid"]

    def second_begun():
        until(lambda: state(folder).get("pid", last) != last, "a new process")
        at_work(folder, "training")
        assert len(trainings(server.base)) == 3  # two, and the one that started them
        until(lambda: saved_step(folder) >= 1, "a checkpoint")

    result, _ = cancelled(server, given, second_begun)
    assert result.of("execution_interrupted"), result.error
    assert trainings(server.base) == []
    saved = saved_step(folder)
    ran(server, graph("several", steps=saved + 1))
    assert steps(folder) == list(range(saved + 2))


def test_a_training_outlives_the_server_and_is_picked_up(tmp_path):
    one = two = Server(tmp_path)
    try:
        one.wait()
        folder, given = runs(one) / "outlives", graph("outlives", steps=16)
        assert one.post(given)[0] == 200
        pid = at_work(folder, "training", step=1)["pid"]
        one.process.kill()
        one.process.wait()
        at_work(folder, step=max(steps(folder)) + 2)  # it trains without a server
        os.kill(pid, signal.SIGSTOP)  # until there is one
        two = Server(tmp_path).wait()
        with meanwhile(
            lambda: (until(lambda: two.get("/queue")["queue_running"], "a graph at work"), os.kill(pid, signal.SIGCONT))
        ):
            result = ran(two, given)
        assert state(folder)["pid"] == pid
        assert steps(folder) == list(range(17))
        assert texts(result, "path") == [str(lora_file(two, "outlives"))]
        assert (
            "outlives.safetensors"
            in two.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
        )
    finally:
        one.stop()
        two.stop()
        end_trainings(tmp_path)


def test_every_page_is_told_of_a_training(server):
    """The one that queued it, another one, and one that comes when it is over."""
    with Watcher(server) as other:
        result = ran(server, graph("watched", steps=2))
    (told,) = other.of("srpo.run")
    assert told == {"node": "train", "run": "watched"} and told in result.of("srpo.run")
    assert server.get("/srpo/runs")["nodes"]["train"] == "watched"
    curves = server.get("/srpo/runs/watched")["curves"]
    assert curves["steps"] == [1, 2] and curves["preview"]["steps"] == [0, 2]
    done = [event["value"] for event in result.of("progress") if event["node"] == "train"]
    assert done == sorted(done) and done[-1] == 2


def test_two_runs_never_share_a_device_unasked(server):
    ran(server, graph("first", steps=500, mode="background"))
    first = at_work(runs(server) / "first", "training")
    for mode in ("background", "wait"):
        said = refusal(server, graph("second", mode=mode))
        assert "first" in said and "share_gpu" in said, said
    assert not (runs(server) / "second" / "state.json").exists()
    ran(server, graph("second", steps=2, share_gpu=True))
    assert is_alive(read_state(runs(server) / "first"))
    assert state(runs(server) / "first")["pid"] == first["pid"]
    assert server.send("/srpo/runs/first/stop", {})[0] == 200
    until(lambda: not trainings(server.base), "the end of a run that was asked to stop")
    assert read_state(runs(server) / "first").status == "stopped"


def test_a_background_run_lets_nothing_after_it_run(server):
    result = ran(server, graph("behind", steps=3, mode="background"))
    assert "after" not in result.outputs and "path" not in result.outputs
    pid = at_work(runs(server) / "behind")["pid"]
    until(lambda: read_state(runs(server) / "behind").status == "finished", "its end")
    used = ran(server, graph("behind", steps=3))
    assert texts(used, "path") == [str(lora_file(server, "behind"))]
    assert state(runs(server) / "behind")["pid"] == pid  # used as it is, not trained again


def test_more_steps_go_on_and_write_a_file_of_their_own(server):
    ran(server, graph("longer", steps=2))
    first = lora_file(server, "longer").read_bytes()
    result = ran(server, graph("longer", steps=4))
    assert lora_file(server, "longer").read_bytes() == first
    assert texts(result, "path") == [str(lora_file(server, "longer-000004"))]
    assert not same(tensors(lora_file(server, "longer")), tensors(lora_file(server, "longer-000004")))
    assert steps(runs(server) / "longer") == [0, 1, 2, 3, 4]
    again = ran(server, graph("longer", steps=4, if_there="new run"))
    assert texts(again, "path") == [str(lora_file(server, "longer-2"))]
    said = refusal(server, graph("longer", {"optim.lr": 1e-3}, steps=4))
    assert "optim.lr" in said and "new run" in said, said


def test_a_file_of_the_users_is_never_overwritten(server):
    mine = lora_file(server, "mine")
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(b"of another")
    assert str(mine.name) in refusal(server, graph("mine"))
    assert mine.read_bytes() == b"of another"
    assert not (runs(server) / "mine" / "state.json").exists()


def test_all_weights_become_a_diffusion_model(server):
    result = ran(server, graph("whole", {"lora.rank": 0}, steps=2))
    path = server.base / "models" / "diffusion_models" / "whole.safetensors"
    assert texts(result, "path") == [str(path)]
    with safe_open(path, "pt") as file:
        assert file.keys()
    assert "whole.safetensors" in json.dumps(server.get("/object_info/UNETLoader"))


def test_check_only_leaves_nothing(server):
    before = tree(server.base / "output")
    result = ran(server, graph("looked-at", mode="check only"))
    assert "path" not in result.outputs
    assert tree(server.base / "output") == before
    assert result.outputs["train"]
