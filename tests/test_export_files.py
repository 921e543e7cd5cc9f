"""Files made into others: written a tensor at a time, the same numbers under other names, LoRAs added."""

from __future__ import annotations

import errno
import json
import tempfile

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_weights import bytes_alive, random_tensors
from lora_files import named, random_pairs, save
from safetensors.torch import load_file
from small_flux import SHAPES, diffusers_tensors, kohya_lora, metadata, original_file, same

from srpo_core.config import ConfigError
from srpo_core.export import writer
from srpo_core.export.convert import convert
from srpo_core.lora import ChosenLora, merge_lora
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.lora_names import read_lora


@pytest.fixture
def original(tmp_path):
    return original_file(tmp_path / "original.safetensors")


def offsets(path):
    """(place, bytes of a number) of each tensor in a file."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    sizes = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    return [(entry["data_offsets"][0], sizes[entry["dtype"]]) for entry in header.values()]


# ---- formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_original_to_diffusers_and_back_is_bit_exact(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(SHAPES).items()}
    source = save(tmp_path / "original.safetensors", tensors)
    folder = convert(source, tmp_path / "folder")
    single = convert(folder, tmp_path / "single.safetensors")
    back = convert(single, tmp_path / "back.safetensors", format="comfyui")
    same(load_file(back), tensors)
    same(load_file(folder / writer.WEIGHTS), load_file(single))
    again = convert(convert(back, tmp_path / "b.safetensors"), tmp_path / "c.safetensors", format="comfyui")
    same(load_file(again), tensors)


def test_diffusers_loads_the_folder(tmp_path, original):
    folder = convert(original, tmp_path / "folder", dtype="bfloat16")
    module = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in diffusers_tensors(original).items()}
    same(module.state_dict(), expected)


def test_a_folder_keeps_its_configuration(tmp_path):
    """Heads of another width: no shape tells their axes, config.json does."""
    from tiny_flux import tiny_transformer

    tiny_transformer().save_pretrained(tmp_path / "in")
    folder = convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    module = FluxTransformer2DModel.from_pretrained(folder)
    assert tuple(module.config.axes_dims_rope) == (4, 6, 6)
    assert module.config.num_single_layers == 2


def test_a_transformer_is_taken_out_of_a_whole_checkpoint(tmp_path):
    tensors = random_tensors(SHAPES)
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    others = {"vae.decoder.conv_in.weight": torch.zeros(8, 16, 3, 3), "text_encoders.t5xxl.logit_scale": torch.ones(1)}
    path = save(tmp_path / "all.safetensors", inside | others)
    same(load_file(convert(path, tmp_path / "one.safetensors", format="comfyui")), tensors)


def test_scaled_fp8_holds_the_blocks_matrices_in_8_bits(tmp_path, original):
    """Stored * scale is within half a step of e4m3's 3 mantissa bits, or of its smallest step 2^-9."""
    path = convert(original, tmp_path / "fp8.safetensors", format="comfyui", dtype="scaled-fp8")
    stored, exact = load_file(path), load_file(original)
    matrices = {name for name in SHAPES if "_blocks." in name and name.endswith(".weight") and len(SHAPES[name]) == 2}
    assert stored["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert set(stored) == {"scaled_fp8", *SHAPES, *(name.replace(".weight", ".scale_weight") for name in matrices)}
    for name, tensor in exact.items():
        if name not in matrices:
            assert torch.equal(stored[name], tensor.bfloat16())
            continue
        scale = stored[name.replace(".weight", ".scale_weight")]
        assert stored[name].dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        error = (stored[name].float() * scale - tensor).abs()
        assert (error <= torch.maximum(tensor.abs() / 16, scale * 2**-10) * 1.0001).all()
        assert stored[name].float().abs().max() == 448
    assert all(offset % size == 0 for offset, size in offsets(path))
    read = diffusers_tensors(path)
    assert torch.equal(
        read["single_transformer_blocks.0.proj_out.weight"],
        stored["single_blocks.0.linear2.weight"].float() * stored["single_blocks.0.linear2.scale_weight"],
    )
    assert path.stat().st_size < 0.4 * original.stat().st_size


def test_a_source_in_8_bits_becomes_bfloat16_unless_asked(tmp_path, original):
    path = convert(original, tmp_path / "fp8.safetensors", format="comfyui", dtype="scaled-fp8")
    tensors = load_file(convert(path, tmp_path / "plain.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    same(tensors, {name: tensor.bfloat16() for name, tensor in diffusers_tensors(path).items()})
    assert {t.dtype for t in load_file(convert(path, tmp_path / "f.safetensors", dtype="float32")).values()} == {
        torch.float32
    }


def test_what_was_read_of_a_tensor_is_let_go(tmp_path, monkeypatch):
    """A conversion holds no more than the two largest modules of its file at any time."""
    source = original_file(tmp_path / "original.safetensors", double=3, single=4)
    peak = bytes_alive(monkeypatch)
    folder = convert(source, tmp_path / "folder")
    convert(folder, tmp_path / "back.safetensors", format="comfyui", dtype="scaled-fp8")
    largest = 4 * 7 * 128 * 128
    assert 0 < peak[0] <= 3 * largest


# ---- LoRAs


def merged_module(source, *loras):
    module = transformer_at(source, "").load(torch.float32, "cpu")
    for path, strength in loras:
        merge_lora(module, read_lora(path, ""), strength)
    return module.state_dict()


def test_loras_are_merged_with_their_strengths(tmp_path, original):
    first, second = kohya_lora(tmp_path / "a.safetensors"), kohya_lora(tmp_path / "b.safetensors", seed=2)
    chosen = [ChosenLora(first, 0.5), ChosenLora(second, -0.25)]
    path = convert(original, tmp_path / "merged.safetensors", merge=chosen)
    expected = merged_module(original, (first, 0.5), (second, -0.25))
    same(load_file(path), dict(expected))
    plain = diffusers_tensors(original)
    down, up = (load_file(first)[f"lora_unet_double_blocks_0_img_attn_proj.lora_{x}.weight"] for x in ("down", "up"))
    alpha = load_file(first)["lora_unet_double_blocks_0_img_attn_proj.alpha"]
    alone = convert(original, tmp_path / "one.safetensors", merge=[ChosenLora(first, 0.5)])
    name = "transformer_blocks.0.attn.to_out.0.weight"
    assert torch.allclose(load_file(alone)[name], plain[name] + 0.5 * alpha / len(down) * up @ down, atol=1e-4)
    assert metadata(path)["srpo_merged"] == "a.safetensors:0.5, b.safetensors:-0.25"
    again = convert(path, tmp_path / "again.safetensors", merge=[ChosenLora(first, 2)])
    assert metadata(again)["srpo_merged"] == "a.safetensors:0.5, b.safetensors:-0.25, a.safetensors:2"


def test_merging_rounds_once(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(SHAPES).items()}
    source, lora = save(tmp_path / "o.safetensors", tensors), kohya_lora(tmp_path / "a.safetensors")
    merged = load_file(convert(source, tmp_path / "m.safetensors", merge=[ChosenLora(lora)]))
    same(merged, {name: tensor.bfloat16() for name, tensor in merged_module(source, (lora, 1.0)).items()})


@pytest.mark.parametrize("style", ["kohya", "comfyui", "bare", "old-diffusers", "xlabs"])
def test_a_lora_file_becomes_one_for_diffusers_and_comfyui(tmp_path, style):
    pairs = random_pairs({"double_blocks.0.img_attn.qkv": (384, 128), "double_blocks.0.img_attn.proj": (128, 128)})
    if style == "xlabs":
        down, up, _ = pairs["double_blocks.0.img_attn.qkv"]
        at = "double_blocks.0.processor.qkv_lora1"
        tensors = {f"{at}.down.weight": down, f"{at}.up.weight": up}
    else:
        tensors = named(pairs, style)
    source = save(tmp_path / "source.safetensors", tensors)
    path = convert(source, tmp_path / "out.safetensors")
    ours, theirs = read_lora(path, "").layers, read_lora(source, "").layers
    assert ours.keys() == theirs.keys() and len(ours) in (3, 4)
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name][:2], theirs[name][:2], strict=True))
    assert all(ours[name].alpha == theirs[name].alpha for name in ours)
    assert all(name.startswith("transformer.transformer_blocks.0.attn.to_") for name in load_file(path))


# ---- what doesn't go


def test_a_place_that_cant_be_made_is_told_before_the_work(tmp_path, original, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: .*file can't be written to \(File exists\)"):
        convert(original, tmp_path / "file" / "x.safetensors")

    def read_only(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(ConfigError, match=r"--out: .* can't be written to \(Permission denied\)"):
        convert(original, tmp_path / "new" / "x.safetensors")
    assert not (tmp_path / "new").exists()


def test_bad_places_and_files_are_named(tmp_path, original):
    lora = kohya_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="is also read from"):
        convert(original, original, overwrite=True)
    with pytest.raises(ConfigError, match="is also read from"):
        convert(original, lora, merge=[ChosenLora(lora)], overwrite=True)
    folder = convert(original, tmp_path / "folder")
    with pytest.raises(ConfigError, match="is also read from"):
        convert(folder, folder, dtype="bfloat16", overwrite=True)
    with pytest.raises(ConfigError, match="is also read from"):
        convert(folder / writer.WEIGHTS, folder, dtype="bfloat16", overwrite=True)
    with pytest.raises(ConfigError, match="exists already"):
        convert(original, folder)
    with pytest.raises(ConfigError, match="is a LoRA; a LoRA is merged into a checkpoint"):
        convert(lora, tmp_path / "x.safetensors", merge=[ChosenLora(lora)])
    with pytest.raises(ConfigError, match=r"transformer.*not a LoRA"):
        convert(folder, tmp_path / "x.safetensors", merge=[ChosenLora(original)])
    with pytest.raises(ConfigError, match=r"SOURCE=.*no such folder or file"):
        convert(tmp_path / "none.safetensors", tmp_path / "x.safetensors")
    other = save(tmp_path / "o.safetensors", named(random_pairs({"single_blocks.0.linear2": (64, 320)}), "kohya"))
    with pytest.raises(ConfigError, match=r"changes a weight of \[64, 320\], this model's is \[128, 640\]"):
        convert(original, tmp_path / "x.safetensors", merge=[ChosenLora(other)])
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "scaled-fp8"}, "diffusers has no such format; .*--format comfyui"),
        ({"dtype": "int3", "format": "comfyui"}, "unknown dtype 'int3'"),
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"format": "comfyui", "out": "folder"}, r"one file: .*folder should end in \.safetensors"),
    ],
)
def test_combinations_that_dont_go_are_refused(tmp_path, original, options, message):
    out = tmp_path / options.pop("out", "x.safetensors")
    with pytest.raises(ConfigError, match=message):
        convert(original, out, **options)
    assert not out.exists()
