"""Files in ComfyUI's formats, read here and by real ComfyUI: both must make the same model of them.

ComfyUI runs in a process of its own (in_comfyui.py). `pytest -rP` shows the errors.
"""

import json

import pytest
import torch
from comfyui_side import ask, needs_comfyui
from flux_weights import TOY, original_shapes, original_vae_shapes, random_tensors
from safetensors.torch import load_file, save_file
from test_weights_flux import PREFIX, scaled_toy, toy

from srpo_core.interfaces import PromptBatch
from srpo_core.models.flux import FluxFlow, ImageAutoencoder
from srpo_core.models.flux_files import autoencoder_at, transformer_at

pytestmark = needs_comfyui
SCHNELL = original_shapes(**TOY | {"guidance": False})


def in_comfyui(folder, job, inputs):
    (folder / "job.json").write_text(json.dumps({name: str(path) for name, path in job.items()}), encoding="utf-8")
    save_file(inputs, folder / "inputs.safetensors")
    ask("in_comfyui.py", folder)
    return load_file(folder / "outputs.safetensors")


def error_of(ours, theirs):
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"relative error {error:.1e}")
    return error


def fp8(tensors):
    return {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.bfloat16() for n, t in tensors.items()}


FORMATS = {
    "original": lambda: (toy(), None),
    "original without guidance": lambda: (random_tensors(SCHNELL), None),
    "original with prefix": lambda: ({PREFIX + name: tensor for name, tensor in toy().items()}, None),
    "plain fp8": lambda: (fp8(toy()), None),
    "scaled fp8, marker": lambda: scaled_toy("marker")[1:],
    "scaled fp8, described": lambda: scaled_toy("described")[1:],
    "scaled fp8, metadata": lambda: scaled_toy("metadata")[1:],
}


@pytest.mark.parametrize("name", FORMATS)
def test_transformers(tmp_path, name):
    tensors, metadata = FORMATS[name]()
    path = tmp_path / "flux.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(2, 16, 4, 6, generator=generator),
        "sigma": torch.tensor([0.9, 0.4]),
        "guidance": torch.tensor(3.0),
        "prompt_embeds": torch.randn(2, 5, TOY["text"], generator=generator),
        "pooled_prompt_embeds": torch.randn(2, TOY["pooled"], generator=generator),
    }
    theirs = in_comfyui(tmp_path, {"transformer": path}, inputs)["velocity"]
    flow = FluxFlow(transformer_at(path, "model.transformer").load(torch.float32, "cpu"))
    embeds = {name: inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with torch.no_grad():
        ours = flow.velocity(inputs["latents"], inputs["sigma"], PromptBatch(("a", "b"), embeds), 3.0)
    assert error_of(ours, theirs) < 1e-5


def test_the_full_autoencoder(tmp_path):
    """ComfyUI takes encoders of the released width only: 83.8 M parameters."""
    shapes = original_vae_shapes()
    tensors = random_tensors(shapes)
    tensors |= {n: torch.ones(s) for n, s in shapes.items() if "norm" in n and n.endswith("weight")}
    path = tmp_path / "ae.safetensors"
    save_file(tensors, path)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(1, 16, 8, 8, generator=generator),
        "images": torch.rand(1, 3, 64, 64, generator=generator),
    }
    theirs = in_comfyui(tmp_path, {"vae": path}, inputs)
    autoencoder = ImageAutoencoder(autoencoder_at(path, "model.autoencoder").load(torch.float32, "cpu"))
    with torch.no_grad():
        decoded, encoded = autoencoder.decode(inputs["latents"]), autoencoder.encode(inputs["images"])
    assert error_of(decoded, theirs["decoded"]) < 1e-4
    assert error_of(encoded, theirs["encoded"]) < 1e-4
