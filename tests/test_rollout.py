"""Rollouts on a flow with the exact velocity: straight lines end at the clean latents in any number of steps."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toy import ExactFlow, LinearAutoencoder, toy_batch

from srpo_core import transfer
from srpo_core.config import RolloutConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import PromptBatch
from srpo_core.rollout import Rollout, called_steps, each_of, rollout, rollout_from_images
from srpo_core.transfer import sent


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


# ---- fewer calls


class LineFlow(ExactFlow):
    """Its velocity lies on a line over sigma, wherever the latents are."""

    def velocity(self, latents, sigma, prompts, guidance):
        self.calls.append((sigma.clone(), guidance))
        return prompts.embeds["clean"] + sigma.view(-1, 1, 1, 1) * torch.full_like(latents, 2.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 25, 50])
def test_calls_are_spread_from_the_first_two_steps_to_the_last(num_steps):
    assert called_steps(num_steps, 0) == list(range(num_steps))
    for calls in range(2, num_steps + 1):
        steps = called_steps(num_steps, calls)
        assert len(set(steps)) == calls and steps == sorted(steps)
        assert steps[:2] == [0, 1] and (calls == 2 or steps[-1] == num_steps - 1)
        gaps = [later - step for step, later in pairwise(steps[1:])]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_velocities_on_a_line_need_two_calls():
    (prompts, noise), sigmas = toy_batch(2), shifted_sigmas(25, 3.0)
    every, few = LineFlow(), LineFlow()
    exact = rollout(every, prompts, noise, sigmas, 1.0).clean
    torch.testing.assert_close(rollout(few, prompts, noise, sigmas, 1.0, calls=2).clean, exact, rtol=0, atol=1e-5)
    assert len(every.calls) == 25
    assert [float(sigma[0]) for sigma, _ in few.calls] == sigmas[:2].tolist()


def test_as_many_calls_as_steps_are_the_plain_rollout():
    (prompts, noise), sigmas = toy_batch(2), shifted_sigmas(5, 3.0)
    flow = ExactFlow()
    flow.module.push.data.fill_(0.3)
    plain = rollout(flow, prompts, noise, sigmas, 1.0).clean
    assert torch.equal(rollout(flow, prompts, noise, sigmas, 1.0, calls=5).clean, plain)


@pytest.mark.parametrize("settings", [{"calls": 26}, {"calls": 1}, {"num_steps": 4, "calls": 5}])
def test_calls_that_cannot_be_made_are_refused(settings):
    with pytest.raises(ValueError, match=r"calls=\d+ of num_steps=\d+: 0, or 2 to num_steps"):
        RolloutConfig(**settings)
    assert RolloutConfig(num_steps=4, calls=4).calls == 4


# ---- several batches together


def test_batches_of_the_same_shapes_are_sampled_as_one():
    flow, sigmas = ExactFlow(), shifted_sigmas(4, 3.0)
    flow.module.push.data.fill_(0.3)
    batches = [toy_batch(2, seed=0), toy_batch(3, seed=1), toy_batch(1, seed=2)]
    wide = PromptBatch(("wide",), {"clean": torch.zeros(1, 4, 3, 5)}), torch.ones(1, 4, 3, 5)
    batches.insert(1, wide)
    sizes = []

    def sample(prompts, noise):
        sizes.append(len(noise))
        return rollout(flow, prompts, noise, sigmas, 1.0)

    done = each_of(sample, batches)
    assert sizes == [6, 1]
    for (prompts, noise), result in zip(batches, done, strict=True):
        alone = rollout(flow, prompts, noise, sigmas, 1.0)
        assert result.prompts is prompts and torch.equal(result.noise, noise)
        torch.testing.assert_close(result.clean, alone.clean)


def test_only_a_gpu_of_nvidia_is_sent_things_that_nobody_waits_for(monkeypatch):
    """A Mac's copies would read memory of the host that may hold something else by then."""
    asked = {}

    def to(tensor, device, dtype, non_blocking):
        asked[torch.device(device).type] = non_blocking
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    for name in ("mps", "cpu", "cuda"):
        sent(torch.zeros(2), torch.device(name))
    assert asked == {"mps": False, "cpu": False, "cuda": True}
    package = Path(transfer.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "non_blocking" in path.read_text()] == ["transfer.py"]
