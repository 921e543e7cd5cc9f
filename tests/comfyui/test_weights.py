"""Our weights in real ComfyUI: the files load through its own loaders and give what they give here.

ComfyUI runs in a process of its own (in_comfyui.py), so its modules meet none of ours. `pytest -rP` shows the errors.
"""

import random

import pytest
import torch
from comfyui_side import TOLERANCE, TRANSFORMER, comfyui, fresh_transformer, needs_comfyui, ours, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from srpo_core import cli
from srpo_core.checkpoint import latest, load_weights
from srpo_core.config import LoraConfig
from srpo_core.export import export_lora, export_run, export_vae
from srpo_core.lora import add_lora
from srpo_core.miniature.captions import random_scenes
from srpo_core.miniature.world import random_layout, random_looks, render
from srpo_core.models.flux import FluxFlow

pytestmark = needs_comfyui
RANK, ALPHA = 4, 10.0
TRAIN = (
    f"train miniature lora.rank={RANK} lora.alpha={ALPHA} optim.steps=2 optim.lr=0.01 optim.warmup_steps=0"
    " data.batch_size=2 rollout.num_steps=4 output.preview_every=0 output.evaluate_prompts=0 output.tensorboard=false"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, module) of a LoRA run of two real steps, with the weights that its exports hold."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main([*TRAIN.split(), f"output.dir={run_dir}"]) == 0
    module = fresh_transformer()
    load_weights(latest(run_dir), module)
    return run_dir, module


def test_the_transformer(tmp_path, question):
    theirs, report = comfyui(tmp_path / "job", {"transformer": TRANSFORMER}, question[1])
    assert report["latent_format"] == "Flux"
    error = relative_error(theirs["velocity"], ours(fresh_transformer(), question))
    print(f"relative error {error:.1e}")
    assert error < TOLERANCE


def test_an_exported_transformer(tmp_path, trained, question):
    run_dir, module = trained
    path = export_run(run_dir, tmp_path / "merged.safetensors", what="transformer")
    theirs, _ = comfyui(tmp_path / "job", {"transformer": path}, question[1])
    error = relative_error(theirs["velocity"], ours(module, question))
    print(f"relative error {error:.1e}")
    assert error < TOLERANCE


def check_lora(folder, path, module, question):
    """Relative error of the velocity under a LoRA file, and how much of it the LoRA changed.

    All of the file is in use.
    """
    theirs, report = comfyui(folder, {"transformer": TRANSFORMER, "lora": path}, question[1])
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    layers = {name.removesuffix(".alpha") for name in names if name.endswith(".alpha")}
    assert len(names) == 3 * len(layers)
    assert report["patches"] == len(layers)
    with_lora = ours(module, question)
    change = relative_error(ours(fresh_transformer(), question), with_lora)
    return relative_error(theirs["velocity"], with_lora), change


@pytest.mark.parametrize("group", ["attention", "mlp", "all"])
def test_a_random_lora(tmp_path, question, group):
    module, generator = fresh_transformer(), torch.Generator().manual_seed(1)
    targets = FluxFlow.lora_targets[group]
    names = add_lora(module, LoraConfig(rank=RANK, alpha=ALPHA, targets=group), targets, generator)
    with torch.no_grad():
        for name in names:
            if ".lora_B." in name:
                parameter = module.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    path = export_lora(dict(module.named_parameters()), ALPHA, tmp_path / "lora.safetensors", {})
    error, change = check_lora(tmp_path / "job", path, module, question)
    print(f"relative error {error:.1e} (the LoRA changed {change:.1e})")
    assert change > 0.1
    assert error < TOLERANCE


def test_a_trained_lora(tmp_path, trained, question):
    run_dir, module = trained
    path = export_run(run_dir)
    error, change = check_lora(tmp_path / "job", path, module, question)
    print(f"relative error {error:.1e} (the LoRA changed {change:.1e})")
    assert change > 0.01
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("no_such_layer.lora_A", 256, r"lora key not loaded: transformer\.no_such_layer"),
        ("transformer_blocks.0.attn.to_q.lora_A", 128, r"ERROR lora diffusion_model\.double_blocks\.0"),
    ],
)
def test_comfyui_complains_of_what_doesnt_fit(tmp_path, question, name, width, message):
    """The checks above count only if they can fail: on a layer that isn't there, on a layer of another width."""
    module = fresh_transformer()
    add_lora(module, LoraConfig(rank=RANK), FluxFlow.lora_targets["attention"])
    path = export_lora(dict(module.named_parameters()), ALPHA, tmp_path / "lora.safetensors", {})
    save_file({**load_file(path), f"transformer.{name}.weight": torch.zeros(RANK, width)}, path)
    with pytest.raises(AssertionError, match=message):
        comfyui(tmp_path / "job", {"transformer": TRANSFORMER, "lora": path}, question[1])


def test_the_autoencoder(tmp_path, parts):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    layout = random_layout(random_scenes(2, seed=4), rng)
    images = render(layout, random_looks(["Detail", "Oil"], rng), generator)[..., :96, :]
    with torch.no_grad():
        latents = parts.autoencoder.encode(images)
        decoded = parts.autoencoder.decode(latents)
    path = export_vae(parts.autoencoder, tmp_path / "vae.safetensors", {})
    theirs, report = comfyui(tmp_path / "job", {"vae": path}, {"latents": latents, "images": images})
    assert (report["dtype"], report["channels"]) == ("torch.float32", 16)
    picture = (theirs["decoded"] - decoded).abs().max().item()
    latent = relative_error(theirs["encoded"], latents)
    print(f"largest difference of a pixel {picture:.1e}, relative error of latents {latent:.1e}")
    assert decoded.std() > 0.1
    assert picture < 1e-5
    assert latent < TOLERANCE
