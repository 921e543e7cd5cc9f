"""Every form that `srpo export` writes, in real ComfyUI, and what ComfyUI saves, here."""

import pytest
import torch
from comfyui_side import TOLERANCE, TRANSFORMER, comfyui, fresh_transformer, needs_comfyui, ours, relative_error
from diffusers import AutoencoderKL
from lora_files import named, random_pairs, save
from safetensors.torch import load_file

from srpo_core.export import export_vae
from srpo_core.export.convert import convert, extract_lora
from srpo_core.lora import ChosenLora, linear_shapes, merge_lora
from srpo_core.models.flux import ImageAutoencoder
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.flux_names import original_module
from srpo_core.weights.lora_names import read_lora

pytestmark = needs_comfyui
RANK = 4


def loaded(path):
    """The transformer of a file, dequantised into float32."""
    return transformer_at(path, "").load(torch.float32, "cpu")


def lora_pairs(style, seed=1):
    """A LoRA of all layers of the miniature, by the names of a style."""
    layers = linear_shapes(fresh_transformer())
    if style not in ("peft", "onetrainer"):
        shapes, layers = layers, {}
        for name, (rows, columns) in shapes.items():
            source, _, _ = original_module(name)
            layers[source] = (layers.get(source, (0, 0))[0] + rows, columns)
    return {n: (d, 0.05 * u, 2 + i % 5) for i, (n, (d, u, _)) in enumerate(random_pairs(layers, RANK, seed).items())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
def test_formats_and_dtypes(tmp_path, question, format, dtype):
    path = convert(TRANSFORMER.parent, tmp_path / "out.safetensors", format, dtype)
    theirs, report = comfyui(tmp_path / "job", {"transformer": path}, question[1])
    assert report["latent_format"] == "Flux"
    error = relative_error(theirs["velocity"], ours(loaded(path), question))
    print(f"{format} {dtype}: relative error {error:.1e}")
    assert error < TOLERANCE


def test_scaled_fp8(tmp_path, question):
    """ComfyUI takes it for a quantised model, and gives what the dequantised weights give here."""
    path = convert(TRANSFORMER.parent, tmp_path / "fp8.safetensors", "comfyui", "scaled-fp8")
    theirs, report = comfyui(tmp_path / "job", {"transformer": path}, question[1])
    assert any("quantization metadata" in message for _, message in report["logged"])
    error = relative_error(theirs["velocity"], ours(loaded(path), question))
    loss = relative_error(ours(loaded(path), question), ours(fresh_transformer(), question))
    print(f"scaled fp8: relative error {error:.1e}; off the exact weights by {loss:.1e}")
    assert error < TOLERANCE
    assert 1e-4 < loss < 0.1


@pytest.mark.parametrize("style", ["kohya", "comfyui", "comfyui-down", "peft", "onetrainer"])
def test_lora_layouts_mean_the_same_here_and_there(tmp_path, question, style):
    tensors = named(lora_pairs(style), style)
    path = save(tmp_path / "lora.safetensors", tensors)
    module = fresh_transformer()
    merge_lora(module, read_lora(path, ""))
    theirs, report = comfyui(tmp_path / "job", {"transformer": TRANSFORMER, "lora": path}, question[1])
    error = relative_error(theirs["velocity"], ours(module, question))
    change = relative_error(ours(fresh_transformer(), question), ours(module, question))
    print(f"{style}: relative error {error:.1e} (the LoRA changed {change:.1e})")
    assert report["patches"] == len(tensors) // 3
    assert change > 0.1
    assert error < TOLERANCE


def test_a_converted_lora_is_the_same_lora(tmp_path, question):
    source = save(tmp_path / "kohya.safetensors", named(lora_pairs("kohya"), "kohya"))
    path = convert(source, tmp_path / "lora.safetensors")
    answers = [
        comfyui(tmp_path / name, {"transformer": TRANSFORMER, "lora": lora}, question[1])[0]["velocity"]
        for name, lora in (("one", source), ("two", path))
    ]
    assert relative_error(*answers) < TOLERANCE


def test_merged_and_extracted(tmp_path, question):
    """ComfyUI with the base and the extracted LoRA, and with the merged file: the same picture."""
    lora = save(tmp_path / "lora.safetensors", named(lora_pairs("kohya"), "kohya"))
    merged = convert(TRANSFORMER.parent, tmp_path / "merged.safetensors", "comfyui", "float32", [ChosenLora(lora, 0.8)])
    extracted, errors = extract_lora(merged, TRANSFORMER.parent, RANK, tmp_path / "extracted.safetensors")
    assert max(errors.relative().values()) < 1e-5
    one, _ = comfyui(tmp_path / "one", {"transformer": merged}, question[1])
    two, _ = comfyui(tmp_path / "two", {"transformer": TRANSFORMER, "lora": extracted}, question[1])
    expected = ours(loaded(merged), question)
    errors = relative_error(one["velocity"], expected), relative_error(two["velocity"], expected)
    print(f"relative errors: merged {errors[0]:.1e}, extracted {errors[1]:.1e}")
    assert max(errors) < 3 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "scaled-fp8"])
def test_what_comfyui_saves_is_read_here(tmp_path, question, dtype):
    """ModelSave's file: a prefix before the original names, and for scaled fp8 its newer form of scales."""
    path = convert(TRANSFORMER.parent, tmp_path / "out.safetensors", "comfyui", dtype)
    saved = tmp_path / "saved.safetensors"
    comfyui(tmp_path / "job", {"transformer": path, "saved": saved}, question[1])
    names = load_file(saved).keys()
    assert all(name.startswith("model.diffusion_model.") for name in names)
    assert any(name.endswith(".weight_scale") for name in names) == (dtype == "scaled-fp8")
    ours_again, before = dict(transformer_at(saved, "").stream()), dict(transformer_at(path, "").stream())
    assert ours_again.keys() == before.keys()
    assert all(torch.equal(ours_again[name].float(), before[name].float()) for name in before)
    if dtype == "float32":
        back = load_file(convert(saved, tmp_path / "back.safetensors", "comfyui"))
        assert all(torch.equal(tensor, back[name]) for name, tensor in load_file(path).items())


def test_a_flux_autoencoder(tmp_path):
    """FLUX's own AutoencoderKL at full size with random weights, under diffusers' names."""
    torch.manual_seed(0)
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    autoencoder = ImageAutoencoder(module, recompute=False)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = autoencoder.encode(images)
        decoded = autoencoder.decode(latents)
    path = export_vae(autoencoder, tmp_path / "vae.safetensors", {})
    theirs, report = comfyui(tmp_path / "job", {"vae": path}, {"latents": latents, "images": images})
    assert report["channels"] == 16
    print(f"largest difference of a pixel {(theirs['decoded'] - decoded).abs().max():.1e}")
    assert decoded.std() > 0.01
    assert (theirs["decoded"] - decoded).abs().max() < 1e-4
