"""Exported weights: what other programs make of them is what was trained."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_flux import random_latents, random_prompts, tiny_pipeline, tiny_transformer, tiny_vae

from srpo_core import export
from srpo_core.config import ConfigError, LoraConfig
from srpo_core.export.vae import vae_comfyui_tensors
from srpo_core.lora import add_lora
from srpo_core.models.flux import FluxFlow, ImageAutoencoder

RANK, ALPHA = 4, 10.0
METADATA = {"srpo_run": '{"seed": 1}', "srpo_step": "3"}


def velocity(transformer):
    with torch.no_grad():
        return FluxFlow(transformer).velocity(random_latents(), torch.tensor([0.9, 0.7]), random_prompts(), 3.5)


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def trained_lora(group="all"):
    """A tiny transformer with a LoRA that does something."""
    module = tiny_transformer()
    config = LoraConfig(rank=RANK, alpha=ALPHA, targets=group)
    generator = torch.Generator().manual_seed(5)
    add_lora(module, config, FluxFlow.lora_targets[group], generator)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def exported_lora(module, path, **options):
    return export.export_lora(dict(module.named_parameters()), ALPHA, path, METADATA, **options)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# ---- LoRA files


@pytest.mark.parametrize("group", ["attention", "mlp", "all"])
def test_diffusers_gives_the_trained_velocity_from_a_lora_file(tmp_path, group):
    module = trained_lora(group)
    path = exported_lora(module, tmp_path / "lora.safetensors")
    pipeline = tiny_pipeline(transformer=tiny_transformer())
    untouched = velocity(pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert relative_error(velocity(pipeline.transformer), velocity(module)) < 1e-5
    assert relative_error(untouched, velocity(module)) > 1e-2


def test_lora_keys_are_those_that_comfyui_reads(tmp_path):
    module = trained_lora()
    tensors = load_file(exported_lora(module, tmp_path / "lora.safetensors"))
    plain = tiny_transformer().state_dict()
    layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    assert {f"{layer}{end}" for layer in layers for end in (".alpha", ".lora_A.weight", ".lora_B.weight")} == set(
        tensors
    )
    assert len(layers) > 10
    for layer in layers:
        weight = plain[layer.removeprefix("transformer.") + ".weight"]
        assert tensors[f"{layer}.lora_A.weight"].shape == (RANK, weight.shape[1])
        assert tensors[f"{layer}.lora_B.weight"].shape == (weight.shape[0], RANK)
        assert tensors[f"{layer}.alpha"].shape == ()
        assert float(tensors[f"{layer}.alpha"]) == ALPHA


def test_alpha_over_rank_scales_the_change(tmp_path):
    """weight + alpha / rank * B @ A, as a reader of the file works it out, is the trained transformer."""
    module = trained_lora()
    tensors = load_file(exported_lora(module, tmp_path / "lora.safetensors"))
    plain = tiny_transformer()
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith(".alpha")]:
            layer = key.removesuffix(".alpha")
            change = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
            plain.get_submodule(layer.removeprefix("transformer.")).weight += tensors[key] / RANK * change
    assert relative_error(velocity(plain), velocity(module)) < 1e-5


def test_a_lora_in_bfloat16_keeps_its_alpha(tmp_path):
    tensors = load_file(exported_lora(trained_lora(), tmp_path / "lora.safetensors", dtype="bfloat16"))
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".alpha")} == {torch.float32}


def test_weights_without_a_lora_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no LoRA"):
        exported_lora(tiny_transformer(), tmp_path / "lora.safetensors")


# ---- whole transformers


def test_a_transformer_reloads_bit_for_bit(tmp_path):
    module = tiny_transformer(seed=4)
    out = export.export_transformer(module, tmp_path / "trained", METADATA)
    again = FluxTransformer2DModel.from_pretrained(out)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in again.state_dict().items())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "FluxTransformer2DModel"
    for key, value in module.config.items():
        assert key.startswith("_") or json.dumps(again.config[key]) == json.dumps(value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_bfloat16_is_the_rounded_weights(tmp_path):
    module = tiny_transformer()
    out = export.export_transformer(module, tmp_path / "trained", METADATA, dtype="bfloat16")
    tensors = load_file(out / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in module.state_dict().items())


def test_a_merged_lora_equals_the_adapter_and_leaves_the_module_alone(tmp_path):
    module = trained_lora()
    before = copy.deepcopy(module.state_dict())
    merged = FluxTransformer2DModel.from_pretrained(export.export_transformer(module, tmp_path / "merged", METADATA))
    assert merged.state_dict().keys() == tiny_transformer().state_dict().keys()
    assert relative_error(velocity(merged), velocity(module)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_transformer_can_be_one_file(tmp_path):
    module = tiny_transformer()
    path = export.export_transformer(module, tmp_path / "deep" / "trained.safetensors", METADATA)
    tensors = load_file(path)
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in tensors.items())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_only_diffusers_models_become_folders(tmp_path):
    with pytest.raises(ConfigError, match="Linear is no diffusers model"):
        export.export_transformer(torch.nn.Linear(2, 2), tmp_path / "out", METADATA)


def test_the_description_travels_inside(tmp_path):
    folder = export.export_transformer(tiny_transformer(), tmp_path / "trained", METADATA)
    lora = exported_lora(trained_lora(), tmp_path / "lora.safetensors")
    for path in (folder / "diffusion_pytorch_model.safetensors", lora):
        assert METADATA.items() <= metadata(path).items()


# ---- autoencoders


def test_a_comfyui_vae_has_the_layout_that_comfyui_reads(tmp_path):
    """Names by position: ComfyUI's decoder has a clamp as layer 0 where ours clamps without a layer."""
    module = AutoencoderTiny(latent_channels=16)
    path = export.export_vae(ImageAutoencoder(module), tmp_path / "vae.safetensors", METADATA, dtype="bfloat16")
    tensors = load_file(path)
    assert torch.equal(tensors["taesd_encoder.0.weight"], module.encoder.layers[0].weight.bfloat16())
    assert torch.equal(tensors["taesd_decoder.1.weight"], module.decoder.layers[0].weight.bfloat16())
    assert torch.equal(tensors["taesd_decoder.3.conv.2.bias"], module.decoder.layers[2].conv[2].bias.bfloat16())
    assert len(tensors) == len(module.state_dict()) + 2
    assert tensors["vae_scale"].dtype == tensors["vae_shift"].dtype == torch.float32
    assert METADATA.items() <= metadata(path).items()


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.3611, 0.1159), (2.0, -0.5)])
def test_a_comfyui_vae_decodes_the_flow_models_latents(scale, shift):
    """Through ComfyUI's FLUX latents (x / 0.3611 + 0.1159) and its TAESD's (x - vae_shift) * vae_scale."""
    autoencoder = ImageAutoencoder(AutoencoderTiny(latent_channels=16, scaling_factor=scale))
    autoencoder.shift = shift
    tensors = vae_comfyui_tensors(autoencoder)
    latents = torch.linspace(-3, 3, 7)
    decoded = (latents / 0.3611 + 0.1159 - tensors["vae_shift"]) * tensors["vae_scale"]
    assert torch.allclose(decoded, latents / scale + shift, atol=1e-5)


def test_another_small_autoencoder_is_refused(tmp_path):
    module = AutoencoderTiny(latent_channels=16, num_decoder_blocks=(1, 1, 1, 1))
    with pytest.raises(ConfigError, match="only the TAESD layout"):
        export.export_vae(ImageAutoencoder(module), tmp_path / "vae.safetensors", METADATA)
    other = tiny_vae()
    other.register_to_config(scaling_factor=0.18)
    with pytest.raises(ConfigError, match=r"scale 0\.18 and shift 0\.1159, ComfyUI's have 0\.3611 and 0\.1159"):
        export.export_vae(ImageAutoencoder(other), tmp_path / "vae.safetensors", METADATA)
    with pytest.raises(ConfigError, match="only a transformer can be that, not a vae"):
        export.export_vae(ImageAutoencoder(tiny_vae()), tmp_path / "vae.safetensors", METADATA, dtype="scaled-fp8")
    assert list(tmp_path.iterdir()) == []


def test_flux_autoencoders_keep_their_names(tmp_path):
    """ComfyUI reads an AutoencoderKL under diffusers' names; a folder is diffusers' own."""
    module = tiny_vae()
    path = export.export_vae(ImageAutoencoder(module), tmp_path / "vae.safetensors", METADATA)
    folder = export.export_vae(ImageAutoencoder(module), tmp_path / "vae", METADATA, format="diffusers")
    again = AutoencoderKL.from_pretrained(folder)
    for tensors in (load_file(path), again.state_dict()):
        assert tensors.keys() == module.state_dict().keys()
        assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in tensors.items())
    assert (again.config.scaling_factor, again.config.shift_factor) == (0.3611, 0.1159)


# ---- places


def test_nothing_is_overwritten_unasked(tmp_path):
    module, lora = tiny_transformer(), trained_lora()
    folder = export.export_transformer(module, tmp_path / "trained", METADATA)
    path = exported_lora(lora, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="trained exists already"):
        export.export_transformer(module, folder, METADATA)
    with pytest.raises(ConfigError, match=r"lora\.safetensors exists already"):
        exported_lora(lora, path)
    export.export_transformer(tiny_transformer(seed=9), folder, {"srpo_step": "9"}, overwrite=True)
    exported_lora(lora, path, dtype="bfloat16", overwrite=True)
    assert metadata(folder / "diffusion_pytorch_model.safetensors")["srpo_step"] == "9"
    assert load_file(path)["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].dtype == torch.bfloat16
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora.safetensors", "trained"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds other files"):
        export.export_transformer(tiny_transformer(), tmp_path / "home", METADATA, overwrite=True)
    (tmp_path / "odd.safetensors").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        exported_lora(trained_lora(), tmp_path / "odd.safetensors", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text(encoding="utf-8") == "dear"
