"""The aesthetic predictor v2, against a forward pass written out here with matrix products."""

import math

import pytest
import tiny_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from scripts.by_rule import weight_by_rule
from srpo_core.align import AlignStep, direct_align
from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.interfaces import PromptBatch, Reward
from srpo_core.preference import two_wordings
from srpo_core.rewards import aesthetic, check_reward, load_rewards
from srpo_core.rewards.clip import OPENAI_MEAN, OPENAI_STD
from srpo_core.rewards.mixture import WeightedReward, blind_notes
from srpo_core.rollout import Rollout

SIZES = {0: (1024, tiny_clip.WIDTH), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
"""Shapes of the published head, but for the width of the features (768)."""
HEAD = aesthetic.FILE_NAMES[0]


def head_weights() -> dict[str, Tensor]:
    weights = {f"layers.{place}.weight": weight_by_rule(f"{place}.weight", size) for place, size in SIZES.items()}
    biases = {f"layers.{place}.bias": weight_by_rule(f"{place}.bias", size[:1]) for place, size in SIZES.items()}
    return weights | biases


@pytest.fixture(scope="module")
def state():
    return tiny_clip.weights()


@pytest.fixture
def folder(tmp_path, state):
    """The head, and a narrow CLIP of OpenAI's kind in transformers' format where downloads put it."""
    tiny_clip.register(tmp_path)
    place = tmp_path / "srpo_rewards"
    in_transformers_format(place / aesthetic.CLIP_FOLDER, state)
    torch.save(head_weights(), place / HEAD)
    return place


def in_transformers_format(folder, state, activation="quick_gelu"):
    model = CLIPModel(tiny_clip.transformers_config(activation))
    model.load_state_dict(tiny_clip.transformers_weights(state), strict=True)
    model.save_pretrained(folder)


def load(path, **settings):
    config = RewardConfig(name="aesthetic", path=str(path), **settings)
    check_reward(config)
    return aesthetic.load(config, "cpu")


def images(count=2):
    return torch.rand(count, 3, tiny_clip.SIZE, tiny_clip.SIZE, generator=torch.Generator().manual_seed(0))


def written_out(state: dict[str, Tensor], head: dict[str, Tensor], image: Tensor) -> Tensor:
    """The score of one image [3, S, S], by the definitions of CLIP's ViT and of the head, in float64."""
    w = {name: tensor.double() for name, tensor in (state | head).items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    pixels = (image.double() - torch.tensor(OPENAI_MEAN).double()[:, None, None]) / torch.tensor(OPENAI_STD).double()[
        :, None, None
    ]
    size, width = tiny_clip.PATCH, tiny_clip.VISION
    patches = pixels.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    x = torch.cat([w["visual.class_embedding"][None], patches @ w["visual.conv1.weight"].flatten(1).T])
    x = norm(x + w["visual.positional_embedding"], "visual.ln_pre")
    for i in range(tiny_clip.LAYERS):
        block = f"visual.transformer.resblocks.{i}"
        h = norm(x, f"{block}.ln_1")
        q, k, v = (h @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]).split(width, -1)
        heads = [slice(start, start + 64) for start in range(0, width, 64)]
        seen = [((q[:, s] @ k[:, s].T) / math.sqrt(64)).softmax(-1) @ v[:, s] for s in heads]
        x = x + linear(torch.cat(seen, -1), f"{block}.attn.out_proj")
        h = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{block}.mlp.c_proj")
    feature = norm(x[0], "visual.ln_post") @ w["visual.proj"]
    feature = feature / feature.square().sum().sqrt()
    for place in SIZES:
        feature = linear(feature, f"layers.{place}")
    return feature[0]


def test_the_score_is_that_of_the_definition(folder, state):
    batch, head = images(3), head_weights()
    expected = torch.stack([written_out(state, head, image) for image in batch])
    assert expected.std() > 0.01  # so that a difference would show
    assert torch.allclose(load(folder)(batch, ["a", "b", "c"]).double(), expected, atol=1e-5)


def test_other_files_of_the_same_tensors_give_the_same_scores(tmp_path, folder, state):
    expected = load(folder)(images(), ["a", "b"])
    assert torch.equal(load(folder / HEAD)(images(), ["a", "b"]), expected)
    flat = tmp_path / "flat"
    flat.mkdir()
    save_file(head_weights(), flat / "head.safetensors")
    tiny_clip.save_checkpoint(flat / "open_clip_model.safetensors", state)
    assert torch.allclose(load(flat / "head.safetensors")(images(), ["a", "b"]), expected, atol=1e-5)
    (flat / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    assert torch.allclose(load(flat / "head.safetensors")(images(), ["a", "b"]), expected, atol=1e-5)


def test_prompts_are_not_read_and_each_belongs_to_its_image(folder):
    reward = load(folder)
    assert isinstance(reward, Reward)
    first, second = reward(images(), ["a", "b"])
    scores = reward(images(), ["Realistic photo. a", "", "CG Render. a", "x " * 200])
    assert torch.equal(scores, torch.stack([first, second, first, second]))
    with pytest.raises(ValueError, match="3 prompts don't divide among 2 images"):
        reward(images(), ["a", "b", "c"])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_gradient_in_the_images_is_that_of_finite_differences(folder, fit):
    reward = load(folder, fit=fit)
    reward.clip.module.double()
    reward.head.double()
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(1, 3, 40, 64, generator=generator, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(batch, ["a"]).sum(), batch)
    for _ in range(3):
        direction = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, back = (reward(batch + sign * 1e-5 * direction, ["a"]).sum() for sign in (1, -1))
        assert float((ahead - back) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
    assert not any(p.requires_grad for part in (reward.head, reward.clip.module) for p in part.parameters())


def test_wrong_files_are_named_for_what_they_are(folder, state):
    head = head_weights()
    wrong = {
        "relu.pth": ({name.replace(".7.", ".8."): tensor for name, tensor in head.items()}, "it lacks layers.7.weight"),
        "chain.pth": (head | {"layers.4.weight": torch.zeros(64, 100)}, "don't lead to one score"),
        "bias.pth": ({name: tensor for name, tensor in head.items() if name != "layers.6.bias"}, "layers.6.bias diff"),
        "wide.pth": (head | {"layers.0.weight": torch.zeros(1024, 768)}, "features of 24 numbers, wide.pth takes 768"),
        "hps.pt": ({"state_dict": state}, "it seems to be a CLIP or HPS checkpoint"),
    }  # fmt: skip
    for name, (tensors, message) in wrong.items():
        torch.save(tensors, folder / name)
        with pytest.raises(ConfigError, match=message) as error:
            check_reward(RewardConfig(name="aesthetic", path=str(folder / name)))
        assert "reward.path=" in str(error.value) and "srpo download" in str(error.value)
    whole = (folder / HEAD).read_bytes()
    (folder / HEAD).write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="cut short"):
        check_reward(RewardConfig(name="aesthetic", path=str(folder)))
    (folder / HEAD).unlink()
    with pytest.raises(ConfigError, match=r"holds neither sac\+logos\+ava1-l14-linearMSE.pth"):
        check_reward(RewardConfig(name="aesthetic", path=str(folder)))


def test_a_clip_that_the_head_was_not_trained_on_is_refused(folder, state):
    in_transformers_format(folder / aesthetic.CLIP_FOLDER, state, activation="gelu")
    with pytest.raises(ConfigError, match=r"is not OpenAI's CLIP.*srpo download clip-l14"):
        check_reward(RewardConfig(name="aesthetic", path=str(folder)))


def test_a_missing_clip_and_an_unset_path_are_errors_with_the_way_out(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    (folder / aesthetic.CLIP_FOLDER).rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match=r"its CLIP ViT-L/14 is neither beside it.*srpo download clip-l14"):
        check_reward(RewardConfig(name="aesthetic", path=str(folder)))
    mixed = RewardConfig(name="miniature", more=[MoreReward(name="aesthetic", offset=5, scale=0.2)])
    with pytest.raises(ConfigError, match=r"reward.more, path of 'aesthetic' is not set.*srpo download aesthetic"):
        check_reward(mixed)
    (folder / "elsewhere").rename(folder / aesthetic.CLIP_FOLDER)
    expected = load(folder)(images(), ["a", "b"])
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    folder.rename(tmp_path / "ComfyUI" / "models" / "srpo_rewards")
    (found,) = (part for part in load_rewards(mixed, "cpu") if part.name == "aesthetic")
    assert torch.equal(found.reward(images(), ["a", "b"]), expected)


class Brightness:
    """A reward that doesn't read prompts."""

    reads_prompts = False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)).repeat(len(prompts) // len(images))


class Constant:
    """A flow whose velocity is its one parameter."""

    def __init__(self, shape):
        self.weight = torch.zeros(shape, requires_grad=True)

    def velocity(self, latents, sigma, prompts, guidance):
        return self.weight


def gradient_of(reward: WeightedReward, steps: list[AlignStep]) -> Tensor:
    """What the branches' losses leave in the velocity of a `Constant` flow whose latents are the images."""
    flow = Constant((1, 3, 4, 4))
    rollout = Rollout(PromptBatch(("a",)), torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5))
    for step in steps:
        recovered = direct_align(flow, rollout, step, guidance=1.0)
        score = reward.score(*two_wordings(reward.reward, recovered, ["a"], "Real", "Painting"), step.k)
        reward.loss(score, len(steps)).sum().backward()
    return flow.weight.grad


def test_the_inversion_branch_takes_back_what_a_reward_that_does_not_read_gives_in_the_denoise_branch():
    reward = WeightedReward("brightness", Brightness(), margin=10)
    denoise, inversion = AlignStep(0.9, 0.85, 0.2), AlignStep(0.8, 0.85, 0.2)
    alone = gradient_of(reward, [denoise])
    assert (alone > 0).all()  # less velocity, so a brighter picture
    assert torch.allclose(gradient_of(reward, [denoise, inversion]), torch.zeros(1), atol=1e-9)
    assert torch.allclose(gradient_of(reward, [AlignStep(0.9, 0.85, 0.4)]), 2 * alone)  # k is all that counts


def test_a_run_is_told_of_rewards_that_do_not_read(folder):
    blind, other = WeightedReward("aesthetic", load(folder)), WeightedReward("mine", lambda images, prompts: images)
    (note,) = blind_notes([other, blind], ["denoise", "inversion"])
    assert note.startswith("warning: prompts are not read by aesthetic:") and "align.branches=[denoise]" in note
    assert "inversion" not in blind_notes([blind], ["denoise"])[0]
    assert blind_notes([other], ["denoise", "inversion"]) == []
