"""SRPO Train: its widgets, what becomes of them, and what it refuses before anything is begun."""

import json
from pathlib import Path

import pytest
from comfyui_miniature import ran
from comfyui_shown import REWARD, node, texts
from comfyui_side import needs_comfyui
from comfyui_training import (
    BUILT_IN,
    QUICK,
    at_work,
    end_trainings,
    graph,
    lora_file,
    meanwhile,
    refusal,
    runs,
    state,
    train,
    trainings,
    tree,
    until,
)

from srpo_core.run_state import read_state

pytestmark = needs_comfyui
WIDGETS = [
    "name", "base", "clip_l", "t5xxl", "vae", "recipe", "steps", "seed", "mode", "if_there", "preview_every",
    "checkpoint_every",
]  # fmt: skip
SOCKETS = ["reward", "prompts", "words", "rollout", "align", "optimizer", "lora"]
ADVANCED = ["processes", "gpus", "share_gpu", "nodes", "node_rank", "rendezvous", "more_settings"]
CAPTION = "a purple ring above a purple ball in a meadow"
OUTPUTS = {"lora": "LORA_MODEL", "loss": "LOSS_MAP", "before": "IMAGE", "after": "IMAGE", "path": "STRING"}


@pytest.fixture(autouse=True)
def nothing_at_work(server):
    """Every test leaves no training."""
    yield
    end_trainings(server.base)


@pytest.fixture(scope="module")
def schema(server):
    return server.object_info()["SRPOTrain"]


def test_widgets_stand_in_an_order_that_saved_graphs_rely_on(schema):
    order = [*schema["input_order"].get("required", []), *schema["input_order"].get("optional", [])]
    assert [name for name in order if name in WIDGETS + ADVANCED] == WIDGETS + ADVANCED
    assert {name for name in order if name in SOCKETS} == set(SOCKETS)
    assert set(order) == {*WIDGETS, *SOCKETS, *ADVANCED}
    assert dict(zip(schema["output_name"], schema["output"], strict=True)) == OUTPUTS
    assert schema["output_node"] and schema["category"] == "SRPO/training"


def options(schema, name):
    """A choice's, whichever way this ComfyUI tells them."""
    kind, *more = schema["input"]["required"][name]
    return kind if isinstance(kind, list) else more[0]["options"]


def test_what_the_choices_offer(server, schema):
    assert options(schema, "base")[0] == BUILT_IN
    assert options(schema, "mode") == ["wait", "background", "check only"]
    assert options(schema, "if_there") == ["go on", "new run"]
    assert options(schema, "recipe")[0] == "auto" and "flux-dev-lora-24gb" in options(schema, "recipe")
    for name in ("clip_l", "t5xxl", "vae"):
        assert options(schema, name)[0] == "auto"


def checked(server, name, settings=None, **inputs):
    """The plan that "check only" shows, by name."""
    result = ran(server, {"train": train(name, settings, mode="check only", **inputs)})
    (plan, *_) = result.outputs["train"]["srpo_table"]
    return {row[0]: row[1] for row in plan["rows"]}


def test_check_only_shows_the_plan(server):
    before = tree(server.base / "output")
    plan = checked(server, "planned", steps=7)
    text = json.dumps(plan)
    assert "7" in text and "miniature" in text
    assert {"memory", "time"} <= {name.lower() for name in plan} or "memory" in text
    assert tree(server.base / "output") == before


def run_json(server, name):
    return json.loads((runs(server) / name / "run.json").read_text(encoding="utf-8"))


def test_settings_land_in_the_description_of_the_run(server):
    """Sockets stand above the recipe, more_settings above them; the rest is the recipe's."""
    given = {
        "words": node("SRPOControlWords", liked="Bright, Sunny", disliked="Dark", margin=0.5),
        "optimizer": node(
            "SRPOOptimizer", lr=1e-4, warmup_steps=1, schedule="constant", accumulation=1, max_grad_norm=0.3,
            weight_decay=0.0, ema_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8,
        ),
        "lora": node("SRPOLoRA", rank=3, alpha=0.0, targets="attention", start="none"),
        "prompts": node(
            "SRPOPrompts", source="text", text="a red ball\na blue star", path="", preview_text=CAPTION,
            photo_share=1.0, bucket_step=0, prompt_column="",
        ),
        "reward": REWARD,
        **graph(
            "described", {"optim.lr": 2e-4}, steps=2, seed=9, words=["words", 0], optimizer=["optimizer", 0],
            lora=["lora", 0], prompts=["prompts", 0], reward=["reward", 0],
        ),
    }  # fmt: skip
    result = ran(server, given)
    folder, config = runs(server) / "described", run_json(server, "described")
    assert (config["reward"]["liked"], config["reward"]["disliked"]) == (["Bright", "Sunny"], ["Dark"])
    assert config["reward"]["name"] == "miniature"
    assert (config["lora"]["rank"], config["lora"]["targets"]) == (3, "attention")
    assert (config["optim"]["lr"], config["optim"]["max_grad_norm"], config["optim"]["steps"]) == (2e-4, 0.3, 2)
    assert (config["seed"], config["model"]["family"]) == (9, "miniature")
    assert config["output"]["dir"] == str(folder)
    assert config["output"]["result"] == str(lora_file(server, "described"))
    prompts = Path(config["data"]["prompts"])
    assert prompts.parent == folder and prompts.read_text(encoding="utf-8") == "a red ball\na blue star"
    told = json.loads((folder / "previews" / "step-000002.json").read_text(encoding="utf-8"))
    assert told["prompts"] == [CAPTION]
    assert texts(result, "path") == [str(lora_file(server, "described"))]
    assert all(len(row) == 2 for row in json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    other = {**given, "prompts": {**given["prompts"], "inputs": {**given["prompts"]["inputs"], "text": "a white box"}}}
    assert "data.prompts" in refusal(server, other), "a run goes on with its own prompts"
    assert run_json(server, "described") == config and prompts.is_file()


def test_a_run_of_the_node_goes_on_from_the_page(server):
    """What the node describes passes the checks of what a page may start."""
    ran(server, graph("handed-over", steps=400, mode="background"))
    folder = runs(server) / "handed-over"
    at_work(folder, "training", step=1)
    assert server.send("/srpo/runs/handed-over/stop", {})[0] == 200
    until(lambda: not trainings(server.base), "its end")
    step = read_state(folder).step
    status, told = server.send("/srpo/runs/handed-over/resume", {"steps": step + 2})
    assert status == 200, told
    until(lambda: read_state(folder).status == "finished", "its end")
    result = ran(server, graph("handed-over", steps=step + 2))
    assert texts(result, "path") == [str(lora_file(server, "handed-over"))]


def test_a_run_at_work_is_attached_to(server):
    ran(server, graph("shared", steps=6, mode="background"))
    pid = at_work(runs(server) / "shared")["pid"]
    result = ran(server, graph("shared", steps=6))
    assert state(runs(server) / "shared")["pid"] == pid
    assert texts(result, "path") == [str(lora_file(server, "shared"))]


def test_queued_while_the_run_still_stops(server):
    """It goes on once it has stopped, whatever the graph does with it then."""
    ran(server, graph("stopping", steps=400, mode="background"))
    folder = runs(server) / "stopping"
    pid = at_work(folder, "training", step=1)["pid"]
    assert server.send("/srpo/runs/stopping/stop", {})[0] == 200
    ran(server, graph("stopping", steps=400, mode="background", preview_every=3))
    found = read_state(folder)
    assert found.active and found.pid != pid


def test_cancelled_while_it_is_checked(server):
    """Nothing is begun then, in the background either."""

    def cancel(event):
        if event["type"] == "executing" and event["data"]["node"] == "train":
            server.interrupt()

    result = server.run(graph("never", steps=400, mode="background"), cancel)
    assert result.of("execution_interrupted")
    assert not (runs(server) / "never").exists()


def test_a_state_that_can_not_be_read_for_a_moment(server):
    folder = runs(server) / "unread"

    def hide():
        at_work(folder, "training", step=1)
        (folder / "state.json").rename(folder / "hidden.json")

    with meanwhile(hide):
        result = server.run(graph("unread", steps=30))
    assert result.status == "success", result.error


def test_stop_in_the_page_ends_the_graph_as_cancel_does(server):
    folder = runs(server) / "halted-in-page"
    asked = []

    def stop(event):
        if event["type"] == "progress" and event["data"]["value"] >= 1 and not asked:
            asked.append(server.send("/srpo/runs/halted-in-page/stop", {})[0])

    result = server.run(graph("halted-in-page", steps=400), stop)
    assert asked == [200]
    assert result.of("execution_interrupted"), result.error
    assert read_state(folder).status == "stopped"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base": "none.safetensors"}, "base"),
        ({"steps": 0}, "steps"),
        ({"recipe": "none"}, "recipe"),
        ({"more_settings": "optim.lrr=3"}, "more_settings, line 1: optim.lrr=3"),
        ({"more_settings": "# mine\nlr=1e-4"}, "more_settings, line 2: lr=1e-4"),
        ({"more_settings": "# mine\noptim.lr=x"}, "more_settings, line 2: optim.lr=x"),
        ({"more_settings": "\n\nnonsense"}, "more_settings, line 3: 'nonsense' is no setting"),
        ({"more_settings": "align.range_start=45"}, "more_settings, line 1: align.range_start=45"),
        ({"more_settings": "data.width=17"}, "more_settings, line 1: data.width=17"),
        ({"more_settings": "optim.steps=0"}, "more_settings, line 1: optim.steps=0"),
        ({"more_settings": "output.dir=elsewhere"}, "output.dir"),
        ({"nodes": 2}, "rendezvous"),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_is_refused_in_the_words_of_the_widgets(server, changes, word):
    given = {"train": node("SRPOTrain", **train("refused")["inputs"] | changes)}
    assert word in refusal(server, given)
    assert not (runs(server) / "refused" / "state.json").exists()


def test_quick_settings_are_those_of_the_run(server):
    """The helpers' settings come through more_settings."""
    ran(server, graph("quick", steps=1))
    config = run_json(server, "quick")
    for key, value in QUICK.items():
        section, _, name = key.partition(".")
        assert config[section][name] == (False if value == "false" else value)
