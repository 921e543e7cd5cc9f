"""LoRA files of FLUX in the namings that trainers write, with random numbers."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

WIDTH, TEXT, POOLED, PATCH = 32, 24, 20, 16
RANK = 3


def original_layers(width: int = WIDTH, text: int = TEXT, pooled: int = POOLED, patch: int = PATCH) -> dict:
    """[out, in] of the original network's linear layers: a block of each kind and what is around them."""
    layers = {}
    for side in ("img", "txt"):
        layers |= {
            f"double_blocks.0.{side}_attn.qkv": (3 * width, width),
            f"double_blocks.0.{side}_attn.proj": (width, width),
            f"double_blocks.0.{side}_mlp.0": (4 * width, width),
            f"double_blocks.0.{side}_mlp.2": (width, 4 * width),
            f"double_blocks.0.{side}_mod.lin": (6 * width, width),
        }
    layers |= {
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
        "single_blocks.0.modulation.lin": (3 * width, width),
    }
    return layers | {
        "img_in": (width, patch),
        "txt_in": (width, text),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "vector_in.in_layer": (width, pooled),
        "vector_in.out_layer": (width, width),
        "guidance_in.in_layer": (width, 256),
        "guidance_in.out_layer": (width, width),
        "final_layer.linear": (patch, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }


def random_pairs(layers: dict, rank: int = RANK, seed: int = 0) -> dict:
    """layer -> (down, up, alpha), with another alpha for each layer."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, (layer, (rows, columns)) in enumerate(layers.items()):
        down = torch.randn(rank, columns, generator=generator)
        up = torch.randn(rows, rank, generator=generator)
        pairs[layer] = down, up, 1.0 + index
    return pairs


def named(pairs: dict, style: str, alpha: bool = True) -> dict:
    """The pairs under a trainer's names."""
    tensors = {}
    for layer, (down, up, scale) in pairs.items():
        prefix, down_end, up_end = {
            "kohya": (f"lora_unet_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
            "comfyui": (f"diffusion_model.{layer}", "lora_A.weight", "lora_B.weight"),
            "comfyui-down": (f"diffusion_model.{layer}", "lora_down.weight", "lora_up.weight"),
            "bare": (layer, "lora_down.weight", "lora_up.weight"),
            "peft": (f"transformer.{layer}", "lora_A.weight", "lora_B.weight"),
            "peft-adapter": (f"base_model.model.{layer}", "lora_A.default.weight", "lora_B.default.weight"),
            "old-diffusers": (f"transformer.{layer}", "lora.down.weight", "lora.up.weight"),
            "onetrainer": (f"lora_transformer_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
        }[style]
        tensors[f"{prefix}.{down_end}"], tensors[f"{prefix}.{up_end}"] = down.clone(), up.clone()
        if alpha:
            tensors[f"{prefix}.alpha"] = torch.tensor(scale)
    return tensors


def save(path, tensors, metadata=None):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path
