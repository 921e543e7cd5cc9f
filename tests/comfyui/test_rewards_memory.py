"""What the pack loads at ComfyUI's start, and rewards under its own memory management.

They are loaded whole, evicted whole, let go; the scores stay the same.
"""

import json

import pytest
from comfyui_side import needs_comfyui, start

pytestmark = needs_comfyui


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    start("memory_in_comfyui.py", folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def whole(report):
    """How a reward looks that is on the card with all of its bytes."""
    return ["RewardWeights", report["size"], report["size"]]


def test_the_start_loads_nothing_slow(report):
    """Beside what ComfyUI itself has loaded by then."""
    print(f"{report['seconds']:.2f} s of a processor for {report['nodes']} nodes; imported {report['imported']}")
    assert report["nodes"] == 20
    slow = {"diffusers", "transformers", "peft", "open_clip", "accelerate", "matplotlib", "tensorboard", "rich"}
    assert "srpo_core" in report["imported"] and not slow & set(report["imported"])


def test_published_rewards_are_found_and_score_as_the_engine(report):
    assert report["published"] == {name: {"right": True, "told": True} for name in ("hpsv2", "pickscore")}


def test_the_right_scores_in_every_scene(report):
    rights = {name: scene["right"] for name, scene in report.items() if isinstance(scene, dict) and "right" in scene}
    assert len(rights) == 10 and all(rights.values()), rights


def test_a_reward_goes_to_the_card_when_it_scores(report, whole):
    assert report["scores"]["before"] == []
    assert report["scores"]["loaded"] == [whole] and report["scores"]["device"] == "cpu:0"


def test_another_model_takes_its_place_and_it_comes_back(report, whole):
    """All of it goes, though half would do: its layers can't run from another device's memory."""
    scene = report["evicted"]
    assert scene["alone"] == [whole]
    assert [name for name, *_ in scene["both"]] == ["RewardWeights", "Sequential"]
    assert [name for name, *_ in scene["after"]] == ["Sequential"] and scene["device"] == "cpu"
    assert whole in scene["again"]


def test_a_mixture_larger_than_the_card_goes_one_by_one(report):
    """Each reward reads all pictures, one by one as on a CPU, before the next one comes."""
    scene = report["mixture"]
    assert scene["names"] == ["miniature", "miniature#2", "miniature#3"]
    assert scene["there"] == [[1, 1]] * 36


def test_after_use_it_leaves_the_card(report, whole):
    assert report["after_use"]["alone"] == [] and report["after_use"]["after"] == []
    assert report["after_use"]["within"] == [whole]  # between calls that belong together it stays
    assert report["after_an_error"]["after"] == [] and "2 prompts" in report["after_an_error"]["error"]
    assert report["interrupted"] == {"read": [1], "loaded": []}


@pytest.mark.parametrize("name", ["too_small", "cpu", "novram", "no_room_after_all"])
def test_without_room_it_scores_on_the_cpu(report, name):
    assert report[name]["device"] == "cpu" and report[name]["loaded"] == []


def test_a_card_that_was_full_once_is_tried_again(report, whole):
    assert report["no_room_after_all"]["loaded_again"] == [whole]


def test_unloading_all_models_takes_it_too(report, whole):
    assert report["unloaded"]["before"] == [whole] and report["unloaded"]["loaded"] == []
    assert report["unloaded"]["device"] == "cpu"


def test_memory_is_free_when_the_nodes_output_goes(report, whole):
    assert report["let_go"] == {"before": [whole], "left": 0, "loaded": []}


def test_files_of_every_folder_that_comfyui_knows_are_offered(report):
    assert report["choices"] == ["auto", "0.safetensors", "1.safetensors", "text_encoders/2.safetensors"]
    answers = report["answers"]
    given = [name for name, answer in answers.items() if answer is True]
    assert given == ["0.safetensors", "1.safetensors", "text_encoders/2.safetensors", "null"]
    for name in ("2.safetensors", "auto"):
        assert "given" in answers[name] and "models/srpo_rewards" in answers[name]
