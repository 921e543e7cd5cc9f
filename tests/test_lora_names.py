"""LoRA files as people have them: every naming is the same change of the same weights, anything else is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from lora_files import RANK, named, original_layers, random_pairs, save

from srpo_core.config import ConfigError
from srpo_core.weights.flux_names import rename
from srpo_core.weights.lora_names import Lora, check_lora, read_lora
from srpo_core.weights.recognise import recognise
from srpo_core.weights.tensors import open_tensors


def changes(lora):
    return {name: layer.change() for name, layer in lora.layers.items()}


def expected_changes(pairs):
    """What the pairs add to the original network's weights, worked out there and then renamed as weights are."""
    stream = ((f"{layer}.weight", alpha / len(down) * up @ down) for layer, (down, up, alpha) in pairs.items())
    return {name.removesuffix(".weight"): change for name, change in rename(stream)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, change in ours.items():
        assert torch.allclose(change, theirs[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("style", ["kohya", "comfyui", "comfyui-down", "bare", "peft", "peft-adapter", "old-diffusers"])
def test_original_layers_become_diffusers_layers(tmp_path, style):
    pairs = random_pairs(original_layers())
    lora = read_lora(save(tmp_path / "lora.safetensors", named(pairs, style)), "--lora")
    assert_same(changes(lora), expected_changes(pairs))
    assert len(lora.layers) == 30 and lora.notes == ()


@pytest.mark.parametrize("style", ["peft", "peft-adapter", "old-diffusers", "onetrainer"])
def test_diffusers_layers_stay_what_they_are(tmp_path, style):
    shapes = {name: tuple(change.shape) for name, change in expected_changes(random_pairs(original_layers())).items()}
    pairs = random_pairs(shapes)
    lora = read_lora(save(tmp_path / "lora.safetensors", named(pairs, style)), "--lora")
    assert_same(changes(lora), {name: alpha / RANK * up @ down for name, (down, up, alpha) in pairs.items()})


def test_a_missing_alpha_is_the_rank(tmp_path):
    pairs = random_pairs(original_layers())
    lora = read_lora(save(tmp_path / "lora.safetensors", named(pairs, "kohya", alpha=False)), "--lora")
    assert {layer.alpha for layer in lora.layers.values()} == {float(RANK)}


def test_parts_of_a_stacked_layer_share_its_rank_and_alpha(tmp_path):
    down, up, alpha = pair = random_pairs({"l": (7 * 8, 8)})["l"]
    path = save(tmp_path / "lora.safetensors", named({"single_blocks.11.linear1": pair}, "comfyui"))
    layers = read_lora(path, "--lora").layers
    assert list(layers) == [
        f"single_transformer_blocks.11.{p}" for p in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert all(torch.equal(layer.down, down) and layer.alpha == alpha for layer in layers.values())
    assert torch.equal(torch.cat([layer.up for layer in layers.values()]), up)


def test_the_output_norm_swaps_its_halves(tmp_path):
    """The original computes shift, scale = chunk(2); diffusers scale, shift."""
    down, up, _ = pair = random_pairs({"l": (16, 8)})["l"]
    path = save(tmp_path / "lora.safetensors", named({"final_layer.adaLN_modulation.1": pair}, "kohya"))
    layer = read_lora(path, "--lora").layers["norm_out.linear"]
    assert torch.equal(layer.up, torch.cat([up[8:], up[:8]])) and torch.equal(layer.down, down)


def test_xlabs_names(tmp_path):
    qkv, proj, single = random_pairs({"a": (24, 8), "b": (8, 8), "c": (24, 8)}).values()
    tensors = {}
    for name, (down, up, _) in {
        "double_blocks.2.processor.qkv_lora2": qkv,
        "double_blocks.2.processor.proj_lora1": proj,
        "single_blocks.5.processor.qkv_lora": single,
    }.items():
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    layers = read_lora(save(tmp_path / "lora.safetensors", tensors), "--lora").layers
    assert set(layers) == {
        *(f"transformer_blocks.2.attn.add_{x}_proj" for x in "qkv"), "transformer_blocks.2.attn.to_out.0",
        *(f"single_transformer_blocks.5.attn.to_{x}" for x in "qkv"),
    }  # fmt: skip
    assert torch.equal(layers["single_transformer_blocks.5.attn.to_k"].up, single[1][8:16])


@pytest.mark.parametrize("style", ["kohya", "comfyui-down"])
def test_diffusers_reads_the_same_changes(tmp_path, style):
    """Against `FluxPipeline.lora_state_dict`: at FLUX's widths, which it takes for granted, and inside blocks: around

    them it drops an alpha, and older versions know no LoRA there.
    """
    layers = original_layers(width=3072, text=4096, pooled=768, patch=64)
    pairs = random_pairs({layer: shape for layer, shape in layers.items() if "_blocks." in layer}, rank=2)
    path = save(tmp_path / "lora.safetensors", named(pairs, style))
    theirs = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=path.name)
    ours = read_lora(path, "--lora").layers
    names = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): name for name in theirs if "lora_A" in name
    }
    assert names.keys() == ours.keys()
    generator = torch.Generator().manual_seed(9)
    for layer, name in names.items():
        probe = torch.randn(ours[layer].down.shape[1], generator=generator).double()
        their_change = theirs[name.replace("lora_A", "lora_B")].double() @ (theirs[name].double() @ probe)
        our_change = ours[layer].alpha / 2 * (ours[layer].up.double() @ (ours[layer].down.double() @ probe))
        assert torch.allclose(our_change, their_change, rtol=1e-4, atol=1e-3), layer


def test_what_diffusers_writes_in_the_metadata_sets_alpha(tmp_path):
    """alpha, a layer's own alpha and rslora's scale alpha / sqrt(rank), where no tensor says otherwise."""
    pairs = random_pairs({f"transformer_blocks.0.attn.to_{x}": (8, 8) for x in "qkv"})
    tensors = named(pairs, "peft", alpha=False)
    said = {"transformer.lora_alpha": 6, "transformer.r": RANK, "transformer.alpha_pattern": {"attn.to_k": 12}}
    path = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    alphas = {name[-1]: layer.alpha for name, layer in read_lora(path, "").layers.items()}
    assert alphas == {"q": 6, "k": 12, "v": 6}
    said["transformer.use_rslora"] = True
    path = save(tmp_path / "b.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    layer = read_lora(path, "").layers["transformer_blocks.0.attn.to_q"]
    assert layer.alpha / layer.rank == pytest.approx(6 / math.sqrt(RANK))


def test_what_peft_writes_beside_its_file_sets_alpha(tmp_path):
    pairs = random_pairs({"transformer_blocks.0.attn.to_q": (8, 8)})
    save(tmp_path / "adapter_model.safetensors", named(pairs, "peft-adapter", alpha=False))
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert read_lora(path, "").layers["transformer_blocks.0.attn.to_q"].alpha == 4 * RANK
    settings.write_text('{"lora_alpha": [1]}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"adapter_config\.json can't be understood"):
        read_lora(tmp_path, "")


def test_the_first_diffusers_names(tmp_path):
    pair = {"down": torch.ones(2, 8), "up": torch.ones(8, 2)}
    name = "transformer.transformer_blocks.0.attn.to_q.lora_linear_layer"
    path = save(tmp_path / "old.safetensors", {f"{name}.{side}.weight": tensor for side, tensor in pair.items()})
    assert list(read_lora(path, "").layers) == ["transformer_blocks.0.attn.to_q"]
    assert recognise(open_tensors(path, "")).part == "lora"


def test_text_encoders_are_left_out_with_a_note(tmp_path):
    pairs = random_pairs({"double_blocks.0.img_attn.proj": (8, 8)})
    tensors = named(pairs, "kohya")
    for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc2"):
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    lora = read_lora(save(tmp_path / "lora.safetensors", tensors), "--lora")
    assert list(lora.layers) == ["transformer_blocks.0.attn.to_out.0"]
    assert "4 tensors for text encoders are left out" in lora.notes[0]


def test_the_models_shapes_are_checked(tmp_path):
    pairs = random_pairs({"transformer_blocks.0.attn.to_q": (8, 6)})
    lora = read_lora(save(tmp_path / "lora.safetensors", named(pairs, "peft")), "model.lora")
    check_lora(lora, {"transformer_blocks.0.attn.to_q": (8, 6), "proj_out": (2, 2)})
    with pytest.raises(ConfigError, match=r"model\.lora=.*to_q changes a weight of \[8, 6\], this model's is \[8, 8\]"):
        check_lora(lora, {"transformer_blocks.0.attn.to_q": (8, 8)})
    with pytest.raises(ConfigError, match=r"no linear layer transformer_blocks\.0\.attn\.to_q"):
        check_lora(lora, {"proj_out": (8, 6)})


LAYER = "transformer.transformer_blocks.0.attn.to_q"
DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
GOOD = {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.lokr_w1": DOWN, "lora_unet_x.lokr_w2": UP}, "LoKr adapter"),
        ({"lora_unet_x.hada_w1_a": DOWN, "lora_unet_x.hada_w1_b": UP}, "LoHa adapter"),
        ({**GOOD, f"{LAYER}.dora_scale": torch.ones(8, 1)}, "DoRA adapter"),
        ({**GOOD, f"{LAYER}.lora_magnitude_vector": torch.ones(8)}, "DoRA adapter"),
        ({**GOOD, f"{LAYER}.diff_b": torch.ones(8)}, "changes more than a LoRA can hold"),
        ({**GOOD, f"{LAYER}.lora_B.bias": torch.ones(8)}, "changes more than a LoRA can hold"),
        ({f"{LAYER}.lora_A.weight": DOWN}, "lacks the matrix `up`"),
        ({**GOOD, f"{LAYER}.lora_B.weight": torch.ones(8, 3)}, r"matrices of \[2, 8\] and \[8, 3\]"),
        ({**GOOD, f"{LAYER}.lora_down.weight": DOWN}, "are the same part"),
        ({**GOOD, f"{LAYER}.alpha": torch.ones(2)}, "no single finite number"),
        ({**GOOD, f"{LAYER}.alpha": torch.tensor(math.nan)}, "no single finite number"),
        ({**GOOD, f"{LAYER}.lora_A.weight": DOWN * math.inf}, "infinite numbers or NaN"),
        ({**GOOD, f"{LAYER}.lora_A.weight": DOWN.long()}, "stored as I64"),
        ({**GOOD, f"{LAYER}.lora_A.weight": torch.ones(2, 8, 3, 3)}, "instead of a matrix"),
        ({**GOOD, f"{LAYER}.bias": torch.ones(8)}, "no part of a LoRA"),
        ({"lora_unet_down_blocks_0_to_q.lora_down.weight": DOWN, "lora_unet_down_blocks_0_to_q.lora_up.weight": UP},
         "none of a FLUX transformer's"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": DOWN,
          "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": UP}, r"\[8, 8\], which is no 3 layers"),
        ({"text_encoder.a.lora_A.weight": DOWN, "text_encoder.a.lora_B.weight": UP}, "only for text encoders"),
        ({"a.weight": DOWN}, "is not a LoRA"),
        ({"x_embedder.weight": DOWN, "time_text_embed.text_embedder.linear_1.weight": DOWN,
          "single_transformer_blocks.0.proj_mlp.weight": DOWN}, "transformer.*not a LoRA"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(tmp_path, tensors, message):
    path = save(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ConfigError, match=message) as error:
        read_lora(path, "model.lora")
    assert f"model.lora={str(path)!r}" in str(error.value)


def test_changes_that_are_zero_are_no_obstacle(tmp_path):
    path = save(tmp_path / "lora.safetensors", {**GOOD, f"{LAYER}.diff_b": torch.zeros(8)})
    assert list(read_lora(path, "").layers) == ["transformer_blocks.0.attn.to_q"]


PIECES = st.sampled_from(
    ["transformer.", "diffusion_model.", "lora_unet_", "double_blocks.0.", "double_blocks_0_", "single_blocks_1_",
     "img_attn.qkv", "img_attn_qkv", "linear1", "final_layer_linear", "processor.", "qkv_lora1", "attn.to_q", "x",
     ".lora_A", ".lora_B", ".lora_down", ".lora_up", ".lora.down", ".default", ".weight", ".alpha", ".diff", ".bias",
     "lora_te1_", "text_encoder.", "_lora", ".", ""]
)  # fmt: skip
NAMES = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(bool) | st.text(min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 6), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=6))
def test_any_tensors_are_a_lora_or_a_config_error(tmp_path, tensors):
    try:
        path = save(tmp_path / "fuzz.safetensors", {name: torch.ones(s).to(d) for name, (s, d) in tensors.items()})
    except KeyError:
        reject()  # older versions of the library write no complex numbers
    try:
        lora = read_lora(path, "--lora")
    except ConfigError as error:
        assert "--lora=" in str(error)
    else:
        assert isinstance(lora, Lora) and lora.layers
        for layer in lora.layers.values():
            assert layer.up.shape[1] == layer.down.shape[0] == layer.rank > 0
            assert math.isfinite(layer.alpha)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=4))
def test_any_pairs_are_a_lora_of_their_shapes_or_a_config_error(tmp_path, layers):
    pairs = random_pairs({name: (rows, columns) for name, rows, columns, _ in layers}, rank=layers[0][3])
    path = save(tmp_path / "fuzz.safetensors", named(pairs, "comfyui"))
    try:
        lora = read_lora(path, "--lora")
    except ConfigError:
        return
    assert {layer.rank for layer in lora.layers.values()} == {layers[0][3]}
