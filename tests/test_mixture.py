"""Several rewards in one run: sums that are on paper, and gradients that add up."""

import pytest
import tiny
import torch
from tiny import tiny_config
from toy import DISLIKED, LIKED, DotReward

from srpo_core.assemble import assemble
from srpo_core.config import RewardConfig
from srpo_core.interfaces import Reward
from srpo_core.metrics import Clock, read_metrics
from srpo_core.rewards import REWARDS, load_reward, load_rewards
from srpo_core.rewards.mixture import USUAL, MixedReward, WeightedReward, combined, comparable, joined

PROMPTS = [f"{LIKED}. a cat", f"{DISLIKED}. a cat"]


class BrightnessReward:
    """A second reward: how bright a picture is, whatever the text, in a range of its own (0 to 100)."""

    def __call__(self, images, prompts):
        return 100 * images.mean((1, 2, 3)).repeat(len(prompts) // len(images))


def load_brightness(config, device):
    return BrightnessReward()


tiny.load_brightness = load_brightness
"""As reward.name=tiny:load_brightness names it."""
MORE = {"name": "tiny:load_brightness", "scale": 0.05, "offset": 50.0, "margin": 2.0, "weight": 3.0}


def images(count=1):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_values_scores_and_losses_are_those_on_paper():
    part = WeightedReward("x", DotReward(), weight=2.0, margin=1.0, scale=0.1, offset=20.0)
    preferred, other = torch.tensor([24.0, 21.0]), torch.tensor([22.0, 23.0])
    assert part.normalised(preferred).tolist() == pytest.approx([0.4, 0.1])
    score = part.score(preferred, other, 0.5)
    assert score.tolist() == pytest.approx([1.5 * 0.4 - 0.2, 1.5 * 0.1 - 0.3])
    assert float(part.loss(score, 2)) == pytest.approx(2.0 * (0.6 + 1.15) / 2 / 2)


def test_an_offset_only_matters_for_the_share_of_absolute_reward():
    preferred, other = torch.tensor([24.0, 21.0]), torch.tensor([22.0, 23.0])
    plain, moved = (WeightedReward("x", DotReward(), offset=offset) for offset in (0.0, 20.0))
    assert torch.allclose(plain.score(preferred, other, 0.0), moved.score(preferred, other, 0.0))
    difference = plain.score(preferred, other, 0.1) - moved.score(preferred, other, 0.1)
    assert torch.allclose(difference, torch.full((2,), 0.1 * 20))


def test_a_mixture_is_the_weighted_mean_of_normalised_values():
    dot, bright = DotReward(), BrightnessReward()
    mixed = combined([
        WeightedReward("dot", dot, weight=1.0),
        WeightedReward("bright", bright, weight=3.0, scale=0.05, offset=50.0),
    ])  # fmt: skip
    assert isinstance(mixed, MixedReward) and isinstance(mixed, Reward)
    first, second = dot(images(), PROMPTS), bright(images(), PROMPTS)
    dot.calls.clear()
    assert torch.allclose(mixed(images(), PROMPTS), (first + 3 * 0.05 * (second - 50)) / 4)
    assert dot.calls == [PROMPTS]
    each = mixed.each(images(), PROMPTS)
    assert list(each) == ["dot", "bright"] and torch.equal(each["bright"], second)


def test_one_reward_alone_stays_in_its_own_range():
    reward = DotReward()
    assert combined([WeightedReward("dot", reward, weight=5.0, scale=9.0, offset=3.0)]) is reward


def test_each_reward_has_a_name_of_its_own():
    config = RewardConfig(name="tiny:load_reward", scale=2.0, more=[MORE, MORE, {"name": "tiny:load_reward"}])
    rewards = load_rewards(config, "cpu")
    names = ["tiny:load_reward", "tiny:load_brightness", "tiny:load_brightness#2", "tiny:load_reward#2"]
    assert [part.name for part in rewards] == names
    assert (rewards[0].scale, rewards[0].margin, rewards[1].weight, rewards[1].offset) == (2.0, 0.7, 3.0, 50.0)
    assert isinstance(load_reward(config, "cpu"), MixedReward)


def test_a_reward_in_the_users_own_file_is_called_by_the_files_name(tmp_path):
    own = tmp_path / "bright.py"
    own.write_text("def load(config, device):\n    return lambda images, prompts: images.mean((1, 2, 3))\n")
    rewards = load_rewards(RewardConfig(name=f"{own}:load", more=[MORE]), "cpu")
    assert [part.name for part in rewards] == ["bright.py:load", "tiny:load_brightness"]


def gradient(folder, **settings):
    """Gradient of both branches' losses of step 1, by parameter."""
    trainer = assemble(tiny_config(folder, **settings))
    learner = trainer.learner
    clean = learner._rollout(1, 0)
    for branch, step in learner._align_steps(1, 0, 0):
        from srpo_core.tally import Tally

        sum(learner._losses(clean, [(branch, step)], learner.words.pair(1), Tally(learner.rewards))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in learner.trained.values()])


def test_the_gradient_of_a_mixture_is_the_weighted_sum_of_the_rewards_own(tmp_path):
    bright = {name: value for name, value in MORE.items() if name != "weight"}
    first = gradient(tmp_path, reward={"name": "tiny:load_reward", "margin": 5.0})
    second = gradient(tmp_path, reward=bright)
    both = gradient(tmp_path, reward={"name": "tiny:load_reward", "margin": 5.0, "weight": 0.5, "more": [MORE]})
    assert first.norm() > 0 and second.norm() > 0
    assert torch.allclose(both, 0.5 * first + 3.0 * second, rtol=1e-4, atol=1e-7)


def test_a_run_records_each_reward_and_the_mixture(tmp_path):
    reward = {"name": "tiny:load_reward", "margin": 5.0, "more": [MORE]}
    trainer = assemble(tiny_config(tmp_path, reward=reward))
    assert trainer.train().finished
    line = read_metrics(tmp_path)[-1]
    names = ["tiny:load_reward", "tiny:load_brightness"]
    assert list(line["scores"]) == list(line["rewards"]) == names
    for branch in ("denoise", "inversion"):
        own, bright = (line["scores"][name][branch] for name in names)
        assert line["score"][branch] == pytest.approx((own + 3 * bright) / 4, abs=1e-6)
        own, bright = (line["rewards"][name][branch] for name in names)
        assert line["reward"][branch] == pytest.approx((own + 3 * 0.05 * (bright - 50)) / 4, abs=1e-6)
    loss = sum(5.0 - line["scores"][names[0]][b] + 3 * (2.0 - line["scores"][names[1]][b]) for b in line["score"]) / 2
    assert line["loss"] == pytest.approx(loss, rel=1e-5)


def test_one_reward_records_no_parts(tmp_path):
    trainer = assemble(tiny_config(tmp_path))
    line = trainer.learner.step(1, Clock(lambda: None)).line()
    assert "scores" not in line and "rewards" not in line and set(line["score"]) == {"denoise", "inversion"}


def test_a_mixture_of_mixtures_is_the_same_as_one_in_another():
    """Value of the outer mixture: the mean, by weight, of the values of the inner ones."""
    dot, bright = DotReward(), BrightnessReward()
    first = [WeightedReward("dot", dot, 2.0), WeightedReward("bright", bright, 6.0, scale=0.05, offset=50.0)]
    second = [WeightedReward("dot", dot, 5.0)]
    parts = joined([(first, 1.0), (second, 3.0), (second, 0.0)])
    assert [(part.name, part.weight) for part in parts] == [("dot", 0.25), ("bright", 0.75), ("dot#2", 3.0)]
    inner = MixedReward(first)(images(), PROMPTS), MixedReward(second)(images(), PROMPTS)
    assert torch.allclose(MixedReward(parts)(images(), PROMPTS), (inner[0] + 3 * inner[1]) / 4)


@pytest.mark.parametrize(("weights", "said"), [([0.0, 0.0], "all weights"), ([1.0, -1.0], "0 or more")])
def test_a_mixture_needs_a_weight(weights, said):
    with pytest.raises(ValueError, match=said):
        joined([([WeightedReward("dot", DotReward())], weight) for weight in weights])


@pytest.mark.parametrize("name", USUAL)
def test_comparable_values_are_0_to_1_where_a_reward_usually_is(name):
    low, high = USUAL[name]
    part = comparable(WeightedReward(f"{name}#2", DotReward()))
    assert part.normalised(torch.tensor([low, (low + high) / 2, high])).tolist() == pytest.approx([0, 0.5, 1])


def test_every_built_in_reward_has_a_usual_range_and_others_stay_as_they_are():
    assert set(USUAL) == set(REWARDS)
    own = WeightedReward("mine.py:load", DotReward())
    assert comparable(own).normalised(torch.tensor([0.3])).tolist() == pytest.approx([0.3])
