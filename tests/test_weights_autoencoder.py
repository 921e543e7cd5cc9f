"""Autoencoders in files: all sets of names, against diffusers' own converter and the released model's shape."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from flux_weights import header_only, original_vae_shapes, random_tensors
from safetensors.torch import save_file
from tiny_flux import tiny_taesd, tiny_vae

from srpo_core.export import export_vae
from srpo_core.models.flux import ImageAutoencoder
from srpo_core.models.flux_files import autoencoder_at
from srpo_core.weights.recognise import describe
from srpo_core.weights.tensors import WeightsError

WIDTHS = (32, 64, 64, 96)
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
RELEASED = {  # vae/config.json of FLUX.1-dev
    "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "force_upcast": True, "act_fn": "silu",
}  # fmt: skip


def toy():
    return random_tensors(original_vae_shapes(WIDTHS))


def load(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return autoencoder_at(path, "model.autoencoder").load(torch.float32, "cpu")


def equal(module, expected):
    found = module.state_dict()
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_original_names_become_what_diffusers_makes_of_them(tmp_path, prefix):
    tensors = toy()
    module = load({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "ae.safetensors")
    assert isinstance(module, AutoencoderKL)
    equal(module, convert_ldm_vae_checkpoint(dict(tensors), BLOCKS))


def test_diffusers_names_in_a_file_and_in_a_folder(tmp_path):
    tensors = convert_ldm_vae_checkpoint(toy(), BLOCKS)
    module = load(tensors, tmp_path / "x.safetensors")
    equal(module, tensors)
    module.save_pretrained(tmp_path / "whole" / "vae")
    for path in (tmp_path / "whole", tmp_path / "whole" / "vae"):
        equal(autoencoder_at(path, "model.autoencoder").load(torch.float32, "cpu"), tensors)


def test_the_released_file_is_known_by_its_header(tmp_path):
    shapes = original_vae_shapes()
    assert len(shapes) == 244  # tensors in the released ae.safetensors
    part = autoencoder_at(header_only(tmp_path / "ae.safetensors", shapes, "F32"), "model.autoencoder")
    config = part.outline.config
    assert {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in RELEASED} == RELEASED
    words = describe(part.contents)
    assert words == "autoencoder with 16 latent channels, original names, fp32, 83.8 M parameters"


def test_a_folders_config_wins(tmp_path):
    """Four groups in its norms, two levels: no shape tells the first."""
    tiny_vae().save_pretrained(tmp_path)
    part = autoencoder_at(tmp_path, "model.autoencoder")
    assert part.outline.config.norm_num_groups == 4
    equal(part.load(torch.float32, "cpu"), tiny_vae().state_dict())
    assert {p.dtype for p in part.load(torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}


# ---- the tiny one


def full_taesd(scale=1.0, shift=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoencoderTiny(latent_channels=16, scaling_factor=scale, shift_factor=shift)


def test_tiny_autoencoders_in_files_and_folders(tmp_path):
    module = full_taesd()
    loaded = load(module.state_dict(), tmp_path / "taef1.safetensors")
    equal(loaded, module.state_dict())
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.0, 0.0)
    tiny_taesd().save_pretrained(tmp_path / "folder")
    equal(autoencoder_at(tmp_path / "folder", "x").load(torch.float32, "cpu"), tiny_taesd().state_dict())


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.7, 0.2)])
def test_comfyuis_names_come_back_from_our_export_with_scale_and_shift(tmp_path, scale, shift):
    module = full_taesd(scale, shift)
    export_vae(ImageAutoencoder(module), tmp_path / "taesd.safetensors", {})
    part = autoencoder_at(tmp_path / "taesd.safetensors", "model.autoencoder")
    assert part.contents.layout == "taesd"
    back = part.load(torch.float32, "cpu")
    equal(back, module.state_dict())
    assert back.config.scaling_factor == pytest.approx(scale, rel=1e-6)
    assert back.config.shift_factor == pytest.approx(shift, abs=1e-6)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ImageAutoencoder(back).encode(images), ImageAutoencoder(module).encode(images))


def test_comfyuis_names_without_scale_mean_fluxs_own_latents(tmp_path):
    module = full_taesd()
    export_vae(ImageAutoencoder(module), tmp_path / "taesd.safetensors", {})
    from safetensors.torch import load_file

    tensors = {n: t for n, t in load_file(tmp_path / "taesd.safetensors").items() if not n.startswith("vae_")}
    loaded = load(tensors, tmp_path / "plain.safetensors")
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.0, 0.0)


# ---- what doesn't fit


def test_incomplete_and_wrong_autoencoders_are_told(tmp_path):
    shapes = original_vae_shapes(WIDTHS)
    lacking = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.down.2.block.1")}
    with pytest.raises(WeightsError, match=r"8 missing \(encoder\.down_blocks\.2\.resnets\.1\.norm1\.weight"):
        autoencoder_at(header_only(tmp_path / "a.safetensors", lacking), "model.autoencoder")
    decoder = {name: shape for name, shape in shapes.items() if name.startswith("decoder.")}
    with pytest.raises(WeightsError, match="is no whole autoencoder"):
        autoencoder_at(header_only(tmp_path / "b.safetensors", decoder), "model.autoencoder")
    with pytest.raises(WeightsError, match=r"is not an autoencoder: it looks like the autoencoder of FLUX\.2"):
        path = header_only(tmp_path / "c.safetensors", shapes | {"bn.running_mean": (128,)})
        autoencoder_at(path, "model.autoencoder")
