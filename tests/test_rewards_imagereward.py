"""ImageReward from the published checkpoint's names, against numbers of the ImageReward package's own code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.implementations import BertWordPieceTokenizer

from scripts.by_rule import by_rule, weight_by_rule
from scripts.reward_parity_imagereward import pictures
from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.interfaces import Reward
from srpo_core.rewards import check_reward, imagereward, load_rewards
from srpo_core.rewards.blip import BlipScore, own_names

GOLDEN = Path(__file__).parent / "golden" / "imagereward"
TINY = json.loads((GOLDEN / "tiny.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def state():
    """The weights that the package scored with, under its names."""
    return {
        name: torch.arange(shape[-1]).expand(*shape) if name.endswith("position_ids") else weight_by_rule(name, shape)
        for name, shape in TINY["shapes"].items()
    }


@pytest.fixture
def folder(tmp_path, state):
    """As `srpo download imagereward` leaves it: the checkpoint, and the tokenizer beside it."""
    place = tmp_path / "ImageReward"
    write_vocabulary(place / "bert-base-uncased")
    torch.save(state, place / "ImageReward.pt")
    return place


def write_vocabulary(folder, words=TINY["vocabulary"]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def load(path, **settings):
    config = RewardConfig(name="imagereward", path=str(path), **settings)
    check_reward(config)
    return imagereward.load(config, "cpu")


def golden_pairs():
    """Images [2, 3, S, S], and every golden prompt for both."""
    return pictures(TINY["images"][-1]), [prompt for prompt in TINY["prompts"] for _ in range(2)]


def test_scores_and_gradients_are_those_of_the_imagereward_package(folder):
    images, prompts = golden_pairs()
    scores = load(folder)(images.requires_grad_(), prompts)
    expected = torch.tensor(TINY["scores"])
    assert expected.std() > 0.1  # so that a difference would show
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5)
    (scores * by_rule("cotangent", scores.shape)).sum().backward()
    gradient = torch.tensor(TINY["gradient"])
    assert torch.allclose(images.grad[:, :, ::9, ::7], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_tokens_are_those_of_the_package_for_unusual_texts_too(folder):
    tokens = load(folder).tokenize(TINY["unusual"])
    assert tokens["input_ids"].tolist() == TINY["tokens"]
    assert torch.equal(tokens["attention_mask"], (tokens["input_ids"] != 0).long())


def test_the_published_full_size_checkpoint_has_the_tensors_that_the_network_wants():
    full = json.loads((GOLDEN / "full.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = BlipScore({name: tuple(shape) for name, shape in full["shapes"].items()})
    own = {name: tuple(full["shapes"][old]) for name, old in own_names(full["shapes"])}
    assert own == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert (network.image_size, network.words) == (224, 30524)
    assert (network.vision.config.num_attention_heads, network.text.config.num_attention_heads) == (16, 12)


def test_other_files_of_the_same_tensors_give_the_same_scores(tmp_path, folder, state):
    images, prompts = golden_pairs()
    expected = load(folder)(images, prompts)
    write_vocabulary(tmp_path)  # beside the file itself
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "any name.safetensors")
    assert torch.equal(load(tmp_path / "any name.safetensors")(images, prompts), expected)
    torch.save({"state_dict": state, "step": 3}, tmp_path / "wrapped.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load(tmp_path / "wrapped.pt")(images, prompts), expected)
    BertWordPieceTokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").unlink()
    assert torch.equal(load(tmp_path / "wrapped.pt")(images, prompts), expected)


def test_several_wordings_share_one_pass_of_the_image_tower(folder):
    reward = load(folder)
    assert isinstance(reward, Reward)
    passes = []
    reward.network.vision.register_forward_hook(
        lambda module, inputs, settings, output: passes.append(len(settings["pixel_values"])), with_kwargs=True
    )
    images = pictures(64)
    scores = reward(images, ["a red wall", "blue", "on the house", "a photo"])
    assert passes == [2]
    alone = [reward(images[i % 2 : i % 2 + 1], [text]) for i, text in enumerate(["a red wall", "blue", "on the house"])]
    assert torch.allclose(scores[:3], torch.cat(alone), atol=1e-5)
    with pytest.raises(ValueError, match="3 prompts don't divide among 2 images"):
        reward(images, ["a", "b", "c"])


def test_a_prompt_is_read_up_to_35_tokens(folder):
    reward, image = load(folder), pictures(64)[:1]
    words = "red blue " * 20
    inside, outside = words.split()[:33], words.split()[:34]  # [CLS] and [SEP] take two
    assert torch.equal(reward(image, [" ".join(outside)]), reward(image, [" ".join([*outside, "wall"])]))
    other = [*inside[:-1], "wall"]
    assert (reward(image, [" ".join(inside)]) - reward(image, [" ".join(other)])).abs() > 1e-4


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_gradient_in_the_images_is_that_of_finite_differences(folder, fit):
    """In float64, through resizing, recomputation and the text tower that looks at the image."""
    reward = load(folder, fit=fit)
    reward.network.double()
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(1, 3, 48, 80, generator=generator, dtype=torch.float64).requires_grad_()
    texts = ["a red wall", "photo. blue circle"]
    (gradient,) = torch.autograd.grad(reward(batch, texts).sum(), batch)
    for _ in range(3):
        direction = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, back = (reward(batch + sign * 1e-5 * direction, texts).sum() for sign in (1, -1))
        assert float((ahead - back) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())


def test_the_image_tower_is_recomputed_in_the_backward_pass(folder):
    reward, calls = load(folder), []
    first = reward.network.vision.encoder.layers[0].layer_norm1
    first.register_forward_hook(lambda *_: calls.append(1))
    value = reward(pictures(64).requires_grad_(), ["red", "blue"]).sum()
    assert len(calls) == 1
    value.backward()
    assert len(calls) == 2


def broken(state):
    """{what is wrong: (tensors, what the error says)}"""
    less, head = dict(state), {name: tensor for name, tensor in state.items() if not name.startswith("mlp.")}
    del less["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    no_blocks = {name: tensor for name, tensor in state.items() if "blocks.0" not in name}
    narrow = state | {"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(30, 32)}
    flat = state | {"blip.visual_encoder.pos_embed": torch.zeros(17, 192)}
    wide = state | {"blip.visual_encoder.norm.bias": torch.zeros(3)}
    return {
        "less": (less, r"text.encoder.layer.1.crossattention.self.key.bias is missing, not \(128,\)"),
        "more": (state | {"mlp.layers.8.bias": torch.zeros(1)}, r"head.layers.8.bias is \(1,\), not there"),
        "wide": (wide, r"vision.post_layernorm.bias is \(3,\), not \(192,\)"),
        "no head": (head, r"is no ImageReward checkpoint: it has no mlp\.\*"),
        "no blocks": (no_blocks, r"no whole ImageReward checkpoint \(blip.visual_encoder.blocks.0.*is missing"),
        "narrow": (narrow, "its shapes don't fit"),
        "flat": (flat, "its shapes don't fit"),
        "flux": ({"double_blocks.0.a": torch.zeros(1)}, "it seems to be a FLUX transformer"),
        "hps": (dict.fromkeys(["visual.transformer.a", "token_embedding.weight"], torch.zeros(1)), "a CLIP or HPS"),
        "unknown": ({"a": torch.zeros(1), "b": torch.zeros(1)}, r"it has no blip.visual_encoder\.\*"),
    }


def test_wrong_and_broken_checkpoints_are_named_for_what_they_are(folder, state):
    for name, (tensors, message) in broken(state).items():
        path = folder / f"{name}.pt"
        torch.save(tensors, path)
        with pytest.raises(ConfigError, match=message) as error:
            check_reward(RewardConfig(name="imagereward", path=str(path)))
        assert f"reward.path={str(path)!r}" in str(error.value) and "srpo download imagereward" in str(error.value)
    whole = (folder / "ImageReward.pt").read_bytes()
    (folder / "ImageReward.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"ImageReward.pt'?: it is cut short"):
        check_reward(RewardConfig(name="imagereward", path=str(folder)))
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(ConfigError, match=r"holds neither ImageReward.pt nor ImageReward.safetensors"):
        check_reward(RewardConfig(name="imagereward", path=str(folder)))


def test_a_missing_or_other_tokenizer_is_an_error_with_the_way_out(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    tokenizer = folder / "bert-base-uncased"
    words = TINY["vocabulary"]
    cases = {
        "has 29 tokens, the weights have 30": words[:-1],
        r"its tokenizer has no \[MASK\]": ["x" if word == "[MASK]" else word for word in words],
        "can't be read as a tokenizer": words[4:],
    }
    for message, vocabulary in cases.items():
        write_vocabulary(tokenizer, vocabulary)
        with pytest.raises(ConfigError, match=message):
            check_reward(RewardConfig(name="imagereward", path=str(folder)))
    BertWordPieceTokenizer({word: i for i, word in enumerate([*words[:-1], "A"])}, lowercase=False).save(
        str(tokenizer / "tokenizer.json")
    )
    with pytest.raises(ConfigError, match="tells A from a"):
        check_reward(RewardConfig(name="imagereward", path=str(folder)))
    for file in tokenizer.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"its tokenizer, bert-base-uncased, is neither.*srpo download imagereward"):
        check_reward(RewardConfig(name="imagereward", path=str(folder)))
    cached = tmp_path / "cache" / "models--google-bert--bert-base-uncased"
    write_vocabulary(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    check_reward(RewardConfig(name="imagereward", path=str(folder)))


def test_an_unset_path_is_looked_up_where_downloads_go(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    place = tmp_path / "ComfyUI" / "models" / "srpo_rewards"
    place.mkdir(parents=True)
    mixed = RewardConfig(name="miniature", more=[MoreReward(name="imagereward", scale=0.3)])
    with pytest.raises(ConfigError, match=r"reward.more, path of 'imagereward' is not set.*srpo download imagereward"):
        check_reward(mixed)
    for name in ("med_config.json", "bert-base-uncased/tokenizer_config.json"):
        (folder / name).write_text("{}")
    BertWordPieceTokenizer(str(folder / "bert-base-uncased" / "vocab.txt")).save(
        str(folder / "bert-base-uncased" / "tokenizer.json")
    )
    images, prompts = golden_pairs()
    expected = load(folder)(images, prompts)
    folder.rename(place / "ImageReward")
    check_reward(mixed)
    (found,) = (part for part in load_rewards(mixed, "cpu") if part.name == "imagereward")
    assert torch.equal(found.reward(images, prompts), expected)
