"""Runs of the flux family at toy size, and LoRA files for them."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from lora_files import named, random_pairs, save
from tiny import tiny_config
from tiny_flux import (
    LATENT_CHANNELS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    random_latents,
    random_prompts,
    randomise,
    save_tiny_flux,
)

from srpo_core.config import ModelConfig
from srpo_core.lora import linear_shapes
from srpo_core.models.flux import FluxFlow, load_flow

RANK = 2
PROMPTS = "a red cat\na blue dog\ntwo birds\na house\n"


def save_flux(folder):
    """FLUX in miniature, with heads of the released models' width, so that its single files tell their shape."""
    save_tiny_flux(folder)
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=1, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    randomise(transformer, 3, 0.5).save_pretrained(folder / "transformer")
    for name, text in (("train", PROMPTS), ("eval", "a tree\na river\n")):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def config(folder, run_dir, **settings):
    base = {
        "model": {"family": "flux", "path": str(folder), "dtype": "float32", "recompute": False},
        "data": {"height": 16, "width": 16, "prompts": f"{folder}/train.txt", "eval_prompts": f"{folder}/eval.txt"},
        "output__preview_every": 0, "optim__steps": 2, "optim__lr": 1e-2,
    }  # fmt: skip
    return tiny_config(run_dir, **base | settings)


def lora_file(path, folder, group="all", rank=RANK, seed=1, style="peft", scale=0.02):
    shapes = linear_shapes(FluxTransformer2DModel.from_pretrained(folder / "transformer"))
    ends = tuple(f".{target}" for target in FluxFlow.lora_targets[group])
    pairs = random_pairs({name: shape for name, shape in shapes.items() if name.endswith(ends)}, rank, seed)
    return save(
        path, named({n: (d, scale * u, rank / (1 + i % 2)) for i, (n, (d, u, _)) in enumerate(pairs.items())}, style)
    )


def velocity(module):
    with torch.no_grad():
        return FluxFlow(module).velocity(random_latents(), torch.tensor([0.9, 0.7]), random_prompts(), 3.5)


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def load_transformer(path):
    """As model.transformer, by the family itself."""
    return load_flow(ModelConfig(transformer=str(path), dtype="float32", recompute=False), "cpu").module
