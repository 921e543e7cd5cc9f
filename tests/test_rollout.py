"""Rollouts on a flow with the exact velocity: straight lines end at the clean latents in any number of steps."""

import pytest
import torch
from toy import ExactFlow, LinearAutoencoder, toy_batch

from srpo_core.flow import shifted_sigmas
from srpo_core.rollout import Rollout, rollout, rollout_from_images


@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_exact_velocity_ends_at_the_clean_latents(num_steps):
    prompts, noise = toy_batch(3)
    result = rollout(ExactFlow(), prompts, noise, shifted_sigmas(num_steps, 3.0), guidance=1.0)
    torch.testing.assert_close(result.clean, prompts.embeds["clean"], rtol=0, atol=1e-5)
    assert torch.equal(result.noise, noise)
    assert result.prompts is prompts


def test_the_flow_is_asked_at_every_level_but_zero_with_the_guidance():
    flow, (prompts, noise), sigmas = ExactFlow(), toy_batch(2), shifted_sigmas(5, 3.0)
    rollout(flow, prompts, noise, sigmas, guidance=2.5)
    assert [guidance for _, guidance in flow.calls] == [2.5] * 5
    assert torch.equal(torch.stack([sigma for sigma, _ in flow.calls]), sigmas[:-1, None].expand(-1, 2))


def test_a_batch_equals_its_prompts_alone():
    prompts, noise = toy_batch(3)
    flow, sigmas = ExactFlow(), shifted_sigmas(4, 3.0)
    flow.module.push.data.fill_(0.3)
    together = rollout(flow, prompts, noise, sigmas, 1.0).clean
    for i in range(3):
        assert torch.equal(together[i : i + 1], rollout(flow, prompts.select([i]), noise[i : i + 1], sigmas, 1.0).clean)


def test_nothing_is_differentiable_and_the_noise_enters_as_float32():
    flow, (prompts, noise) = ExactFlow(), toy_batch(2)
    result = rollout(flow, prompts, noise.bfloat16().requires_grad_(), shifted_sigmas(3, 3.0), 1.0)
    assert not result.clean.requires_grad
    assert not result.noise.requires_grad
    assert result.noise.dtype == result.clean.dtype == torch.float32


def test_progress_is_told_after_each_step():
    told = []
    prompts, noise = toy_batch(1)
    result = rollout(ExactFlow(), prompts, noise, shifted_sigmas(3, 3.0), 1.0, lambda done, x: told.append((done, x)))
    assert [done for done, _ in told] == [1, 2, 3]
    assert torch.equal(told[-1][1], result.clean)


def test_photos_take_the_place_of_samples():
    autoencoder, (prompts, noise) = LinearAutoencoder(), toy_batch(2)
    images = autoencoder.decode(prompts.embeds["clean"])
    result = rollout_from_images(autoencoder, images, prompts, noise)
    torch.testing.assert_close(autoencoder.decode(result.clean), images)
    assert torch.equal(result.noise, noise)


def test_sizes_that_dont_match_are_refused():
    prompts, noise = toy_batch(2)
    with pytest.raises(ValueError, match="don't match"):
        Rollout(prompts, noise, noise[:1])
    with pytest.raises(ValueError, match="don't match"):
        Rollout(prompts.select([0]), noise, noise)
