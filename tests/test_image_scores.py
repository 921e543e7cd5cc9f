"""Scores of pictures in memory: whose prompt, which numbers, and what is refused because it would mean nothing."""

import math

import pytest
import torch
from tiny import ColourReward, brightness

from srpo_core.config import ConfigError
from srpo_core.errors import NotFiniteError
from srpo_core.image_scores import (
    by_word,
    control_words,
    prompts_for,
    reads_prompts,
    relative_rows,
    score_batch,
    score_rows,
    summary,
    unheard,
)
from srpo_core.rewards.mixture import MixedReward, WeightedReward

PROMPTS = ["a cat", "a dog", "a tree"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = control_words(["Real", "Detail"], ["Oil", "Flat", "Anime"])


class Blind:
    reads_prompts = False

    def __call__(self, images, prompts):
        return brightness(images, prompts).repeat(len(prompts) // len(images))


def test_a_text_serves_every_picture_and_lines_serve_one_each():
    assert prompts_for(" a cat\nat night ", 2, one_per_line=False) == ["a cat\nat night"] * 2
    assert prompts_for("a cat\n\n a dog \n", 2, one_per_line=True) == ["a cat", "a dog"]
    assert prompts_for("a cat\n", 3, one_per_line=True) == ["a cat"] * 3
    with pytest.raises(ConfigError, match="2 lines for 3 pictures"):
        prompts_for("a cat\na dog", 3, one_per_line=True)
    assert prompts_for(" \n", 3, one_per_line=True) == [""] * 3


def test_words_that_change_nothing_are_told():
    same = {"reward": [0.2, 0.4], "relative": [0.0, 0.0], "word:a": [0.2, 0.3], "word:b": [0.2, 0.3]}
    assert "No word changes a score" in unheard(same)
    assert unheard(same | {"word:b": [0.2, 0.31]}) == ""


def test_scores_are_the_reward_s_own():
    expected = ColourReward()(IMAGES, PROMPTS).tolist()
    scores = score_batch(ColourReward(), IMAGES, PROMPTS)
    assert list(scores) == ["reward"] and scores["reward"] == pytest.approx(expected, abs=1e-6)


def test_parts_of_a_mixture_stand_beside_it():
    mixed = MixedReward([WeightedReward("colour", ColourReward()), WeightedReward("bright", Blind(), weight=3.0)])
    scores = score_batch(mixed, IMAGES, PROMPTS)
    colour, bright = ColourReward()(IMAGES, PROMPTS), brightness(IMAGES, PROMPTS)
    assert scores["reward"] == pytest.approx(((colour + 3 * bright) / 4).tolist(), abs=1e-6)
    columns, rows = score_rows(scores, PROMPTS)
    assert columns == ["picture", "score", "colour", "bright", "prompt"]
    assert rows[1][0] == 2 and rows[1][-1] == "a dog" and rows[1][3] == pytest.approx(bright[1].item(), abs=1e-6)
    assert score_rows(scores, ["a cat"] * 3)[0] == ["picture", "score", "colour", "bright"]


def test_relative_scores_of_words_average_to_the_relative_score():
    scores = score_batch(ColourReward(), IMAGES, PROMPTS, WORDS)
    under = {word: ColourReward()(IMAGES, [f"{word}. {prompt}" for prompt in PROMPTS]) for word in ("Real", "Oil")}
    assert scores["word:Real"] == pytest.approx(under["Real"].tolist(), abs=1e-6)
    words = by_word(scores, WORDS)
    assert list(words) == ["Real", "Detail", "Oil (disliked)", "Flat (disliked)", "Anime (disliked)"]
    for side in (list(words)[:2], list(words)[2:]):
        mean = [math.fsum(words[name][i] for name in side) / len(side) for i in range(3)]
        assert mean == pytest.approx(scores["relative"], abs=1e-5)
    disliked = sum(torch.tensor(scores[f"word:{word}"]) for word in WORDS.disliked) / 3
    assert words["Real"] == pytest.approx((under["Real"] - disliked).tolist(), abs=1e-5)
    columns, rows = relative_rows(scores, WORDS)
    assert columns[:3] == ["picture", "relative", "plain score"] and columns[3:] == list(words)
    assert rows[2][:3] == [3, scores["relative"][2], scores["reward"][2]] and len(rows) == 3


def test_a_mixture_gets_all_pictures_in_one_call():
    """So that it may load its rewards one after the other."""
    calls = []

    def counting(images, prompts):
        calls.append((len(images), len(prompts)))
        return Blind()(images, prompts)

    score_batch(counting, IMAGES, PROMPTS, WORDS)
    assert calls == [(3, 3 * 6)]


def test_scores_that_would_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="prompt: it is empty"):
        score_batch(ColourReward(), IMAGES, ["a cat", "", "a dog"])
    assert score_batch(Blind(), IMAGES, [""] * 3)["reward"] == pytest.approx(brightness(IMAGES, PROMPTS).tolist())
    with pytest.raises(ConfigError, match="does not read the prompt"):
        score_batch(Blind(), IMAGES, PROMPTS, WORDS)
    for liked, disliked, name in (([], ["Oil"], "liked"), (["Real"], [], "disliked")):
        with pytest.raises(ConfigError, match=f"{name}: no words"):
            control_words(liked, disliked)
    with pytest.raises(NotFiniteError, match="picture 2: its reward"):
        score_batch(lambda images, _: torch.tensor([0.1, math.nan, 0.2]), IMAGES, PROMPTS)


def test_a_mixture_reads_prompts_if_a_part_does():
    blind, seeing = WeightedReward("blind", Blind()), WeightedReward("colour", ColourReward())
    assert reads_prompts(MixedReward([blind, seeing])) and not reads_prompts(MixedReward([blind, blind]))
    assert reads_prompts(ColourReward()) and not reads_prompts(Blind())


def test_a_summary_names_the_best():
    assert summary([0.25, 0.5, 0.25]) == "3 pictures, mean score 0.3333, highest 0.5 (picture 2)"
    assert summary([0.5], "relative score") == "relative score 0.5"
