"""SRPO Load LoRA in a real server, against ComfyUI's own loader and against diffusers with peft."""

import numpy as np
import pytest
import torch
from comfyui_pictures import (
    BUILT_IN,
    LEVEL,
    apart,
    checkpoint,
    drawn,
    engine_picture,
    failure,
    load_miniature,
    lora,
)
from comfyui_side import TRANSFORMER, needs_comfyui
from flux_weights import original_shapes
from lora_files import named, random_pairs, save
from safetensors.torch import load_file, save_file

from srpo_core.export.convert import convert
from srpo_core.lora import linear_shapes
from srpo_core.miniature import WEIGHTS
from srpo_core.weights import flux_names

pytestmark = needs_comfyui


@pytest.fixture(scope="module")
def loras(server):
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trained.safetensors").write_bytes((WEIGHTS / "lora.safetensors").read_bytes())
    return folder


def test_a_trained_lora_is_diffusers_and_peft_s(server, loras, parts, base):
    """The LoRA that the engine trained: by ComfyUI's own loader, by ours, and by diffusers with peft."""
    core, _ = drawn(server, lora("trained.safetensors", node="LoraLoaderModelOnly"))
    ours, text = drawn(server, lora("trained.safetensors"))
    built_in, _ = drawn(server, lora(BUILT_IN))
    assert "44 layers, rank 16" in text and "trained by SRPO: 64 steps with the reward miniature" in text
    transformer = load_miniature().flow.module
    transformer.load_lora_adapter(load_file(WEIGHTS / "lora.safetensors"), prefix="transformer")
    theirs = engine_picture(parts, transformer)
    differences = [apart(picture, theirs) for picture in (core, ours, built_in)]
    print(f"largest differences {differences} of 255; the LoRA changed {apart(theirs, base)}")
    assert apart(theirs, base) > 20
    assert max(differences) <= LEVEL


def test_strength(server, loras, base):
    none, _ = drawn(server, lora("trained.safetensors", 0.0))
    assert apart(none, base) == 0
    half, _ = drawn(server, lora("trained.safetensors", 0.5))
    core, _ = drawn(server, lora("trained.safetensors", 0.5, "LoraLoaderModelOnly"))
    assert apart(half, core) == 0
    twice = lora("trained.safetensors", 0.25)
    twice["model"]["inputs"]["model"] = ["first", 0]
    twice |= {"first": lora("trained.safetensors", 0.25)["model"]}
    assert apart(drawn(server, twice)[0], half) <= LEVEL


def test_a_lora_written_anew_is_loaded_anew(server, loras, base):
    path = loras / "renewed.safetensors"
    tensors = load_file(WEIGHTS / "lora.safetensors")
    save_file({n: t * 0 if ".lora_B." in n else t for n, t in tensors.items()}, path)
    assert apart(drawn(server, lora(path.name))[0], base) == 0
    save_file(tensors, path)
    assert apart(drawn(server, lora(path.name))[0], base) > 20


def test_on_top_of_scaled_fp8(server, loras, base):
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    convert(TRANSFORMER.parent, folder / "small.safetensors", "comfyui", "scaled-fp8")
    exact, _ = drawn(server, lora(BUILT_IN))
    nodes = lora(BUILT_IN) | {"small": checkpoint("small.safetensors")["model"]}
    nodes["model"]["inputs"]["model"] = ["small", 0]
    rounded, _ = drawn(server, nodes)
    print(f"off by {np.abs(rounded - exact).mean():.2f} of 255, the LoRA changes {np.abs(exact - base).mean():.2f}")
    assert np.abs(rounded - exact).mean() < np.abs(exact - base).mean() / 3


@pytest.mark.parametrize("style", ["kohya", "comfyui", "peft"])
def test_other_trainers_loras(server, loras, parts, style):
    """The same change under the names of several trainers, by our loader and by ComfyUI's."""
    shapes = linear_shapes(parts.flow.module)
    if style != "peft":
        layers, shapes = shapes, {}
        for name, (rows, columns) in layers.items():
            source = flux_names.original_module(name)[0]
            shapes[source] = (shapes.get(source, (0, 0))[0] + rows, columns)
    pairs = {n: (d, 0.02 * u, 4) for n, (d, u, _) in random_pairs(shapes, 4, seed=1).items()}
    save(loras / f"{style}.safetensors", named(pairs, style))
    ours, _ = drawn(server, lora(f"{style}.safetensors"))
    core, _ = drawn(server, lora(f"{style}.safetensors", node="LoraLoaderModelOnly"))
    assert apart(ours, core) <= LEVEL


def test_loras_that_dont_fit(server, loras):
    """Layer and both shapes where ComfyUI's own loader goes on without; other families and kinds by name."""
    wide = original_shapes(width=3072, double=1, single=1, text=4096, pooled=768, channels=64, guidance=True)
    layers = {name: shape for name, shape in flux_names.linear_shapes(wide).items() if name.endswith("to_add_out")}
    save(loras / "flux-dev.safetensors", named(random_pairs(layers, 2), "peft"))
    said = failure(server, lora("flux-dev.safetensors"))
    assert "its layer transformer_blocks.0.attn.to_add_out changes a weight of [3072, 3072], this model's is [2" in said
    deep = {"double_blocks.7.img_attn.proj": (256, 256)}
    save(loras / "deep.safetensors", named(random_pairs(deep, 2), "kohya"))
    assert "has no linear layer transformer_blocks.7.attn.to_out.0" in failure(server, lora("deep.safetensors"))
    unet = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)}
    save(loras / "sd.safetensors", named(random_pairs(unet, 2), "peft"))
    assert "is for another model" in failure(server, lora("sd.safetensors"))
    save(loras / "lokr.safetensors", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(4, 4)})
    assert "is a LoKr adapter" in failure(server, lora("lokr.safetensors"))
    (loras / "whole.safetensors").write_bytes(TRANSFORMER.read_bytes())
    assert "or load this with SRPO Load Checkpoint" in failure(server, lora("whole.safetensors"))
