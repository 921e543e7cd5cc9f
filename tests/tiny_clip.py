"""A narrow CLIP in open_clip's code and in transformers', with the same random weights under both libraries' names."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig

NAME = "narrow-test-clip"
SIZE, PATCH = 56, 14
VISION, TEXT, WIDTH = 128, 64, 24
LAYERS = 2
CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIZE, "layers": LAYERS, "width": VISION, "head_width": 64, "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT, "heads": 1, "layers": LAYERS},
}


def register(folder: Path) -> str:
    """Make the narrow model known to open_clip; its name."""
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    return NAME


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under open_clip's names, every tensor other than its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CONFIG)
        return {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def reference(state: dict[str, Tensor], quick_gelu: bool = False) -> open_clip.CLIP:
    """open_clip's own model with these weights."""
    model = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu)
    model.load_state_dict(state, strict=True)
    return model.eval()


def save_checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """As the HPS authors publish theirs, or .safetensors."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


def transformers_config(activation: str = "gelu") -> CLIPConfig:
    """The narrow model's configuration for transformers."""
    vision = {
        "hidden_size": VISION, "intermediate_size": 4 * VISION, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "image_size": SIZE, "patch_size": PATCH, "hidden_act": activation, "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        "hidden_size": TEXT, "intermediate_size": 4 * TEXT, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
        "hidden_act": activation, "projection_dim": WIDTH, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


def transformers_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        renamed |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for old, new in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
            for i in range(LAYERS):
                block, layer = f"{old}.resblocks.{i}", f"{new}.encoder.layers.{i}"
                renamed |= {f"{layer}.{b}.{kind}": state[f"{block}.{a}.{kind}"] for a, b in parts.items()}
                renamed[f"{layer}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
                for name, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{name}_proj.{kind}"] = part
    return {name: tensor.clone().contiguous() for name, tensor in renamed.items()}
