"""Score Images, Relative Score and Best of N in a real server: the engine's numbers, on the pictures given."""

from __future__ import annotations

import pytest
import torch
from comfyui_shown import REWARD, assert_alike, node, shown, texts
from comfyui_side import needs_comfyui
from miniature_pictures import drawn

from srpo_core.image_scores import by_word, control_words, score_batch
from srpo_core.lettering import with_scores
from srpo_core.miniature.captions import random_scenes
from srpo_core.preview import to_pil
from srpo_core.score_files import load_image

pytestmark = needs_comfyui
SCENES = random_scenes(3, seed=5)
PROMPTS = [scene.caption() for scene in SCENES]
LINES = "\n".join(PROMPTS)
LIKED, DISLIKED = "Detail\nReal", "Oil, Flat"


@pytest.fixture(scope="module")
def pictures(server):
    """Three pictures in the server's input folder, [3, 3, 128, 128] as it reads them."""
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(drawn(SCENES, ["Detail", "Flat", "Real"], seed=1)):
        to_pil(image).save(folder / f"scored-{i}.png")
    return torch.stack([load_image(folder / f"scored-{i}.png") for i in range(3)])


def batch(*names):
    """Nodes that load pictures of the input folder; the last of them, "batch", is all of them as a batch."""
    graph = {f"load{i}": node("LoadImage", image=name) for i, name in enumerate(names)}
    graph["batch1"] = node("ImageBatch", image1=["load0", 0], image2=["load1", 0])
    return graph | {"batch": node("ImageBatch", image1=["batch1", 0], image2=["load2", 0]), "reward": REWARD}


def three():
    return batch(*(f"scored-{i}.png" for i in range(3)))


def scoring(prompt=LINES, one_prompt_per_line=True, kind="SRPOScoreImages", **more):
    given = {"images": ["batch", 0], "prompt": prompt, "one_prompt_per_line": one_prompt_per_line, **more}
    return node(kind, reward=["reward", 0], **given)


def test_scores_are_the_engine_s_and_stand_on_the_pictures(server, pictures, reward):
    graph = three() | {
        "score": scoring(),
        "numbers": node("PreviewAny", source=["score", 0]),
        "seen": node("PreviewImage", images=["score", 1]),
        "text": node("PreviewAny", source=["score", 2]),
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    expected = score_batch(reward, pictures, PROMPTS)["reward"]
    assert [float(text) for text in texts(result, "numbers")] == pytest.approx(expected, abs=1e-5)
    (table,) = result.outputs["score"]["srpo_table"]
    assert table["columns"] == ["picture", "score", "prompt"]
    assert [row[1] for row in table["rows"]] == pytest.approx(expected, abs=1e-5)
    assert [row[2] for row in table["rows"]] == PROMPTS
    lines = texts(result, "text")[0].splitlines()
    assert lines[0].split("\t") == table["columns"] and lines[2].split("\t")[2] == PROMPTS[1]
    drawn_on = with_scores(pictures, expected)
    for name in ("seen", "score"):
        assert_alike(shown(server, result, name), drawn_on)
    assert [event["value"] for event in result.of("progress") if event["node"] == "score"][-1] == 3


def test_one_prompt_serves_all(server, pictures, reward):
    result = server.run(three() | {"score": scoring(PROMPTS[0], one_prompt_per_line=False)})
    (table,) = result.outputs["score"]["srpo_table"]
    expected = score_batch(reward, pictures, PROMPTS[:1] * 3)["reward"]
    assert table["columns"] == ["picture", "score"]
    assert [row[1] for row in table["rows"]] == pytest.approx(expected, abs=1e-5)


def test_relative_scores_are_the_engine_s(server, pictures, reward):
    graph = three() | {
        "relative": scoring(kind="SRPORelativeScore", liked=LIKED, disliked=DISLIKED),
        "numbers": node("PreviewAny", source=["relative", 0]),
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    words = control_words(["Detail", "Real"], ["Oil", "Flat"])
    expected = score_batch(reward, pictures, PROMPTS, words)
    assert [float(text) for text in texts(result, "numbers")] == pytest.approx(expected["relative"], abs=1e-5)
    (table,) = result.outputs["relative"]["srpo_table"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    for word, values in by_word(expected, words).items():
        assert [row[word] for row in rows] == pytest.approx(values, abs=1e-5)
    assert rows[0]["relative"] > rows[1]["relative"]  # drawn with detail; drawn flat


@pytest.mark.parametrize("as_list", [False, True])
def test_the_best_are_kept_with_their_scores_and_seeds(server, pictures, reward, as_list):
    source = ["list", 0] if as_list else ["batch", 0]
    graph = three() | {
        "list": node("RebatchImages", images=["batch", 0], batch_size=1),
        "score": scoring(),
        "seed": node("PrimitiveInt", value=2**53 + 1),
        "best": node("SRPOBestOfN", images=source, scores=["score", 0], keep=2, seed=["seed", 0]),
        "seen": node("PreviewImage", images=["best", 0]),
        "scores": node("PreviewAny", source=["best", 1]),
        "seeds": node("PreviewAny", source=["best", 2]),
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    scores = torch.tensor(score_batch(reward, pictures, PROMPTS)["reward"])
    order = scores.argsort(descending=True)[:2]
    assert_alike(shown(server, result, "seen"), pictures[order])
    assert [float(text) for text in texts(result, "scores")] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert [int(text) for text in texts(result, "seeds")] == [2**53 + 1 + i for i in order.tolist()]
    (table,) = result.outputs["best"]["srpo_table"]
    assert [row[:2] for row in table["rows"]] == [[1, order[0] + 1], [2, order[1] + 1]]
    assert "2 of 3 kept" in table["note"]


def test_rewards_of_a_mixture_have_columns_and_all_are_counted(server, pictures):
    mixed = node("SRPOMixRewards", reward_1=["one", 0], weight_1=1.0, reward_2=["two", 0], weight_2=3.0, values="raw")
    graph = three() | {"one": REWARD, "two": REWARD, "reward": mixed, "score": scoring()}
    result = server.run(graph)
    assert result.status == "success", result.error
    (table,) = result.outputs["score"]["srpo_table"]
    assert table["columns"] == ["picture", "score", "miniature", "miniature#2", "prompt"]
    for _, score, first, second, _ in table["rows"]:
        assert score == pytest.approx(first, abs=1e-5) and score == pytest.approx(second, abs=1e-5)
    assert [event["max"] for event in result.of("progress") if event["node"] == "score"][-1] == 6


def test_a_second_run_is_cached(server, pictures):
    graph = three() | {"score": scoring("a cat", False), "seen": node("PreviewImage", images=["score", 1])}
    assert "score" not in server.run(graph).cached
    again = server.run(graph)
    assert {"score", "seen"} <= set(again.cached) and again.outputs["score"]["srpo_table"]


def test_a_stop_is_obeyed_within_a_second(server, pictures):
    graph = three() | {
        "many": node("RepeatImageBatch", image=["batch", 0], amount=600),
        "score": scoring("a cat", False, images=["many", 0]),
    }
    assert server.seconds_to_stop(graph, "score") < 1


def test_without_a_seed_places_are_counted(server, pictures):
    graph = three() | {
        "score": scoring(),
        "best": node("SRPOBestOfN", images=["batch", 0], scores=["score", 0], keep=9),
        "seeds": node("PreviewAny", source=["best", 2]),
    }
    result = server.run(graph)
    assert sorted(texts(result, "seeds")) == ["0", "1", "2"] and len(result.outputs["best"]["images"]) == 3


@pytest.mark.parametrize(
    "change, told",
    [
        ({"prompt": ""}, "prompt: it is empty"),
        ({"prompt": "a\nb"}, "2 lines for 3 pictures"),
        ({"kind": "SRPORelativeScore", "liked": " , ", "disliked": DISLIKED}, "liked: no words"),
    ],
)
def test_what_is_wrong_is_said_in_the_user_s_words(server, pictures, change, told):
    change = {"one_prompt_per_line": change.get("prompt") != "", **change}
    result = server.run(three() | {"score": scoring(**change)})
    assert result.status == "error" and told in result.error


def test_scores_of_other_pictures_are_refused(server, pictures):
    graph = three() | {
        "score": scoring(),
        "best": node("SRPOBestOfN", images=["batch1", 0], scores=["score", 0], keep=1),
    }
    result = server.run(graph)
    assert result.status == "error" and "3 for 2 images" in result.error


@pytest.mark.parametrize("keep, told", [(0, "smaller than min"), (5000, "bigger than max"), ("many", "convert")])
def test_a_value_out_of_range_is_refused_before_anything_runs(server, pictures, keep, told):
    graph = {
        "load": node("LoadImage", image="scored-0.png"),
        "score": node("PrimitiveFloat", value=0.5),
        "best": node("SRPOBestOfN", images=["load", 0], scores=["score", 0], keep=keep),
    }
    status, answer = server.post(graph)
    (error,) = answer["node_errors"]["best"]["errors"]
    assert status == 400 and told in error["message"] and "keep" in error["details"]
