"""FLUX's text encoders from every file give what transformers gives; nothing is loaded early or kept; tokenizers."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
from tiny_flux import save_tiny_flux
from tiny_text import (
    all_fp8,
    clip_tensors,
    plain_fp8,
    save,
    scaled_fp8,
    stands_for,
    t5_tensors,
    tiny_clip,
    tiny_t5,
    with_weights,
)

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.interfaces import Components
from srpo_core.models import flux_text
from srpo_core.models.flux_text import FluxTextEncoder, find_text
from srpo_core.weights.eight_bit import to_rows
from srpo_core.weights.tensors import open_tensors

TEXTS = ["a red cat, asleep", "dog", "", "long " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(autouse=True)
def no_other_tokenizers(monkeypatch, tmp_path):
    """This machine's own ComfyUI and Hugging Face cache play no part."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))


@pytest.fixture(scope="module")
def towers():
    return tiny_clip(), tiny_t5()


@pytest.fixture
def files(folder, towers, tmp_path):
    """Settings that name single files of both towers, and the tokenizers."""
    return {
        "clip": str(save(tmp_path / "clip_l.safetensors", clip_tensors(towers[0]))),
        "t5": str(save(tmp_path / "t5xxl.safetensors", t5_tensors(towers[1]))),
        "tokenizers": str(folder),
    }


def encoder(settings, **options):
    return FluxTextEncoder(find_text(ModelConfig(**settings)), **options)


def reference(folder, clip, t5):
    """(pooled, tokens) as diffusers' pipelines make them with transformers' modules."""
    from transformers import AutoTokenizer

    def ids(name, length):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        return tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    with torch.no_grad():
        return clip(ids("tokenizer", 77)).pooler_output, t5(ids("tokenizer_2", 512)).last_hidden_state


def assert_same(batch, pooled, tokens):
    assert torch.equal(batch.embeds["pooled_prompt_embeds"], pooled)
    assert torch.equal(batch.embeds["prompt_embeds"], tokens)


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- every file


def bare(tensors):
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


CLIP_FILES = {
    "as ComfyUI's": lambda t: t,
    "without text_model": bare,
    "with extras": lambda t: t | {
        "logit_scale": torch.tensor(4.6), "text_projection.weight": torch.zeros(64, 64),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    },
    "bare with extras": lambda t: bare(t) | {
        "logit_scale": torch.tensor(4.6), "text_projection.weight": torch.zeros(64, 64),
        "embeddings.position_ids": torch.arange(77)[None],
    },
    "a whole CLIP": lambda t: t | {
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 8),
        "vision_model.embeddings.class_embedding": torch.zeros(8), "visual_projection.weight": torch.zeros(8, 8),
    },
    "by CLIPSave": lambda t: {f"clip_l.{name}": tensor for name, tensor in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("change", CLIP_FILES.values(), ids=CLIP_FILES)
def test_every_clip_file_gives_what_transformers_gives(folder, towers, files, tmp_path, change):
    files["clip"] = str(save(tmp_path / "other.safetensors", change(clip_tensors(towers[0]))))
    assert_same(encoder(files)(TEXTS), *reference(folder, *towers))


def alias(tensors):
    return {"encoder.embed_tokens.weight" if k == "shared.weight" else k: tensor for k, tensor in tensors.items()}


T5_FILES = {
    "as ComfyUI's": lambda t: t,
    "with the alias": lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"].clone()},
    "with the alias alone": alias,
    "a whole T5": lambda t: t | {
        "lm_head.weight": torch.zeros(32, 24), "decoder.block.0.layer.0.layer_norm.weight": torch.ones(24),
        "decoder.final_layer_norm.weight": torch.ones(24),
    },
    "with a prefix": lambda t: {f"t5xxl.transformer.{name}": tensor for name, tensor in t.items()},
    "with a tokenizer inside": lambda t: t | {"spiece_model": torch.zeros(9, dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("change", T5_FILES.values(), ids=T5_FILES)
def test_every_t5_file_gives_what_transformers_gives(folder, towers, files, tmp_path, change):
    files["t5"] = str(save(tmp_path / "other.safetensors", change(t5_tensors(towers[1]))))
    assert_same(encoder(files)(TEXTS), *reference(folder, *towers))


def test_an_all_in_one_checkpoint(folder, towers, files, tmp_path):
    parts = {
        "text_encoders.clip_l.transformer.": clip_tensors(towers[0]),
        "text_encoders.t5xxl.transformer.": t5_tensors(towers[1]),
        "model.diffusion_model.": {
            "img_in.weight": torch.zeros(8, 4), "vector_in.in_layer.weight": torch.zeros(8, 4),
            "double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(4),
        },
    }  # fmt: skip
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    path = save(tmp_path / "flux1-dev-all.safetensors", tensors)
    assert_same(encoder({"path": str(path), "tokenizers": str(folder)})(TEXTS), *reference(folder, *towers))
    assert_same(encoder(files | {"path": str(path)})(TEXTS), *reference(folder, *towers))


def test_a_diffusers_folder_its_own_config_wins(folder):
    """Its heads are 10 and 8 wide, which no shape tells."""
    from transformers import CLIPTextModel, T5EncoderModel

    theirs = reference(
        folder,
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
    )
    assert_same(encoder({"path": str(folder)})(TEXTS), *theirs)
    apart = {"clip": str(folder / "text_encoder"), "t5": str(folder / "text_encoder_2")}
    assert_same(encoder(apart)(TEXTS), *theirs)  # the tokenizers lie beside them
    assert_same(encoder({"clip": str(folder), "t5": str(folder), "tokenizers": str(folder)})(TEXTS), *theirs)


def test_sharded_folders(folder, towers, tmp_path):
    clip, t5 = towers
    clip.save_pretrained(tmp_path / "text_encoder", max_shard_size="60KB")
    t5.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="10KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    assert_same(encoder({"path": str(tmp_path), "tokenizers": str(folder)})(TEXTS), *reference(folder, *towers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_modules(folder, towers, files, tmp_path, dtype):
    """The file's numbers are rounded once more at most, to the precision that is asked for."""
    rounded = [{k: x.to(dtype) for k, x in part.items()} for part in (clip_tensors(towers[0]), t5_tensors(towers[1]))]
    files["clip"], files["t5"] = (str(save(tmp_path / f"{i}.safetensors", part)) for i, part in enumerate(rounded))
    clip = tiny_clip()
    clip.load_state_dict({name: p.to(dtype) for name, p in clip.state_dict().items()})
    t5 = with_weights(tiny_t5, rounded[1])
    assert_same(encoder(files)(TEXTS), *reference(folder, clip, t5))
    half = encoder(files, dtype=torch.bfloat16)(TEXTS)
    assert half.embeds["prompt_embeds"].dtype == torch.bfloat16
    assert_same(half, *reference(folder, clip.bfloat16(), t5.bfloat16()))


# ---- 8 bits


def scaled_table(tensors):
    return scaled_fp8(tensors, table=True)


@pytest.mark.parametrize("store", [plain_fp8, all_fp8, scaled_fp8, scaled_table])
@pytest.mark.parametrize("t5_memory", ["full", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_files_are_what_they_stand_for_also_when_kept_in_8_bits(
    folder, towers, files, tmp_path, store, t5_memory, dtype
):
    tensors = store(t5_tensors(towers[1]))
    files["t5"] = str(save(tmp_path / "t5xxl_fp8.safetensors", tensors))
    theirs = reference(folder, towers[0], with_weights(tiny_t5, stands_for(tensors)).to(dtype))[1]
    ours = encoder(files, dtype=dtype, t5_memory=t5_memory)(TEXTS).embeds["prompt_embeds"]
    assert torch.equal(ours, theirs)


def test_8_bits_take_a_quarter_of_float32_and_change_little(folder, towers, files):
    exact, small = encoder(files), encoder(files, t5_memory="8bit")
    error = relative_error(small(TEXTS).embeds["prompt_embeds"], exact(TEXTS).embeds["prompt_embeds"])
    assert 0 < error < 0.03

    def matrices(module):
        tables = {id(module.shared.weight)}
        return sum(p.numel() * p.element_size() for p in module.parameters() if p.ndim == 2 and id(p) not in tables)

    bias = exact.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    rest = bias.numel() * 4
    assert matrices(small.t5) - rest == (matrices(exact.t5) - rest) / 4
    assert torch.equal(small(TEXTS).embeds["pooled_prompt_embeds"], exact(TEXTS).embeds["pooled_prompt_embeds"])


def test_rows_in_8_bits_are_off_by_half_a_step_at_most():
    weight = (
        torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1, 7, 300, 0])[:, None]
    )
    codes, scale = to_rows(weight)
    assert codes.dtype == torch.int8 and codes[:4].abs().amax(1).tolist() == [127] * 4
    assert ((codes * scale - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


# ---- loaded late, let go


def test_nothing_is_loaded_before_the_first_prompt_and_nothing_stays(files):
    text_encoder = encoder(files)
    assert not {"clip", "t5", "tokenizers"} & set(vars(text_encoder))
    parts = Components(None, None, text_encoder)
    batch = parts.text_encoder(["a cat"])
    weights = [weakref.ref(p) for module in (text_encoder.clip, text_encoder.t5) for p in module.parameters()]
    modules = [weakref.ref(text_encoder.clip), weakref.ref(text_encoder.t5), weakref.ref(text_encoder)]
    del text_encoder
    assert all(reference() is not None for reference in weights + modules)
    parts.release("text_encoder")
    gc.collect()
    assert all(reference() is None for reference in weights + modules)
    assert batch.embeds["prompt_embeds"].shape == (1, 512, 24)


def test_8_bits_let_go_too(files):
    text_encoder = encoder(files, t5_memory="8bit")
    text_encoder(["a cat"])
    kept = [weakref.ref(module) for module in text_encoder.t5.modules()]
    del text_encoder
    gc.collect()
    assert all(reference() is None for reference in kept)


# ---- fingerprints


def test_the_fingerprint_tells_encoders_apart(folder, files, towers, tmp_path):
    plain = encoder(files).fingerprint
    moved = dict(files, t5=str(shutil.copy(files["t5"], tmp_path / "elsewhere.safetensors")))
    assert encoder(moved).fingerprint == plain
    assert encoder(files, t5_memory="offload").fingerprint == plain  # the same numbers
    tensors = t5_tensors(towers[1])
    tensors["encoder.block.1.layer.0.SelfAttention.v.weight"] *= 1.001
    other_tokenizers = tmp_path / "tokenizers"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, other_tokenizers / name)
    settings = json.loads((other_tokenizers / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (other_tokenizers / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"lower": 1}))
    others = [
        encoder(dict(files, t5=str(save(tmp_path / "changed.safetensors", tensors)))).fingerprint,
        encoder(dict(files, tokenizers=str(other_tokenizers))).fingerprint,
        encoder(files, dtype=torch.bfloat16).fingerprint,
        encoder(files, t5_memory="8bit").fingerprint,
        encoder(files, max_tokens=256).fingerprint,
        encoder({"path": str(folder)}).fingerprint,
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_a_config_written_by_another_version_is_the_same_encoder(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"transformers_version": "9.9", "_name_or_path": "x"}), encoding="utf-8")
    assert encoder({"path": str(copy)}).fingerprint == encoder({"path": str(folder)}).fingerprint
    path.write_text(json.dumps(config | {"hidden_act": "gelu"}), encoding="utf-8")
    assert encoder({"path": str(copy)}).fingerprint != encoder({"path": str(folder)}).fingerprint


# ---- wrong files


def test_a_file_of_something_else_is_named(folder, files, tmp_path):
    for setting, other in (("clip", files["t5"]), ("t5", files["clip"])):
        with pytest.raises(ConfigError, match=rf"model\.{setting}=.*is .*(CLIP|T5) text encoder.*not a"):
            find_text(ModelConfig(**dict(files, **{setting: other})))
    transformer = str(folder / "transformer")
    with pytest.raises(ConfigError, match=r"model\.t5=.*FLUX.* transformer"):
        find_text(ModelConfig(**dict(files, t5=transformer)))
    with pytest.raises(ConfigError, match=r"model\.clip=.*no such file"):
        find_text(ModelConfig(**dict(files, clip=str(tmp_path / "gone.safetensors"))))


def test_a_tower_without_a_file_is_named(folder, files, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.clip is not set.*`srpo download clip-l` gets one"):
        find_text(ModelConfig(t5=files["t5"], tokenizers=str(folder)))
    there = tmp_path / "ComfyUI" / "models" / "text_encoders" / "t5xxl_fp16.safetensors"
    there.parent.mkdir(parents=True)
    shutil.copy(files["t5"], there)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    with pytest.raises(ConfigError, match=rf"model\.t5 is not set.*model\.t5={there} is here"):
        find_text(ModelConfig(clip=files["clip"], tokenizers=str(folder)))
    shutil.copytree(folder / "transformer", tmp_path / "part" / "transformer")
    with pytest.raises(ConfigError, match=r"model\.path=.* has no folder text_encoder; model\.clip names"):
        find_text(ModelConfig(path=str(tmp_path / "part")))


def test_a_tower_with_a_tensor_missing_or_of_another_shape_is_named(files, towers, tmp_path):
    tensors, good = t5_tensors(towers[1]), files["t5"]
    del tensors["encoder.block.2.layer.1.layer_norm.weight"]
    files["t5"] = str(save(tmp_path / "short.safetensors", tensors))
    with pytest.raises(ConfigError, match=r"model\.t5=.*short.safetensors.*block\.2\.layer\.1\.layer_norm\.weight"):
        find_text(ModelConfig(**files))
    tensors = clip_tensors(towers[0])
    tensors["text_model.encoder.layers.1.mlp.fc1.bias"] = torch.zeros(7)
    files["clip"] = str(save(tmp_path / "odd.safetensors", tensors))
    with pytest.raises(ConfigError, match=r"model\.clip=.*odd.safetensors.*layers\.1\.mlp\.fc1\.bias"):
        find_text(ModelConfig(**dict(files, t5=good)))


@pytest.mark.parametrize("text", ["{", "[]", '{"vocab_size": 3}', '{"hidden_size": "wide", "vocab_size": 514}'])
def test_a_broken_config_is_named(folder, tmp_path, text):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "text_encoder" / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.path=.*config\.json can't be used"):
        find_text(ModelConfig(path=str(copy)))


# ---- tokenizers


def test_tokenizers_are_found_where_people_have_them(folder, files, tmp_path, monkeypatch):
    del files["tokenizers"]
    with pytest.raises(ConfigError, match=r"no tokenizer for CLIP is on this machine.*srpo download tokenizers"):
        find_text(ModelConfig(**files))
    cache = tmp_path / "cache"
    for repository, source, below in (
        ("openai/clip-vit-large-patch14", "tokenizer", ""),
        ("black-forest-labs/FLUX.1-dev", "tokenizer_2", "tokenizer_2"),
    ):
        root = cache / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder / source, root / "snapshots" / "abc" / below)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = find_text(ModelConfig(**files))
    assert "clip-vit-large-patch14" in str(found.clip_tokenizer) and "FLUX.1-dev" in str(found.t5_tokenizer)
    comfyui = tmp_path / "ComfyUI"
    shutil.copytree(folder / "tokenizer", comfyui / "comfy" / "sd1_tokenizer")
    shutil.copytree(folder / "tokenizer_2", comfyui / "comfy" / "text_encoders" / "t5_tokenizer")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    found = find_text(ModelConfig(**files))
    assert found.clip_tokenizer == comfyui / "comfy" / "sd1_tokenizer"
    assert found.t5_tokenizer == comfyui / "comfy" / "text_encoders" / "t5_tokenizer"


def test_tokenizers_that_are_named_are_the_only_place(folder, files, tmp_path, monkeypatch):
    shutil.copytree(folder / "tokenizer", tmp_path / "ComfyUI" / "comfy" / "sd1_tokenizer")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    with pytest.raises(ConfigError, match=rf"(?s)Looked in:\n  {tmp_path}/empty/tokenizer$"):
        find_text(ModelConfig(**dict(files, tokenizers=str(tmp_path / "empty"))))


def test_tokenizers_in_each_others_places_are_named(folder, files, tmp_path):
    shutil.copytree(folder / "tokenizer_2", tmp_path / "both" / "tokenizer")
    shutil.copytree(folder / "tokenizer_2", tmp_path / "both" / "tokenizer_2")
    with pytest.raises(ConfigError, match=r"tokenizer is not CLIP's: it has 32 tokens.*has 514.*model\.tokenizers"):
        encoder(dict(files, tokenizers=str(tmp_path / "both")))(["a cat"])


def test_shapes_tell_the_configurations_of_the_real_towers(tmp_path):
    """CLIP-L and T5-XXL by their own shapes, on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
            "projection_dim": 768}  # fmt: skip
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}  # fmt: skip
    with torch.device("meta"):
        modules = CLIPTextModel(CLIPTextConfig(**clip)), T5EncoderModel(T5Config(**t5))
    for module, tensors, view, config, expected in (
        (modules[0], clip_tensors, flux_text.text_names.clip_view, flux_text.text_names.clip_config, clip),
        (modules[1], t5_tensors, flux_text.text_names.t5_view, flux_text.text_names.t5_config, t5),
    ):
        path = tmp_path / "header.safetensors"
        _sparse(path, {name: tuple(tensor.shape) for name, tensor in tensors(module).items()})
        found = config(view(open_tensors(path, "model.clip")))
        assert {name: found[name] for name in expected} == expected


def _sparse(path, shapes):
    """A file with the header of float16 tensors and a hole in place of them."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def test_ids_are_padded_and_cut_as_diffusers_does_it(folder, files):
    text_encoder = encoder(files)
    clip, t5 = text_encoder.tokenizers
    ids = text_encoder._ids(clip, ["ab", "a" * 500], 77)
    assert ids.shape == (2, 77)
    assert ids[0].tolist()[0] == 512 and ids[0].tolist()[3:] == [513] * 74
    assert ids[1].tolist()[0] == 512 and ids[1].tolist()[-1] == 513 and 513 not in ids[1].tolist()[:-1]
    ids = text_encoder._ids(t5, ["ab", "a" * 900], 512)
    assert ids[0].tolist()[-500:] == [0] * 500 and 1 in ids[0].tolist()
    assert ids[1].tolist()[-1] == 1 and 0 not in ids[1].tolist()
