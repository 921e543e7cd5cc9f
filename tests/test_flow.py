"""Rectified-flow arithmetic against the formulas and diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from srpo_core.flow import add_noise, euler_step, per_sample, remove_noise, shifted_sigmas


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 3, 3, generator=generator, dtype=dtype).unbind()


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.8086814256783383, 3.0, 4.932544417464096])
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_schedule_runs_from_one_to_zero(num_steps, shift):
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)
    assert (sigmas.diff() < 0).all()


def test_shift_one_is_linear():
    assert torch.equal(shifted_sigmas(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_shift_three_has_the_published_range():
    sigmas = shifted_sigmas(50, 3.0)
    assert float(sigmas[5]) == pytest.approx(27 / 28, rel=1e-6)
    assert float(sigmas[25]) == 0.75


@pytest.mark.parametrize("num_steps", [10, 25, 28, 50])
def test_schedule_is_diffusers_own(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps, sigmas=np.linspace(1, 1 / num_steps, num_steps))
    assert torch.equal(shifted_sigmas(num_steps, 3.0), scheduler.sigmas)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (5, 0.0), (5, -1.0)])
def test_impossible_schedules_are_refused(num_steps, shift):
    with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
        shifted_sigmas(num_steps, shift)


def test_noise_ends():
    clean, noise = pair()
    assert torch.equal(add_noise(clean, noise, 0.0), clean)
    assert torch.equal(add_noise(clean, noise, 1.0), noise)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.9643, torch.tensor([0.1, 0.5, 0.99])])
def test_remove_noise_inverts_add_noise(sigma):
    clean, noise = pair()
    torch.testing.assert_close(remove_noise(add_noise(clean, noise, sigma), noise, sigma), clean)


def test_euler_step_along_the_true_velocity_stays_on_the_line():
    clean, noise = pair()
    for sigma, sigma_next in [(0.9, 0.4), (0.4, 0.9), (1.0, 0.0)]:
        moved = euler_step(add_noise(clean, noise, sigma), noise - clean, sigma, sigma_next)
        torch.testing.assert_close(moved, add_noise(clean, noise, sigma_next))


def test_levels_per_sample_equal_a_loop():
    clean, noise = pair()
    sigma, sigma_next = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.1, 0.7, 0.3])
    together = euler_step(add_noise(clean, noise, sigma), noise, sigma, sigma_next)
    for i in range(3):
        one = slice(i, i + 1)
        alone = euler_step(
            add_noise(clean[one], noise[one], float(sigma[i])), noise[one], float(sigma[i]), float(sigma_next[i])
        )
        torch.testing.assert_close(together[one], alone)


def test_levels_keep_their_precision_beside_bfloat16_latents():
    latents = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    level = per_sample(0.9643, latents)
    assert level.dtype == torch.float32
    assert torch.equal(level, torch.full((2,), 0.9643))


def test_a_level_of_the_wrong_shape_is_refused():
    clean, noise = pair()
    for sigma in (torch.rand(2), torch.rand(3, 1)):
        with pytest.raises(ValueError, match="a level is a number or"):
            add_noise(clean, noise, sigma)
