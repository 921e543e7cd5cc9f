"""Batches of prompts, and that the parts keep their promises."""

import pytest
import torch
from tiny_flux import tiny_transformer, tiny_vae
from toy import DotReward, ExactFlow, LinearAutoencoder

from srpo_core.interfaces import PromptBatch, Reward
from srpo_core.models.flux import FluxFlow, ImageAutoencoder


def batch():
    return PromptBatch(("a", "b", "c"), {"x": torch.arange(6.0).view(3, 2), "ids": torch.arange(3)})


def test_embeddings_have_a_row_per_prompt():
    with pytest.raises(ValueError, match=r"embeds\['x'\] holds 2 rows for 1 prompts"):
        PromptBatch(("a",), {"x": torch.zeros(2, 4)})


def test_select_takes_prompts_with_their_rows_in_order():
    chosen = batch().select([2, 0, 2])
    assert chosen.prompts == ("c", "a", "c")
    assert torch.equal(chosen.embeds["x"], torch.tensor([[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]))
    assert len(chosen) == 3


def test_only_floating_embeddings_change_their_dtype():
    moved = batch().to("cpu", torch.bfloat16)
    assert (moved.embeds["x"].dtype, moved.embeds["ids"].dtype) == (torch.bfloat16, torch.int64)
    assert moved.prompts == batch().prompts


@pytest.mark.parametrize(
    ("flow", "autoencoder", "size"),
    [
        (ExactFlow(), LinearAutoencoder(), (6, 8)),
        (FluxFlow(tiny_transformer(), downscale=2), ImageAutoencoder(tiny_vae()), (16, 24)),
    ],
    ids=["toy", "flux"],
)
def test_latent_shape_is_the_autoencoders(flow, autoencoder, size):
    shape = flow.latent_shape(*size)
    latents = autoencoder.encode(torch.rand(2, 3, *size))
    assert latents.shape == (2, *shape)
    assert autoencoder.decode(latents).shape == (2, 3, *size)
    assert any(isinstance(module, flow.block_types) for module in flow.module.modules())


def test_several_wordings_of_the_same_images_are_scored_in_order():
    reward, images = DotReward(), torch.rand(2, 3, 4, 4)
    assert isinstance(reward, Reward)
    together = reward(images, ["good. a", "good. b", "bad. a", "bad. b"])
    apart = torch.cat([reward(images, ["good. a", "good. b"]), reward(images, ["bad. a", "bad. b"])])
    assert torch.equal(together, apart)
