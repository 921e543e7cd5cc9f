"""FLUX transformers in files: both sets of names, fp8, what is read off shapes, against diffusers' own converter."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from flux_weights import DEV, TOY, header_only, original_shapes, random_tensors
from safetensors.torch import save_file

from srpo_core.config import ConfigError
from srpo_core.lora import linear_shapes as modules_linear_shapes
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.flux_names import (
    BLOCKS,
    REST,
    diffusers_modules,
    linear_shapes,
    original_module,
    rename,
    to_diffusers,
    to_original,
)
from srpo_core.weights.fp8 import dequantised, scaled_fp8
from srpo_core.weights.recognise import describe, recognise
from srpo_core.weights.tensors import WeightsError, open_tensors

SCHNELL = DEV | {"guidance": False}
PREFIX = "model.diffusion_model."
RELEASED = {  # transformer/config.json of FLUX.1-dev
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


def file_of(tensors, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def toy():
    return random_tensors(original_shapes(**TOY))


def equal(left, right):
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# ---- names


def test_renaming_is_diffusers_own_converter_on_every_name():
    """All 780 names of FLUX.1-dev; rows are as many as the released ones (the converter counts on it), columns few."""
    shapes = {name: (shape[0], *[2] * (len(shape) - 1)) for name, shape in original_shapes(**DEV).items()}
    assert len(shapes) == 780  # tensors in the released flux1-dev.safetensors
    tensors = random_tensors(shapes)
    ours = dict(rename(iter(tensors.items())))
    equal(ours, convert_flux_transformer_checkpoint_to_diffusers(dict(tensors)))


@pytest.mark.parametrize("settings, tensors", [(DEV, 780), (SCHNELL, 776)])
def test_full_size_shapes_fill_the_released_model_and_come_back(settings, tensors):
    shapes = original_shapes(**settings)
    assert len(shapes) == tensors
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours = dict(rename(iter(meta.items())))
    with torch.device("meta"):
        model = FluxTransformer2DModel(**RELEASED | {"guidance_embeds": settings["guidance"]})
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert sum(t.numel() for t in ours.values()) == (11_901_408_320 if settings["guidance"] else 11_891_178_560)
    assert {n: tuple(t.shape) for n, t in to_original(iter(ours.items()))} == shapes
    assert linear_shapes(shapes) == modules_linear_shapes(model)


def test_round_trips_are_exact_both_ways():
    tensors = toy()
    renamed = dict(rename(iter(tensors.items())))
    equal(dict(to_original(iter(renamed.items()))), tensors)
    backwards = dict(reversed(renamed.items()))  # parts of a stacked tensor may come in any order
    equal(dict(to_original(iter(backwards.items()))), tensors)


def test_the_table_of_modules_is_one_to_one():
    originals = [*REST, *(f"{blocks}.7.{name}" for blocks, (_, table) in BLOCKS.items() for name in table)]
    for module in originals:
        parts = diffusers_modules(module)
        assert [original_module(part) for part in parts] == [(module, i, len(parts)) for i in range(len(parts))]
    assert diffusers_modules("double_blocks.7.nothing") is None
    assert original_module("transformer_blocks.x.ff.net.2") is None


def test_strange_names_are_told():
    strange = iter({"double_blocks.0.img_attn.qkv.weight": torch.ones(7, 2), "ghost.weight": torch.ones(1)}.items())
    assert [name for name, _ in rename(strange)] == ["double_blocks.0.img_attn.qkv.weight", "ghost.weight"]
    with pytest.raises(ConfigError, match=r"ghost\.weight: a FLUX transformer has no such tensor"):
        list(to_original(iter({"ghost.weight": torch.ones(1)}.items())))
    with pytest.raises(ConfigError, match=r"lack parts of double_blocks\.0\.img_attn\.qkv\.weight"):
        list(to_original(iter({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}.items())))


# ---- files


def formats():
    """The same toy weights as people have them: name -> (tensors, metadata)."""
    tensors = toy()
    renamed = {name: tensor.clone() for name, tensor in rename(iter(tensors.items()))}
    prefixed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    return {
        "original": (tensors, None),
        "original with prefix": (prefixed, None),
        "original, norms named as ComfyUI does": (
            {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()},
            None,
        ),
        "diffusers": (renamed, {"format": "pt"}),
        "bf16": ({name: tensor.bfloat16() for name, tensor in tensors.items()}, None),
    }


@pytest.mark.parametrize("name", formats())
def test_every_format_gives_the_same_module(tmp_path, name):
    tensors, metadata = formats()[name]
    part = transformer_at(file_of(tensors, tmp_path / "x.safetensors", metadata), "model.transformer")
    equal(part.load(torch.float32, "cpu").state_dict(), dict(rename(iter(toy().items()))))
    assert {p.dtype for p in part.load(torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in part.load(torch.float32, "cpu").parameters())


def test_parts_of_stacked_tensors_have_memory_of_their_own(tmp_path):
    module = transformer_at(file_of(toy(), tmp_path / "x.safetensors"), "model.transformer").load(torch.float32, "cpu")
    for parameter in module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


def test_a_sharded_folder_with_its_config(tmp_path):
    module = transformer_at(file_of(toy(), tmp_path / "x.safetensors"), "model.transformer").load(torch.float32, "cpu")
    module.save_pretrained(tmp_path / "whole" / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "whole" / "transformer").glob("*.safetensors"))) > 1
    for path in (tmp_path / "whole", tmp_path / "whole" / "transformer"):
        part = transformer_at(path, "model.transformer")
        equal(part.load(torch.float32, "cpu").state_dict(), module.state_dict())
        assert json.loads(part.outline.to_json_string()) == json.loads(module.to_json_string())


@pytest.mark.parametrize("settings, name", [(DEV, "FLUX.1-dev"), (SCHNELL, "FLUX.1-schnell")])
@pytest.mark.parametrize("dtype, words", [("BF16", "bf16"), ("F8_E4M3", "fp8 (e4m3)"), ("F32", "fp32")])
def test_full_size_files_are_recognised_and_checked_by_their_headers(tmp_path, settings, name, dtype, words):
    path = header_only(tmp_path / "x.safetensors", original_shapes(**settings), dtype)
    part = transformer_at(path, "model.transformer")
    assert describe(part.contents) == f"{name} transformer, original names, {words}, 11.9 B parameters"
    expected = RELEASED | {"guidance_embeds": settings["guidance"], "axes_dims_rope": (16, 56, 56)}
    assert {key: part.outline.config[key] for key in expected} == expected
    assert all(parameter.is_meta for parameter in part.outline.parameters())


def test_the_size_is_read_off_the_shapes(tmp_path):
    other = {"width": 384, "double": 1, "single": 2, "text": 40, "pooled": 36, "channels": 16, "guidance": False}
    config = transformer_at(header_only(tmp_path / "x.safetensors", original_shapes(**other)), "x").outline.config
    assert (config.num_attention_heads, config.attention_head_dim) == (3, 128)
    assert (config.num_layers, config.num_single_layers) == (1, 2)
    assert (config.joint_attention_dim, config.pooled_projection_dim, config.in_channels) == (40, 36, 16)
    assert config.guidance_embeds is False


def test_another_head_width_needs_its_config(tmp_path):
    path = header_only(tmp_path / "x.safetensors", original_shapes(**TOY, head=64))
    with pytest.raises(WeightsError, match=r"heads of width 64, where FLUX models have 128.*config\.json"):
        transformer_at(path, "model.transformer")


# ---- fp8


def quantise(name, tensor):
    return tensor.ndim == 2 and "blocks." in name


def scaled_toy(form):
    """(what was stored times its scale, tensors, metadata) in ComfyUI's forms of scaled fp8, made here by hand."""
    meant, stored, layers = {}, {}, {}
    for name, tensor in toy().items():
        if not quantise(name, tensor):
            meant[name] = stored[name] = tensor
            continue
        layer, scale = name.removesuffix(".weight"), (tensor.abs().max() / 448).float()
        code = (tensor / scale).to(torch.float8_e4m3fn)
        meant[name], stored[name], layers[layer] = code.float() * scale, code, {"format": "float8_e4m3fn"}
        if form == "marker":
            stored |= {f"{layer}.scale_weight": scale.view(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.5)}
        if form == "described":
            text = json.dumps(layers[layer]).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if form == "marker":
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return meant, stored, metadata if form == "metadata" else None


@pytest.mark.parametrize("form", ["marker", "described", "metadata"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_fp8_stands_for_stored_times_scale(tmp_path, form, prefix):
    meant, stored, metadata = scaled_toy(form)
    path = file_of({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "x.safetensors", metadata)
    part = transformer_at(path, "model.transformer")
    assert part.contents.quantisation == "scaled fp8"
    assert "scaled fp8 (e4m3), " in describe(part.contents)
    equal(part.load(torch.float32, "cpu").state_dict(), dict(rename(iter(meant.items()))))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_under_both_names(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in toy().items()}
    meant = {name: tensor.float() for name, tensor in rename(iter(tensors.items()))}
    renamed = {name: tensor.clone() for name, tensor in rename(iter(tensors.items()))}
    for number, named in enumerate((tensors, renamed)):
        part = transformer_at(file_of(named, tmp_path / f"{number}.safetensors"), "model.transformer")
        assert part.contents.quantisation == "fp8"
        equal(part.load(torch.float32, "cpu").state_dict(), meant)


def test_scaled_fp8_under_diffusers_names(tmp_path):
    renamed = dict(rename(iter(toy().items())))
    name = "transformer_blocks.0.attn.to_q.weight"
    code = (renamed[name] / 0.25).to(torch.float8_e4m3fn)
    stored = renamed | {name: code, "transformer_blocks.0.attn.to_q.weight_scale": torch.tensor(0.25)}
    stored = {key: tensor.clone() for key, tensor in stored.items()}
    part = transformer_at(file_of(stored, tmp_path / "x.safetensors"), "model.transformer")
    assert torch.equal(part.load(torch.float32, "cpu").state_dict()[name], code.float() * 0.25)


def test_written_scaled_fp8_reads_back_within_its_step(tmp_path):
    tensors = toy()
    tensors["double_blocks.0.img_mlp.0.weight"] *= 0  # a layer of zeros has no scale of its own
    tensors["single_blocks.0.linear1.weight"] *= 1e6
    written = dict(scaled_fp8(iter(tensors.items()), quantise))
    assert written["scaled_fp8"].numel() == 2
    read = dict(dequantised(open_tensors(file_of(written, tmp_path / "x.safetensors"), "x")))
    assert sorted(read) == sorted(tensors)
    for name, tensor in tensors.items():
        if not quantise(name, tensor):
            assert torch.equal(read[name], tensor)
            continue
        floor = tensor.abs().max() / 448 * 2**-6  # below it, e4m3's steps stay as wide
        assert ((read[name] - tensor).abs() <= (2**-4 + 1e-6) * torch.maximum(tensor.abs(), floor)).all()


def test_conversions_run_on_meta_tensors(tmp_path):
    path = file_of(scaled_toy("marker")[1], tmp_path / "x.safetensors")
    outline = to_diffusers(open_tensors(path, "x").outline())
    names = {n: (t.shape, t.dtype) for n, t in scaled_fp8(to_original(outline), quantise)}
    real = {n: (t.shape, t.dtype) for n, t in scaled_fp8(to_original(to_diffusers(open_tensors(path, "x"))), quantise)}
    assert names == real


@pytest.mark.parametrize("format", ["nvfp4", "int8_tensorwise", "mxfp8"])
def test_other_quantisations_are_told(tmp_path, format):
    _, stored, _ = scaled_toy("marker")
    text = json.dumps({"format": format}).encode()
    stored["double_blocks.0.img_mlp.0.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = file_of(stored, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=rf"double_blocks\.0\.img_mlp\.0 is quantised as {format}; use .* fp8"):
        transformer_at(path, "model.transformer")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool])
def test_weights_are_floating_point_numbers(tmp_path, dtype):
    try:
        path = file_of(toy() | {"img_in.bias": torch.zeros(TOY["width"]).to(dtype)}, tmp_path / "x.safetensors")
    except KeyError:
        pytest.skip("this version of the library doesn't write it")
    with pytest.raises(WeightsError, match=r"img_in\.bias is quantised as \w+; use a file in bf16"):
        transformer_at(path, "model.transformer")


def test_damaged_descriptions_are_told(tmp_path):
    _, stored, _ = scaled_toy("marker")
    for number, damage in enumerate((b"{", b"[1]", b'{"format": []}', b"\xff")):
        stored["double_blocks.0.img_mlp.0.comfy_quant"] = torch.tensor(list(damage), dtype=torch.uint8)
        path = file_of(stored, tmp_path / f"{number}.safetensors")
        with pytest.raises(WeightsError):
            transformer_at(path, "model.transformer")
    path = file_of(toy(), tmp_path / "x.safetensors", {"_quantization_metadata": "{"})
    with pytest.raises(WeightsError, match="description of quantised layers is damaged"):
        transformer_at(path, "model.transformer")


# ---- what doesn't fit


def test_missing_unexpected_and_wrong_tensors_are_named_from_the_header(tmp_path):
    shapes = original_shapes(**TOY)
    lacking = {n: s for n, s in shapes.items() if not n.startswith("double_blocks.1.txt_mlp")}
    with pytest.raises(WeightsError) as error:
        transformer_at(header_only(tmp_path / "a.safetensors", lacking), "model.transformer")
    assert "4 missing (double_blocks.1.txt_mlp.0.weight, double_blocks.1.txt_mlp.0.bias" in str(error.value)
    wrong = shapes | {"double_blocks.1.img_mlp.0.weight": (8, 8), "extra.weight": (3,)}
    with pytest.raises(WeightsError) as error:
        transformer_at(header_only(tmp_path / "b.safetensors", wrong), "model.transformer")
    assert "1 of another shape (double_blocks.1.img_mlp.0.weight is (8, 8), not (1024, 256))" in str(error.value)
    assert "1 unexpected (extra.weight)" in str(error.value)


def test_a_config_of_another_size_is_told(tmp_path):
    module = transformer_at(file_of(toy(), tmp_path / "x.safetensors"), "model.transformer").load(torch.float32, "cpu")
    module.save_pretrained(tmp_path / "t")
    config = tmp_path / "t" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for change, words in (
        ({"num_layers": 3}, "missing"),
        ({"attention_head_dim": "many"}, "configuration can't be used"),
        ({"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel"),
    ):
        config.write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(WeightsError, match=words):
            transformer_at(tmp_path / "t", "model.transformer")
    config.write_text("{}", encoding="utf-8")
    assert transformer_at(tmp_path / "t", "model.transformer").outline.config.num_layers == TOY["double"]
    config.write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"config\.json can't be read"):
        transformer_at(tmp_path / "t", "model.transformer")


def test_a_file_is_recognised_by_its_names_not_its_own(tmp_path):
    shapes = original_shapes(**TOY)
    assert recognise(open_tensors(header_only(tmp_path / "ae.safetensors", shapes), "x")).part == "transformer"
