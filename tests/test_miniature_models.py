"""The shipped weights do what the miniature needs of them; each number was measured well inside its bound."""

import random
import shutil

import pytest
import torch
from miniature_pictures import drawn
from torch.nn import functional

from srpo_core import miniature
from srpo_core.config import ConfigError, ModelConfig, RewardConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.miniature import models
from srpo_core.miniature.captions import LIKED, LOOK_WORDS, random_scenes
from srpo_core.miniature.looks import look
from srpo_core.models import load_model
from srpo_core.rollout import rollout


@pytest.fixture(scope="module")
def parts():
    return load_model(ModelConfig(family="miniature", dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def held_out():
    """100 held-out pictures, their look words and their captions."""
    rng, scenes = random.Random(3), random_scenes(100, seed=3, held_out=True)
    words = [rng.choice(LOOK_WORDS) for _ in scenes]
    return drawn(scenes, words, seed=3), words, [scene.caption() for scene in scenes]


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in models.WEIGHTS.rglob("*") if path.is_file()) <= 40 * 2**20


def test_the_judge_reads_held_out_pictures(parts, held_out):
    images, words, captions = held_out
    assert parts.measures["exact"](images, captions).mean() >= 0.97
    liked = torch.tensor([word in LIKED for word in words])
    assert ((parts.measures["judge_liked"](images, captions) > 0.5) == liked).float().mean() >= 0.97


@torch.no_grad()
def test_the_autoencoder_keeps_pictures(parts, held_out):
    images = held_out[0][:16]
    again = parts.autoencoder.decode(parts.autoencoder.encode(images))
    assert (-10 * (again - images).square().mean((1, 2, 3)).log10()).mean() > 35


@torch.no_grad()
def test_the_reward_prefers_the_right_look_and_the_right_caption(held_out):
    images, words, captions = held_out
    reward = models.load_reward(RewardConfig(name="miniature-clip"), "cpu")
    by_word = reward(images, [f"{word}. {caption}" for word in LOOK_WORDS for caption in captions])
    by_word = by_word.view(len(LOOK_WORDS), len(images))
    own = by_word[[LOOK_WORDS.index(word) for word in words], torch.arange(len(images))]
    other_side = torch.tensor([[(a in LIKED) != (b in LIKED) for b in words] for a in LOOK_WORDS])
    assert (own > by_word.masked_fill(~other_side, -1).amax(0)).float().mean() >= 0.95
    assert (by_word.amax(0) == own).float().mean() >= 0.65  # words of one side look much alike
    strangers = captions[1:] + captions[:1]
    assert (own > reward(images, [f"{w}. {c}" for w, c in zip(words, strangers, strict=True)])).float().mean() >= 0.95


@torch.no_grad()
def samples(parts, captions):
    noise = torch.randn(len(captions), *parts.flow.latent_shape(128, 128), generator=torch.Generator().manual_seed(0))
    result = rollout(parts.flow, parts.text_encoder(captions), noise, shifted_sigmas(25, 3.0), 3.5)
    return parts.autoencoder.decode(result.clean)


def test_the_base_model_draws_captions_flat(parts):
    captions = list(parts.prompts["eval"][:24])
    images = samples(parts, captions)
    assert parts.measures["exact"](images, captions).mean() >= 0.9
    assert (look(images)["look"] < 0.3).float().mean() >= 0.75


def test_a_liked_word_makes_the_base_model_draw_rich_pictures(parts):
    captions = [f"Detail. {caption}" for caption in parts.prompts["eval"][:24]]
    images = samples(parts, captions)
    assert parts.measures["exact"](images, captions).mean() >= 0.9
    assert look(images)["look"].mean() > 0.6


@pytest.mark.parametrize("broken", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["judge.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_broken_weights_are_named(tmp_path, name, broken):
    folder = shutil.copytree(models.WEIGHTS, tmp_path / "weights")
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if broken == "truncated":
        path.write_bytes(content[:1000])
    with pytest.raises(ConfigError) as error:
        load_model(ModelConfig(family="miniature", path=str(folder)), "cpu")
    assert path.name in str(error.value) and str(path.parent) in str(error.value)


def test_a_missing_transformer_folder_is_named(tmp_path):
    folder = shutil.copytree(models.WEIGHTS, tmp_path / "weights")
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ConfigError, match=r"weights/transformer'?: no such folder"):
        load_model(ModelConfig(family="miniature", path=str(folder)), "cpu")


def test_sizes_that_the_model_cannot_take_are_refused(parts):
    with pytest.raises(ConfigError, match=r"data\.height=100"):
        parts.flow.latent_shape(100, 128)


def test_live_previews_have_the_pictures_colours(parts, held_out):
    """The linear colours explain most of what an 8 x 8 patch looks like, in scenes that they were not fitted to."""
    images = held_out[0][:32]
    with torch.no_grad():
        latents = parts.autoencoder.encode(images)
    shown = torch.einsum("bchw,cr->brhw", latents, torch.tensor(miniature.PREVIEW_COLOURS))
    shown += torch.tensor(miniature.PREVIEW_COLOUR_BIAS).view(3, 1, 1)
    true = functional.avg_pool2d(images, 8) * 2 - 1
    assert ((shown - true).var((0, 2, 3)) / true.var((0, 2, 3))).max() < 0.35
