"""Compare in a real server: both models draw what SRPO Sampler draws, and the numbers are the engine's."""

from __future__ import annotations

import pytest
import torch
from comfyui_shown import REWARD, assert_alike, node, shown, texts
from comfyui_side import needs_comfyui

from srpo_core.config import RewardConfig
from srpo_core.head_to_head import HeadToHead
from srpo_core.image_scores import control_words, score_batch
from srpo_core.pairs import side_by_side
from srpo_core.rewards import load_reward

pytestmark = needs_comfyui
PROMPT = "a red star above a blue box in the snow"
COUNT, SEED, STEPS = 3, 11, 6
HOW = {"seed": SEED, "steps": STEPS, "guidance": 3.5, "shift": 3.0}


def world():
    """The miniature with and without its LoRA, a prompt, an empty latent."""
    return {
        "mini": node("SRPOMiniature"),
        "tuned": node("SRPOLoadLoRA", model=["mini", 0], lora="miniature (built in)", strength=1.0),
        "text": node("CLIPTextEncode", clip=["mini", 1], text=PROMPT),
        "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=COUNT),
        "reward": REWARD,
    }


def compare(model_b=("tuned", 0), **more):
    labels = {"label_a": "base", "label_b": "LoRA"}
    return node(
        "SRPOCompare", model_a=["mini", 0], model_b=list(model_b), positive=["text", 0], vae=["mini", 2],
        latent=["empty", 0], **HOW | labels | more,
    )  # fmt: skip


def sampled(model):
    return node(
        "SRPOSampler", model=model, positive=["text", 0], latent=["empty", 0], noise="ComfyUI", at_once=4, **HOW
    )


@pytest.fixture(scope="module")
def compared(server):
    graph = world() | {
        "compare": compare(reward=["reward", 0], prompt=PROMPT),
        "a": node("PreviewImage", images=["compare", 1]),
        "b": node("PreviewImage", images=["compare", 2]),
        "rate": node("PreviewAny", source=["compare", 3]),
        "table": node("PreviewAny", source=["compare", 4]),
        "sample_a": sampled(["mini", 0]),
        "sample_b": sampled(["tuned", 0]),
        "decoded_a": node("VAEDecode", samples=["sample_a", 0], vae=["mini", 2]),
        "decoded_b": node("VAEDecode", samples=["sample_b", 0], vae=["mini", 2]),
        "sampler_a": node("PreviewImage", images=["decoded_a", 0]),
        "sampler_b": node("PreviewImage", images=["decoded_b", 0]),
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    return result


def images(server, result, name):
    """[B, 3, H, W] in [0, 1], 8 bits deep."""
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1).float() / 255 for one in shown(server, result, name)])


def test_both_draw_what_the_sampler_draws(server, compared):
    for side in "ab":
        assert_alike(shown(server, compared, side), images(server, compared, f"sampler_{side}"))
    a, b = images(server, compared, "a"), images(server, compared, "b")
    assert a.shape == (COUNT, 3, 128, 128) and (a - b).abs().mean() > 0.005


def test_scores_win_rate_and_pairs_are_the_engine_s(server, compared):
    reward = load_reward(RewardConfig(name="miniature"), "cpu")
    pictures = [images(server, compared, side) for side in "ab"]
    expected = HeadToHead("reward", *(score_batch(reward, one, [PROMPT] * COUNT)["reward"] for one in pictures))
    summary, first = compared.outputs["compare"]["srpo_table"]
    rows = [dict(zip(first["columns"], row, strict=True)) for row in first["rows"]]
    assert [row["seed"] for row in rows] == [SEED + i for i in range(COUNT)]
    for label, values in (("base", expected.a), ("LoRA", expected.b)):
        assert [row[label] for row in rows] == pytest.approx(values, abs=2e-3)  # 8 bits are a little off
    (rate,) = texts(compared, "rate")
    won = sum(row["wins"] == "LoRA" for row in rows)
    assert float(rate) == pytest.approx(won / COUNT) and summary["rows"][0][1] == pytest.approx(won / COUNT)
    assert f"Score: LoRA is higher in {won} of {COUNT} pictures" in summary["note"]
    scores = [row["base"] for row in rows], [row["LoRA"] for row in rows]
    pairs = side_by_side(*pictures, ("base", "LoRA"), scores, [f"seed {SEED + i}" for i in range(COUNT)])
    assert_alike(shown(server, compared, "compare"), pairs)
    assert texts(compared, "table")[0].count("\n\n") == 1


def test_one_bar_goes_through_both_models_and_the_scores(compared):
    values = [(event["value"], event["max"]) for event in compared.of("progress") if event["node"] == "compare"]
    assert values[-1] == (2 * STEPS + 2 * COUNT, 2 * STEPS + 2 * COUNT)
    assert values == sorted(values)


def test_without_a_reward_there_are_pictures_and_no_rate(server):
    graph = world() | {"compare": compare(), "rate": node("PreviewAny", source=["compare", 3])}
    result = server.run(graph)
    assert "no reward connected" in result.error
    result = server.run(world() | {"compare": compare()})
    assert result.status == "success" and len(result.outputs["compare"]["images"]) == COUNT
    assert not result.of("preview"), "the page would show the last of them in place of the pictures"
    (table,) = result.outputs["compare"]["srpo_table"]
    assert table["columns"] == ["picture", "seed", "change %"] and "No reward" in table["note"]


def test_the_same_model_twice_is_told(server):
    result = server.run(world() | {"compare": compare(("mini", 0), reward=["reward", 0], prompt=PROMPT)})
    summary, _ = result.outputs["compare"]["srpo_table"]
    assert "the same pictures" in summary["note"] and summary["rows"][0][1] == 0.5


def test_with_words_the_relative_score_is_compared_too(server, compared):
    asked = compare(reward=["reward", 0], prompt=PROMPT, liked="Detail, Real", disliked="Oil\nFlat")
    result = server.run(world() | {"compare": asked})
    assert result.status == "success", result.error
    summary, _ = result.outputs["compare"]["srpo_table"]
    reward, words = load_reward(RewardConfig(name="miniature"), "cpu"), (["Detail", "Real"], ["Oil", "Flat"])
    expected = [
        score_batch(reward, images(server, compared, side), [PROMPT] * COUNT, control_words(*words))["relative"]
        for side in "ab"
    ]
    assert [row[0] for row in summary["rows"]] == ["score", "relative score"]
    assert summary["rows"][1][3:5] == pytest.approx([sum(one) / COUNT for one in expected], abs=2e-3)
    assert "Relative score: LoRA is higher in 3 of 3" in summary["note"]  # what this LoRA was trained for


def test_a_reward_without_a_prompt_is_refused_before_pictures_are_drawn(server):
    result = server.run(world() | {"compare": compare(reward=["reward", 0], prompt=" ", seed=99)})
    assert "prompt: it is empty" in result.error
    assert not [event for event in result.of("progress") if event["node"] == "compare"]


def test_the_words_of_a_training_stand_above_its_own(server):
    mine, others = {"liked": "Detail, Real", "disliked": "Oil, Flat"}, {"liked": "Anime", "disliked": "Real"}
    control = {"words": node("SRPOControlWords", **mine, margin=0.5)}
    tables = []
    for asked, more in ((mine, {}), (others, {"words": ["words", 0]})):
        compared = compare(reward=["reward", 0], prompt=PROMPT, **asked, **more)
        tables.append(server.run(world() | control | {"compare": compared}).outputs["compare"]["srpo_table"])
    assert tables[0] == tables[1]
    assert tables[0][0]["rows"][1][0] == "relative score"
