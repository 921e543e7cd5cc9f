"""Direct-Align's laws on a flow with the exact velocity, and the published levels."""

import math

import pytest
import torch
from toy import DISLIKED, LIKED, DotReward, ExactFlow, LinearAutoencoder, toy_batch

from srpo_core.align import (
    MARGIN_LEVELS,
    AlignStep,
    align_step_at,
    direct_align,
    one_step_prediction,
    sample_align_steps,
    training_levels,
)
from srpo_core.config import AlignConfig
from srpo_core.preference import hinge_loss, preferred_and_other, relative_reward
from srpo_core.rollout import Rollout

LENGTH = 1000
RAMPS = {"denoise": (0.1, 0.25), "inversion": (0.3, 0.01)}
PAIRS = [(0.95, 0.8), (0.8, 0.95), (1.0, 0.5), (0.1, 0.9), (0.3, 0.0)]


@pytest.fixture
def levels():
    return training_levels(5, 25, 50, 3.0, LENGTH)


def toy_rollout(batch_size=2, dtype=torch.float64):
    prompts, noise = toy_batch(batch_size, dtype=dtype)
    return Rollout(prompts, noise, prompts.embeds["clean"])


def exact_flow(push=0.0):
    flow = ExactFlow()
    flow.module.double().push.data.fill_(push)
    return flow


def step_at(branch, m, levels):
    return align_step_at(branch, m, levels, 0.1, RAMPS[branch])


def test_range_is_evenly_cut_from_high_to_low(levels):
    assert levels.shape == (LENGTH,)
    assert float(levels[0]) == pytest.approx(27 / 28, rel=1e-6)
    assert float(levels[-1]) == 0.75
    torch.testing.assert_close(
        levels.diff(), torch.full((LENGTH - 1,), -(27 / 28 - 0.75) / (LENGTH - 1)), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("m", [5, 60, 140, 500, 960, 995])
def test_steps_are_the_published_ones(levels, m):
    span = min(int((1 - 0.9) * LENGTH) + 1, m, LENGTH - m)
    denoise, inversion = step_at("denoise", m, levels), step_at("inversion", m, levels)
    assert denoise.sigma == float(levels[LENGTH - min(m + span, LENGTH)])
    assert denoise.sigma_next == float(levels[LENGTH - m])
    assert denoise.k == pytest.approx(float(torch.linspace(0.1, 0.25, LENGTH)[m]))
    low = max(m - span, 1)
    assert inversion.sigma == float(levels[LENGTH - low])
    assert inversion.sigma_next == float(levels[LENGTH - min(low + span, LENGTH)])
    assert inversion.k == pytest.approx(float(torch.linspace(0.3, 0.01, LENGTH)[low]))


def test_a_tenth_of_the_range_is_the_published_number_of_levels_at_any_length():
    for length in range(20, 1200):
        step = align_step_at("denoise", length // 2, torch.arange(length, 0, -1.0), 0.1, (0, 0))
        assert step.sigma - step.sigma_next == int((1 - 0.9) * length) + 1


@pytest.mark.parametrize(("fraction", "span"), [(0.07, 7), (0.071, 8), (1e-9, 1), (0.49, 49)])
def test_a_step_is_its_part_of_the_range_rounded_up(fraction, span):
    step = align_step_at("denoise", 50, torch.arange(100, 0, -1.0), fraction, (0, 0))
    assert step.sigma - step.sigma_next == span


@pytest.mark.parametrize("m", [200, 500, 800])
def test_both_branches_land_on_the_same_level_from_either_side(levels, m):
    denoise, inversion = step_at("denoise", m, levels), step_at("inversion", m, levels)
    assert denoise.denoises
    assert not inversion.denoises
    assert denoise.sigma > denoise.sigma_next == inversion.sigma_next > inversion.sigma
    assert denoise.sigma - denoise.sigma_next == pytest.approx(0.0215, abs=1e-4)


def test_steps_stay_inside_the_range_and_always_move(levels):
    m = torch.arange(1, LENGTH)
    for branch in RAMPS:
        step = step_at(branch, m, levels)
        assert step.denoises == (branch == "denoise")
        for value in (step.sigma, step.sigma_next):
            assert float(value.min()) >= float(levels[-1])
            assert float(value.max()) <= float(levels[0])


def test_absolute_share_runs_over_its_ramp(levels):
    m = torch.arange(MARGIN_LEVELS, LENGTH - MARGIN_LEVELS + 1)
    for branch, (start, end) in RAMPS.items():
        k = step_at(branch, m, levels).k
        assert float(k[0]) == pytest.approx(start, rel=0.02)
        assert (k.diff() * math.copysign(1, end - start) >= 0).all()
    assert float(step_at("denoise", 995, levels).k) == pytest.approx(0.25, rel=0.01)
    assert float(step_at("inversion", 995, levels).k) == pytest.approx(0.3 - 0.29 * 990 / 999, rel=1e-4)


def test_a_tensor_of_levels_equals_a_loop(levels):
    m = torch.tensor([5, 50, 140, 960, 995])
    for branch in RAMPS:
        together, alone = step_at(branch, m, levels), [step_at(branch, int(i), levels) for i in m]
        for name in ("sigma", "sigma_next", "k"):
            assert getattr(together, name).tolist() == [getattr(step, name) for step in alone]


@pytest.mark.parametrize("m", [0, LENGTH, torch.tensor([5, LENGTH])])
def test_levels_outside_the_range_are_refused(levels, m):
    with pytest.raises(ValueError, match=r"m must be in \[1, 999\]"):
        step_at("denoise", m, levels)


def test_an_unknown_branch_is_refused(levels):
    with pytest.raises(ValueError, match="denoise or inversion, got 'invert'"):
        align_step_at("invert", 5, levels, 0.1, (0, 0))


def test_a_batch_of_steps_has_one_direction():
    with pytest.raises(ValueError, match="share a direction"):
        _ = AlignStep(torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.9]), 0.1).denoises
    with pytest.raises(ValueError, match="share a direction"):
        _ = AlignStep(0.9, 0.9, 0.1).denoises


def test_drawn_levels_follow_the_generator_and_both_branches_share_them():
    def draw(seed):
        return sample_align_steps(AlignConfig(), 3.0, 4096, torch.Generator().manual_seed(seed))

    denoise, inversion = draw(1)
    for step, again in zip((denoise, inversion), draw(1), strict=True):
        assert all(torch.equal(getattr(step, n), getattr(again, n)) for n in ("sigma", "sigma_next", "k"))
    assert not torch.equal(denoise.sigma, draw(2)[0].sigma)
    assert len(denoise.sigma.unique()) > 500
    assert (denoise.denoises, inversion.denoises) == (True, False)
    # whole spans exist between 100 and 900: there both land on the level that was drawn
    inside = (denoise.sigma_next - denoise.sigma < -0.0214) & (inversion.sigma_next - inversion.sigma > 0.0214)
    inside &= denoise.sigma_next > 0.75 + 0.0217
    assert int(inside.sum()) > 2000
    assert torch.equal(denoise.sigma_next[inside], inversion.sigma_next[inside])


def test_drawn_levels_keep_the_margins():
    config = AlignConfig(levels=20, branches=["denoise"])
    (step,) = sample_align_steps(config, 3.0, 4096, torch.Generator().manual_seed(0))
    levels = training_levels(5, 25, 50, 3.0, 20)
    expected = levels[20 - torch.arange(MARGIN_LEVELS, 20 - MARGIN_LEVELS + 1)]
    assert torch.equal(step.sigma_next.unique(), expected.unique())


def test_branches_come_in_the_configured_order():
    config = AlignConfig(branches=["inversion", "denoise"])
    steps = sample_align_steps(config, 3.0, 2, torch.Generator().manual_seed(0))
    assert [step.denoises for step in steps] == [False, True]


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
def test_exact_velocity_recovers_the_clean_latents(sigma, sigma_next):
    rollout = toy_rollout()
    recovered = direct_align(exact_flow(), rollout, AlignStep(sigma, sigma_next, 0.1), 3.5)
    torch.testing.assert_close(recovered, rollout.clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
def test_derivative_by_the_velocity_is_the_closed_form(sigma, sigma_next):
    flow, rollout = exact_flow(), toy_rollout()
    recovered = direct_align(flow, rollout, AlignStep(sigma, sigma_next, 0.1), 3.5)
    (derivative,) = torch.autograd.grad(recovered[:, 0].sum(), flow.module.push)
    expected = (sigma_next - sigma) / (1 - sigma_next)
    torch.testing.assert_close(derivative[0] / recovered[:, 0].numel(), torch.full((1, 1), expected).double())
    assert not derivative[1:].any()


def test_levels_per_sample_equal_a_loop():
    flow, rollout = exact_flow(push=0.2), toy_rollout(3)
    step = AlignStep(torch.tensor([0.9, 0.8, 0.95]), torch.tensor([0.7, 0.75, 0.9]), torch.tensor([0.1, 0.2, 0.3]))
    together = direct_align(flow, rollout, step, 3.5)
    for i in range(3):
        one = slice(i, i + 1)
        single = Rollout(rollout.prompts.select([i]), rollout.noise[one], rollout.clean[one])
        alone = AlignStep(float(step.sigma[i]), float(step.sigma_next[i]), 0.1)
        torch.testing.assert_close(together[one], direct_align(flow, single, alone, 3.5))


def branch_gradient(step, rollout, k=0.0, margin=10.0):
    """Gradient of one branch's loss by the velocity's push, and by the recovered latents."""
    flow, autoencoder = exact_flow(), LinearAutoencoder()
    recovered = direct_align(flow, rollout, step, 3.5)
    recovered.retain_grad()
    words = preferred_and_other(LIKED, DISLIKED, step.denoises)
    score = relative_reward(DotReward(), autoencoder.decode(recovered), rollout.prompts.prompts, *words, k)
    hinge_loss(score, margin, num_branches=2).backward()
    return flow.module.push.grad.flatten(), recovered.grad.mean((0, 2, 3))


def test_both_branches_move_the_velocity_toward_the_liked_word():
    rollout, autoencoder, directions = toy_rollout(), LinearAutoencoder(), DotReward().directions
    liked = autoencoder.mix.double().T @ (directions[LIKED] - directions[DISLIKED]).double()  # in latents
    by_push, by_latents = branch_gradient(AlignStep(0.9, 0.88, 0.0), rollout)
    assert torch.cosine_similarity(-by_latents, liked, 0) == pytest.approx(1)
    assert torch.cosine_similarity(by_push, liked, 0) == pytest.approx(1)  # less velocity, further along
    by_push, by_latents = branch_gradient(AlignStep(0.86, 0.88, 0.0), rollout)
    assert torch.cosine_similarity(-by_latents, liked, 0) == pytest.approx(-1)  # asks for the disliked word
    assert torch.cosine_similarity(by_push, liked, 0) == pytest.approx(1)  # and so moves away from it


def test_absolute_share_adds_the_preferred_wordings_own_direction():
    """k's part of the gradient goes toward the liked word by denoising and away from the disliked one by inversion."""
    rollout, autoencoder, directions = toy_rollout(), LinearAutoencoder(), DotReward().directions
    there, _ = branch_gradient(AlignStep(0.9, 0.88, 0.2), rollout, k=0.2)
    relative, _ = branch_gradient(AlignStep(0.9, 0.88, 0.2), rollout, k=0.0)
    good = autoencoder.mix.double().T @ directions[LIKED].double()
    assert torch.cosine_similarity(there - relative, good, 0) == pytest.approx(1)
    back, _ = branch_gradient(AlignStep(0.86, 0.88, 0.2), rollout, k=0.2)
    relative, _ = branch_gradient(AlignStep(0.86, 0.88, 0.2), rollout, k=0.0)
    bad = autoencoder.mix.double().T @ directions[DISLIKED].double()
    assert torch.cosine_similarity(back - relative, bad, 0) == pytest.approx(-1)


def test_a_batch_gives_the_mean_gradient_of_its_prompts():
    rollout, step = toy_rollout(3), AlignStep(0.9, 0.88, 0.1)
    together, _ = branch_gradient(step, rollout, k=0.1)
    singles = [
        Rollout(rollout.prompts.select([i]), rollout.noise[i : i + 1], rollout.clean[i : i + 1]) for i in range(3)
    ]
    alone = torch.stack([branch_gradient(step, single, k=0.1)[0] for single in singles])
    torch.testing.assert_close(together, alone.mean(0))


def test_an_image_above_the_margin_gives_no_gradient():
    by_push, _ = branch_gradient(AlignStep(0.9, 0.88, 0.0), toy_rollout(), margin=-10.0)
    assert not by_push.any()


def test_the_model_is_asked_once_at_the_noisy_level_with_the_guidance():
    flow, rollout = exact_flow(), toy_rollout()
    direct_align(flow, rollout, AlignStep(0.9, 0.88, 0.1), 3.5)
    ((sigma, guidance),) = flow.calls
    assert (sigma.tolist(), guidance) == ([0.9, 0.9], 3.5)


def test_one_step_prediction_trusts_the_velocity_all_the_way():
    flow, rollout = exact_flow(), toy_rollout()
    predicted = one_step_prediction(flow, rollout, 0.9, 3.5)
    torch.testing.assert_close(predicted, rollout.clean, rtol=0, atol=1e-12)
    (derivative,) = torch.autograd.grad(predicted[:, 0].sum(), flow.module.push)
    torch.testing.assert_close(derivative[0] / predicted[:, 0].numel(), torch.full((1, 1), -0.9).double())
