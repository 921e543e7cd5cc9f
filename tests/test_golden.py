"""The published training step, number for number: rollout, recovered images, scores, loss and the whole gradient.

tests/golden/README.md says where the numbers come from.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from srpo_core.align import align_step_at, direct_align, training_levels
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import PromptBatch
from srpo_core.models.flux import FluxFlow, ImageAutoencoder, unpack
from srpo_core.preference import ControlWords, hinge_loss, preferred_and_other, relative_reward
from srpo_core.rollout import rollout

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
WORDS = ControlWords(
    ["Natural-lighting", "Detail", "Detailed", "Real"], ["Concept art", "Painting", "Anime", "Flat", "Oil"]
)
NAMES = ("first", "second")
TOLERANCE = 1e-5


class ThousandthsFlow(FluxFlow):
    """A flow that rounds its levels down to thousandths, as the published code does and this project does not."""

    def velocity(self, latents, sigma, prompts, guidance):
        return super().velocity(latents, (sigma * 1000).int() / 1000, prompts, guidance)


class CorrectlyRoundedTimesteps(nn.Module):
    """The model's sinusoids of time and guidance, their float32 exp rounded correctly.

    exp differs in its last bit between processors; times of up to 3500 turn that into errors of 3e-5 in the gradient.
    """

    def forward(self, timesteps):
        half = 128
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        frequencies = exponents.double().exp().float()
        angles = timesteps[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class TableReward:
    """The numbers' own toy reward: a projected 8x8 thumbnail against a known unit feature per text."""

    def __init__(self, projection, features):
        self.projection, self.features = projection, features

    def __call__(self, images, prompts):
        features = F.normalize(F.adaptive_avg_pool2d(images, 8).flatten(1) @ self.projection.T, dim=-1)
        texts = torch.stack([self.features[text] for text in prompts])
        return (features.repeat(len(prompts) // len(images), 1) * texts).sum(1)


def build_models(recompute):
    configs = json.loads((GOLDEN / "models.json").read_text())
    transformer = FluxTransformer2DModel.from_config(configs["transformer"])
    transformer.load_state_dict(load_file(GOLDEN / "transformer.safetensors"))
    transformer.time_text_embed.time_proj = CorrectlyRoundedTimesteps()
    vae = AutoencoderKL.from_config(configs["vae"])
    vae.load_state_dict(load_file(GOLDEN / "vae.safetensors"))
    if recompute:
        transformer.enable_gradient_checkpointing()
    return ThousandthsFlow(transformer), ImageAutoencoder(vae, recompute)


def our_step(case, golden, recompute=True):
    """The case's training step by this project: what was computed, under the names of the golden numbers."""
    flow, autoencoder = build_models(recompute)
    prompts = PromptBatch(
        (case["caption"],), {name: golden[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    )
    _, height, width = flow.latent_shape(case["height"], case["width"])
    features = {}
    for name, branch in zip(NAMES, case["branches_in_order"], strict=True):
        features |= {
            branch["prompt"]: golden[f"{name}.prompt_feature"],
            branch["neg_prompt"]: golden[f"{name}.neg_prompt_feature"],
        }
    reward = TableReward(golden["reward_projection"], features)

    ours = {}
    noise = unpack(golden["noise_packed"], height, width)
    sigmas = shifted_sigmas(case["sampling_steps"], case["shift"])
    sample = rollout(flow, prompts, noise, sigmas, case["train_guidance"])
    ours["rollout"] = sample.clean

    length = case["timestep_length"]
    levels = training_levels(*case["train_timestep"], case["vis_sampling_steps"], case["shift"], length)
    ramps = {"denoise": case["discount_pos"], "inversion": case["discount_inv"]}
    for name, branch in zip(NAMES, ramps, strict=True):
        step = align_step_at(branch, case["mid_timestep"], levels, 1 - case["groundtruth_ratio"], ramps[branch])
        images = autoencoder.decode(direct_align(flow, sample, step, guidance=3.5))
        words = preferred_and_other(*WORDS.pair(case["step"]), step.denoises)
        score = relative_reward(reward, images, prompts.prompts, *words, step.k)
        loss = hinge_loss(score, 0.7, case["branches"])
        loss.backward()
        ours |= {f"{name}.image": images.detach(), f"{name}.reward": score.detach(), f"{name}.k": step.k}
        ours["last_branch_loss"] = loss.detach().view(1)
    return ours, {name: parameter.grad for name, parameter in flow.module.named_parameters()}


def relative_error(ours, published):
    """Norm of the difference over the published norm; the difference itself where the published is 0."""
    return float((ours - published).norm() / (published.norm() or 1))


def parity(case, recompute=True):
    """Relative errors of one case, by quantity."""
    golden = load_file(GOLDEN / case["file"])
    ours, gradient = our_step(case, golden, recompute)
    _, _, height, width = ours["rollout"].shape
    errors = {"rollout": relative_error(ours["rollout"], unpack(golden["rollout_latents_packed"], height, width))}
    for name, branch in zip(NAMES, case["branches_in_order"], strict=True):
        errors[f"{name}.image"] = relative_error(ours[f"{name}.image"], golden[f"{name}.image"])
        errors[f"{name}.score"] = relative_error(ours[f"{name}.reward"], golden[f"{name}.reward"])
        errors[f"{name}.k"] = abs(ours[f"{name}.k"] - branch["k"]) / branch["k"]
    errors["last loss"] = relative_error(ours["last_branch_loss"], golden["last_branch_loss"])
    published = {name.removeprefix("grad."): grad for name, grad in golden.items() if name.startswith("grad.")}
    assert gradient.keys() == published.keys()
    whole = torch.cat([gradient[name].flatten() for name in published])
    errors["gradient"] = relative_error(whole, torch.cat([grad.flatten() for grad in published.values()]))
    errors["gradient norm"] = abs(float(whole.norm()) - case["grad_norm"]) / case["grad_norm"]
    errors["parameters"] = {name: relative_error(gradient[name], grad) for name, grad in published.items()}
    return errors


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("case", CASES, ids=[case["file"].removesuffix(".safetensors") for case in CASES])
def test_training_step_equals_the_published_one(case, recompute):
    errors = parity(case, recompute)
    parameters = errors.pop("parameters")
    assert max(errors.values()) < TOLERANCE, errors
    assert max(parameters.values()) < 2 * TOLERANCE, parameters
