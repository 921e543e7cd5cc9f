"""SRPO Train as it is really used: queued twice, cancelled, asked for more, its files removed, its device taken."""

import json

import pytest
from comfyui_miniature import ran
from comfyui_shown import REWARD, node, texts
from comfyui_side import needs_comfyui
from comfyui_training import (
    at_work,
    cancelled,
    end_trainings,
    graph,
    lora_file,
    refusal,
    runs,
    steps,
    train,
    until,
)

from srpo_core.rewards.mixture import USUAL

pytestmark = needs_comfyui


@pytest.fixture(autouse=True)
def nothing_at_work(server):
    """Every test leaves no training."""
    yield
    end_trainings(server.base)


def test_queued_twice_and_cancelled_once(server):
    """The second one goes on where the first was stopped."""
    given = graph("twice", steps=5, checkpoint_every=1)
    answers = [server.post(one)[1] for one in (given, {**given, "again": node("PreviewAny", source=["train", 4])})]
    at_work(runs(server) / "twice", step=1)
    server.interrupt()
    for answer in answers:
        until(lambda number=answer["prompt_id"]: server.get(f"/history/{number}"), "the end of a graph")
    assert steps(runs(server) / "twice") == [0, 1, 2, 3, 4, 5]
    assert lora_file(server, "twice").is_file()


def test_a_result_that_was_removed_comes_back(server):
    ran(server, graph("removed", steps=1))
    first = lora_file(server, "removed").read_bytes()
    lora_file(server, "removed").unlink()
    result = ran(server, graph("removed", steps=1, preview_every=1))  # a change, so that ComfyUI asks the node again
    assert texts(result, "path") == [str(lora_file(server, "removed"))]
    assert lora_file(server, "removed").read_bytes() == first
    assert steps(runs(server) / "removed") == [0, 1]


def test_more_steps_of_a_falling_schedule_say_the_way_out(server):
    falling = {"optim.schedule": "cosine"}
    ran(server, graph("falling", falling, steps=1))
    said = refusal(server, graph("falling", falling, steps=3))
    assert "steps: 1 there, 3 here" in said and "constant" in said and "start" in said


def test_a_refused_run_leaves_nothing_and_takes_no_name(server):
    prompts = node(
        "SRPOPrompts", source="text", text="a red ball", path="", preview_text="", photo_share=1.0, bucket_step=0,
        prompt_column="",
    )  # fmt: skip
    for more in ({"data.height": 17}, {"lora.targets": "nothing"}):
        given = graph("unlucky", more, if_there="new run", prompts=["prompts", 0])
        assert refusal(server, {**given, "prompts": prompts})
        assert not (runs(server) / "unlucky").exists()
    result = ran(server, {**graph("unlucky", steps=1, if_there="new run", prompts=["prompts", 0]), "prompts": prompts})
    assert texts(result, "path") == [str(lora_file(server, "unlucky"))]


def test_without_a_checkpoint_settings_may_change(server):
    """Cancelled while it was loading, a run has nothing to lose."""
    folder = runs(server) / "early"
    result, _ = cancelled(server, graph("early", steps=50, checkpoint_every=50), lambda: at_work(folder, "loading"))
    assert result.of("execution_interrupted") and not steps(folder)
    ran(server, graph("early", {"optim.lr": 1e-3}, steps=1))
    assert steps(folder) == [0, 1]


def test_mixed_rewards_keep_their_shares_and_the_words_margin(server):
    mixed = {
        "one": REWARD, "other": REWARD,
        "mix": node("SRPOMixRewards", reward_1=["one", 0], weight_1=1.5, reward_2=["other", 0], weight_2=0.5,
                    values="comparable"),
        "words": node("SRPOControlWords", liked="Real", disliked="Painting", margin=0.4),
    }  # fmt: skip
    ran(server, mixed | graph("mixed", steps=1, reward=["mix", 0], words=["words", 0]))
    reward = json.loads((runs(server) / "mixed" / "run.json").read_text(encoding="utf-8"))["reward"]
    parts = [reward, *reward["more"]]
    assert [part["name"] for part in parts] == ["miniature", "miniature"]
    assert [part["weight"] for part in parts] == [1.5, 0.5] and [part["margin"] for part in parts] == [0.4, 0.4]
    low, high = USUAL["miniature"]
    for part in parts:  # from the usual span of its values to that of HPS v2.1
        assert part["offset"] == low and part["scale"] * (high - low) == pytest.approx(0.35 - 0.20)


def test_check_only_tells_what_is_at_work_on_the_device(server):
    ran(server, graph("busy", steps=400, mode="background"))
    at_work(runs(server) / "busy")
    said = refusal(server, graph("next", steps=1))
    assert "taken" in said and str(runs(server) / "busy") in said and "share_gpu" in said
    for name, word in (("next", "taken"), ("busy", "step")):
        result = ran(server, {"train": train(name, mode="check only", steps=1 if name == "next" else 400)})
        (plan,) = result.outputs["train"]["srpo_table"]
        assert word in plan["note"] and plan["rows"]
