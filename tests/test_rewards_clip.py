"""CLIP rewards from every kind of file: the same weights give the same score, that of the libraries' own code."""

import contextlib
import json

import pytest
import tiny_clip
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_reward_images import by_pil, picture, tensor
from torch.nn import functional as F
from transformers import CLIPModel

from srpo_core.config import ConfigError, MoreReward, RewardConfig
from srpo_core.interfaces import Reward
from srpo_core.miniature.models import WEIGHTS
from srpo_core.rewards import REWARDS, check_reward, clip, hpsv2, load_reward, load_rewards, pickscore
from srpo_core.rewards.clip import OPENAI_MEAN, OPENAI_STD
from srpo_core.rewards.clip_files import examine_clip, load_clip
from srpo_core.rewards.images import normalise

PROMPTS = ["a red cat on a mat", "Detail. two dogs, running & barking!"]


@pytest.fixture(scope="module", autouse=True)
def narrow(tmp_path_factory):
    """The narrow model known to open_clip, and as that of HPS and PickScore."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv2, "ARCHITECTURE", tiny_clip.register(tmp_path_factory.mktemp("open_clip")))
        patch.setattr(pickscore, "IMAGE_WIDTH", tiny_clip.VISION)
        yield


@pytest.fixture(scope="module")
def state():
    return tiny_clip.weights()


@pytest.fixture
def hps_file(tmp_path, state):
    return tiny_clip.save_checkpoint(tmp_path / "HPS_v2.1_compressed.pt", state)


def images(count=2, size=tiny_clip.SIZE):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def expected_cosine(model, batch, prompts):
    """By open_clip's own model, one text and image at a time."""
    from open_clip import tokenize

    with torch.no_grad():
        pixels = normalise(batch, OPENAI_MEAN, OPENAI_STD)
        pairs = zip(pixels.repeat(len(prompts) // len(batch), 1, 1, 1), prompts, strict=True)
        return torch.stack([
            F.cosine_similarity(model.encode_image(image[None]), model.encode_text(tokenize([text])))[0]
            for image, text in pairs
        ])  # fmt: skip


def score(module, path, prompts=PROMPTS, **settings):
    config = RewardConfig(path=str(path), **settings)
    module.check(config)
    return module.load(config, "cpu")(images(), prompts)


def in_folder(folder, state, activation="gelu"):
    """The model in transformers' format, without a tokenizer."""
    model = CLIPModel(tiny_clip.transformers_config(activation))
    model.load_state_dict(tiny_clip.transformers_weights(state), strict=True)
    model.save_pretrained(folder)
    return folder


def test_hps_is_the_cosine_of_open_clips_own_model(state, hps_file):
    texts = [*PROMPTS, "a cat", "nothing"]
    expected = expected_cosine(tiny_clip.reference(state), images(), texts)
    assert expected.std() > 0.01
    assert torch.allclose(score(hpsv2, hps_file, texts), expected, atol=1e-6)


def test_every_format_gives_the_same_score(tmp_path, state, hps_file):
    expected = score(hpsv2, hps_file)
    safe = tiny_clip.save_checkpoint(tmp_path / "hps.safetensors", state)
    half = tiny_clip.save_checkpoint(tmp_path / "half.safetensors", {n: t.half() for n, t in state.items()})
    folder = in_folder(tmp_path / "transformers", state)
    (tmp_path / "open_clip").mkdir()
    tiny_clip.save_checkpoint(tmp_path / "open_clip" / "open_clip_pytorch_model.bin", state)
    config = {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD}}
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(json.dumps(config))
    scores = {
        "hps, safetensors": score(hpsv2, safe),
        "clip, transformers": score(clip, folder),
        "clip, transformers file": score(clip, folder / "model.safetensors"),
        "clip, open_clip": score(clip, tmp_path / "open_clip"),
    }
    for name, values in scores.items():
        assert torch.allclose(values, expected, atol=1e-6), name
    assert torch.allclose(score(hpsv2, half), expected, atol=2e-3)


def test_pickscore_is_the_learned_scale_times_the_cosine(tmp_path, state, hps_file):
    expected = score(hpsv2, hps_file) * state["logit_scale"].exp()
    folder = in_folder(tmp_path / "PickScore_v1", state)
    alone = tmp_path / "pickscore.safetensors"
    old = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as older transformers saved them
    save_file(tiny_clip.transformers_weights(state) | old, alone)
    assert torch.allclose(score(pickscore, folder), expected, atol=1e-5)
    assert torch.allclose(score(pickscore, alone), expected, atol=1e-5)


def test_quick_gelu_is_taken_from_the_configuration_beside_the_file(tmp_path, state):
    path = tiny_clip.save_checkpoint(tmp_path / "open_clip_model.safetensors", state)
    with pytest.raises(ConfigError, match=r"doesn't say which: put the open_clip_config.json .* beside it"):
        score(clip, path)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    quick = score(clip, path)
    assert torch.allclose(quick, expected_cosine(tiny_clip.reference(state, True), images(), PROMPTS), atol=1e-6)
    assert torch.allclose(score(clip, in_folder(tmp_path / "transformers", state, "quick_gelu")), quick, atol=1e-6)
    gelu = expected_cosine(tiny_clip.reference(state), images(), PROMPTS)
    assert (quick - gelu).abs().max() > 1e-4  # so that the wrong one would show


def test_the_configuration_of_images_is_taken_too(tmp_path, state):
    path = tiny_clip.save_checkpoint(tmp_path / "open_clip_model.safetensors", state)
    config = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(path, "reward.path", "cpu").mean == [0.5] * 3


def test_several_wordings_share_one_pass_of_the_image_tower(hps_file):
    reward = hpsv2.load(RewardConfig(path=str(hps_file)), "cpu")
    assert isinstance(reward, Reward)
    passes = []
    reward.clip.module.visual.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    both = reward(images(), ["a", "b", "c", "d"])
    assert passes == [2]
    assert torch.allclose(both[2:], reward(images(), ["c", "d"]), atol=1e-6)
    with pytest.raises(ValueError, match="3 prompts don't divide among 2 images"):
        reward(images(), ["a", "b", "c"])


@pytest.fixture
def in_float64():
    """Older transformers make text masks in the default precision whatever the model's is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_the_gradient_in_the_images_is_that_of_finite_differences(tmp_path, state, hps_file, kind, fit, in_float64):
    """In float64, through resizing, both towers and recomputation."""
    path = hps_file if kind == "open_clip" else in_folder(tmp_path / "model", state)
    module = hpsv2 if kind == "open_clip" else pickscore
    reward = module.load(RewardConfig(path=str(path), fit=fit), "cpu")
    reward.clip.module.double()
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(1, 3, 40, 64, generator=generator, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(batch, ["a cat"]).sum(), batch)
    for _ in range(3):
        direction = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, back = (reward(batch + sign * 1e-5 * direction, ["a cat"]).sum() for sign in (1, -1))
        assert float((ahead - back) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.clip.module.parameters())


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_the_image_tower_is_recomputed_in_the_backward_pass(tmp_path, state, hps_file, kind):
    path = hps_file if kind == "open_clip" else in_folder(tmp_path / "model", state)
    reward = (hpsv2 if kind == "open_clip" else pickscore).load(RewardConfig(path=str(path)), "cpu")
    tower = reward.clip.module.visual.transformer if kind == "open_clip" else reward.clip.module.vision_model.encoder
    calls = []
    block = (tower.resblocks if kind == "open_clip" else tower.layers)[0]
    first = block.ln_1 if kind == "open_clip" else block.layer_norm1  # recomputation ends at the last that is needed
    first.register_forward_hook(lambda *_: calls.append(1))
    value = reward(images(1).requires_grad_(), ["a cat"]).sum()
    assert len(calls) == 1
    value.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_scores_are_those_of_pictures_prepared_in_8_bits(state, hps_file, fit):
    """PIL's rounding moves a score by less than 1e-3, where other pictures move it by more than 1e-2."""
    reward = hpsv2.load(RewardConfig(path=str(hps_file), fit=fit), "cpu")
    values = []
    for size in ((720, 720), (768, 1344), (301, 200)):
        pixels = picture(*size)
        eight_bits = by_pil(pixels, fit, tiny_clip.SIZE)
        with torch.no_grad():
            ours = reward(tensor(pixels), ["a cat"])
        assert abs(float(ours - expected_cosine(tiny_clip.reference(state), eight_bits, ["a cat"]))) < 1e-3
        values.append(float(ours))
    assert max(values) - min(values) > 1e-2


def wrong_files(folder, state):
    """(name of a file made there, what the error says of it)"""
    less = {name: tensor for name, tensor in state.items() if "resblocks.1" not in name}
    wider = state | {"visual.proj": torch.zeros(tiny_clip.VISION, 7)}
    more = state | {"visual.extra": torch.zeros(1)}
    whole = tiny_clip.save_checkpoint(folder / "whole.pt", state).read_bytes()
    code = {"state_dict": {"a": torch.zeros(1)}, "model": torch.nn.Linear(1, 1)}
    torch.save(code, folder / "code.pt")
    one, renamed = torch.zeros(1), tiny_clip.transformers_weights(state)
    torch.save({"blip.visual_encoder.a": one, "blip.text_encoder.a": one}, folder / "ImageReward.pt")
    torch.save({"layers.0.weight": one, "layers.7.weight": one}, folder / "head.pth")
    save_file({"double_blocks.0.img_attn.qkv.weight": one}, folder / "flux.safetensors")
    save_file(renamed, folder / "pickscore.safetensors")
    save_file({name: tensor for name, tensor in renamed.items() if "text" in name}, folder / "clip_l.safetensors")
    for name, tensors in (("less.pt", less), ("wider.pt", wider), ("more.pt", more)):
        tiny_clip.save_checkpoint(folder / name, tensors)
    (folder / "short.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "page.pt").write_text("<!DOCTYPE html><html>not found</html>")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return {
        "code.pt": "more than tensors",
        "ImageReward.pt": "is an ImageReward checkpoint, not a CLIP model",
        "head.pth": "is the aesthetic predictor's head, not a CLIP model",
        "flux.safetensors": "is a FLUX transformer, not a CLIP model",
        "pickscore.safetensors": "in transformers' format, not HPS v2's own file; try reward.name=clip",
        "clip_l.safetensors": "is a CLIP text encoder, not a CLIP model",
        "less.pt": "of a shape that open_clip doesn't know",
        "wider.pt": "of a shape that open_clip doesn't know",
        "more.pt": "not HPS v2 .*: 1 tensors differ, visual.extra first",
        "short.pt": "cut short",
        "page.pt": "is a web page",
        "pointer.safetensors": "Git LFS",
        "missing.pt": "No such file",
    }


def test_wrong_files_are_named_for_what_they_are(tmp_path, state):
    for name, message in wrong_files(tmp_path, state).items():
        path = tmp_path / name
        with pytest.raises(ConfigError, match=message) as error:
            check_reward(RewardConfig(name="hpsv2", path=str(path)))
        assert f"reward.path={str(path)!r}" in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {}, optional={"model_cfg": JSON, "preprocess_cfg": JSON | st.fixed_dictionaries({"mean": JSON})}
    )
)
def test_any_open_clip_configuration_is_used_or_refused(tmp_path, state, config):
    path = tmp_path / "open_clip_model.safetensors"
    if not path.exists():
        tiny_clip.save_checkpoint(path, state)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ConfigError):
        examine_clip(path, "reward.path")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["text_config", "vision_config", "projection_dim", "model_type"]), JSON),
    st.dictionaries(st.sampled_from(["image_mean", "image_std"]), JSON),
)
def test_any_transformers_configuration_is_used_or_refused(tmp_path, state, config, processor):
    path = tmp_path / "model.safetensors"
    if not path.exists():
        save_file(tiny_clip.transformers_weights(state), path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with contextlib.suppress(ConfigError):
        examine_clip(path, "reward.path")


SHAPE = st.lists(st.integers(0, 3), max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(SHAPE, min_size=6, max_size=6), st.integers(0, 6))
def test_any_shapes_are_refused_by_the_file(tmp_path, is_open_clip, shapes, left_out):
    names = (
        ["visual.conv1.weight", "visual.proj", "token_embedding.weight", "positional_embedding",
         "visual.positional_embedding", "text_projection"]
        if is_open_clip else
        ["vision_model.embeddings.patch_embedding.weight", "visual_projection.weight", "text_projection.weight",
         "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
         "vision_model.embeddings.position_embedding.weight"]
    )  # fmt: skip
    tensors = {
        name: torch.zeros(shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True)) if i != left_out
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"reward.path="):
        examine_clip(tmp_path / "model.safetensors", "reward.path", quick_gelu=False)


def test_another_clip_is_not_pickscore(tmp_path, state, monkeypatch):
    folder = in_folder(tmp_path / "clip", state)
    monkeypatch.setattr(pickscore, "IMAGE_WIDTH", 1280)
    with pytest.raises(
        ConfigError, match=r"not PickScore: its image tower is 128 wide, not 1280; try reward.name=clip"
    ):
        check_reward(RewardConfig(name="pickscore", path=str(folder)))
    own_words = str(WEIGHTS / "clip")  # the miniature's
    with pytest.raises(
        ConfigError, match=r"has a vocabulary of \d+ words, not CLIP's 49408, and no tokenizer beside it"
    ):
        check_reward(RewardConfig(name="clip", path=own_words))


def test_another_models_tensors_in_a_transformers_folder(tmp_path, state):
    folder = in_folder(tmp_path, state)
    tensors = tiny_clip.transformers_weights(state)
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"reward.path=.*1 missing \(text_model.encoder.layers.1.mlp.fc2.bias\)"):
        pickscore.load(RewardConfig(path=str(folder)), "cpu")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json'?: holds no JSON object"):
        check_reward(RewardConfig(name="pickscore", path=str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no weights of a CLIP model"):
        check_reward(RewardConfig(name="clip", path=str(tmp_path / "empty")))


def test_an_unset_path_is_looked_up_and_the_places_are_named(tmp_path, monkeypatch, state, hps_file):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    place = tmp_path / "ComfyUI" / "models" / "srpo_rewards"
    place.mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        check_reward(RewardConfig(name="hpsv2"))
    for part in ("reward.path is not set", str(place), "xswu/HPSv2", "srpo download hpsv2"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"reward.more, path of 'pickscore' is not set"):
        check_reward(RewardConfig(name="hpsv2", path=str(hps_file), more=[MoreReward(name="pickscore")]))
    hps_file.rename(place / hps_file.name)
    config = RewardConfig(name="hpsv2")
    check_reward(config)
    (found,) = load_rewards(config, "cpu")
    assert torch.equal(found.reward(images(), PROMPTS), score(hpsv2, place / hps_file.name))


def test_unknown_rewards_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"reward.name='hps': unknown reward; did you mean 'hpsv2'\?"):
        check_reward(RewardConfig(name="hps"))
    with pytest.raises(ConfigError, match=r"reward.more, name='pickscor': unknown reward; did you mean 'pickscore'"):
        check_reward(RewardConfig(name="miniature", more=[MoreReward(name="pickscor")]))


def test_a_text_is_read_once(hps_file, monkeypatch):
    reward, read = hpsv2.load(RewardConfig(path=str(hps_file)), "cpu"), []
    features = reward.clip.text_features

    def noted(texts):
        read.append(list(texts))
        return features(texts)

    monkeypatch.setattr(reward.clip, "text_features", noted)
    first = reward(images(), ["Real. a", "Real. b", "Flat. a", "Flat. b"])
    again = reward(images(), ["Flat. a", "Flat. b", "Real. a", "Real. b"])
    assert torch.equal(again, first.roll(2))
    reward(images(), ["Real. a", "Oil. b"])
    assert read == [["Real. a", "Real. b", "Flat. a", "Flat. b"], ["Oil. b"]]
    monkeypatch.setattr(clip, "KEPT_TEXTS", 3)
    reward(images(), ["Oil. c", "Real. a"])
    assert list(reward._texts) == ["Oil. b", "Oil. c", "Real. a"]  # those asked for last
    reward(images(), ["Flat. a", "Real. a"])
    assert read[-1] == ["Flat. a"]


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_in_bfloat16_it_takes_half_the_memory_and_scores_nearly_the_same(tmp_path, state, hps_file, kind):
    path = hps_file if kind == "open_clip" else in_folder(tmp_path / "model", state)
    name = "hpsv2" if kind == "open_clip" else "pickscore"
    images = torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        reward = load_reward(RewardConfig(name=name, path=str(path), dtype=dtype), "cpu")
        scores[dtype] = reward(images, ["a cat", "a dog"])
        sizes[dtype] = sum(p.numel() * p.element_size() for p in reward.module.parameters())
        scores[dtype].sum().backward()
        assert scores[dtype].dtype == torch.float32 and images.grad.abs().sum() > 0
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    error = (scores["bfloat16"] - scores["float32"]).abs().max()
    assert 0 < error < 0.06 * scores["float32"].abs().max()


def test_other_rewards_stay_in_float32(monkeypatch):
    monkeypatch.setitem(REWARDS, "imagereward", "toy_run:load_reward")
    with pytest.raises(ConfigError, match=r"reward\.dtype='bfloat16': imagereward is computed in float32"):
        load_reward(RewardConfig(name="imagereward", dtype="bfloat16"), "cpu")
