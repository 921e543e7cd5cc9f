"""The relative reward on a reward whose scores are known on paper."""

import pytest
import torch
from toy import DISLIKED, LIKED, DotReward

from srpo_core.preference import ControlWords, hinge_loss, preferred_and_other, relative_reward, wording

PROMPTS = ("a cat", "a dog", "a hen")


def images(batch_size=3):
    return torch.rand(batch_size, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_control_words_rotate_each_at_their_own_length():
    words = ControlWords(["a", "b"], ["x", "y", "z"])
    assert [words.pair(step) for step in range(6)] == [
        ("a", "x"), ("b", "y"), ("a", "z"), ("b", "x"), ("a", "y"), ("b", "z"),
    ]  # fmt: skip


@pytest.mark.parametrize(("liked", "disliked"), [([], ["x"]), (["a"], [])])
def test_control_words_need_both_sides(liked, disliked):
    with pytest.raises(ValueError, match="at least one liked and one disliked"):
        ControlWords(liked, disliked)


def test_inversion_prefers_the_disliked_word():
    assert preferred_and_other("good", "bad", denoises=True) == ("good", "bad")
    assert preferred_and_other("good", "bad", denoises=False) == ("bad", "good")


def test_wording_puts_the_word_before_the_prompt():
    assert wording("Detail", "two cats asleep") == "Detail. two cats asleep"


def test_both_wordings_are_scored_in_one_call():
    reward = DotReward()
    relative_reward(reward, images(), PROMPTS, LIKED, DISLIKED, 0.1)
    assert reward.calls == [[f"{LIKED}. {p}" for p in PROMPTS] + [f"{DISLIKED}. {p}" for p in PROMPTS]]


@pytest.mark.parametrize("k", [0.0, 0.25, torch.tensor([0.0, 0.1, 0.3])])
def test_score_is_the_formula(k):
    reward, batch = DotReward(), images()
    colours = batch.mean((2, 3))
    good, bad = (colours @ reward.directions[word].double() for word in (LIKED, DISLIKED))
    torch.testing.assert_close(relative_reward(reward, batch, PROMPTS, LIKED, DISLIKED, k), (1 + k) * good - bad)


def test_without_absolute_share_the_branches_are_opposite():
    there = relative_reward(DotReward(), images(), PROMPTS, *preferred_and_other(LIKED, DISLIKED, True), 0.0)
    back = relative_reward(DotReward(), images(), PROMPTS, *preferred_and_other(LIKED, DISLIKED, False), 0.0)
    torch.testing.assert_close(there, -back)


def test_a_batch_equals_its_images_alone():
    batch, k = images(), torch.tensor([0.1, 0.2, 0.3])
    together = relative_reward(DotReward(), batch, PROMPTS, LIKED, DISLIKED, k)
    for i in range(3):
        alone = relative_reward(DotReward(), batch[i : i + 1], PROMPTS[i : i + 1], LIKED, DISLIKED, float(k[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-7)


def test_a_reward_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"a score per text, \[6\]; got \[3\]"):
        relative_reward(lambda images, prompts: torch.zeros(3), images(), PROMPTS, LIKED, DISLIKED, 0.1)
    with pytest.raises(ValueError, match="2 images for 3 prompts"):
        relative_reward(DotReward(), images(2), PROMPTS, LIKED, DISLIKED, 0.1)


def test_hinge_is_flat_above_the_margin_and_shares_the_step_between_branches():
    score = torch.tensor([0.2, 0.7, 1.5], requires_grad=True)
    loss = hinge_loss(score, margin=0.7, num_branches=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 / 3 / 2)
    torch.testing.assert_close(score.grad, torch.tensor([-1 / 6, 0.0, 0.0]))
