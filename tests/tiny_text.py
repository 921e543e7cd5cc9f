"""FLUX's text encoders at toy size with random weights, and the files that people have them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_flux import randomise
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def tiny_clip(vocabulary: int = 514, width: int = 64) -> nn.Module:
    """A CLIPTextModel whose heads are 64 wide, as CLIP-L's are."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=width // 64, hidden_act="quick_gelu", bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return randomise(CLIPTextModel(config), 1, 0.5)


def tiny_t5(vocabulary: int = 32, width: int = 24, layers: int = 3) -> nn.Module:
    """A T5EncoderModel of version 1.1, with gated layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=40,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomise(T5EncoderModel(config), 2, 0.5)


def clip_tensors(module: nn.Module) -> Tensors:
    """A CLIPTextModel's tensors under the names of clip_l.safetensors."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": p.detach().clone() for name, p in module.named_parameters()
    }


def t5_tensors(module: nn.Module) -> Tensors:
    """A T5EncoderModel's tensors under the names of t5xxl_fp16.safetensors."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a T5 tensor is a linear layer's weight: fp8 files store these in 8 bits."""
    return tensor.ndim == 2 and "shared" not in name and "relative_attention_bias" not in name


def all_fp8(tensors: Tensors) -> Tensors:
    """Every tensor in 8 bits, norms too."""
    return {name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()}


def plain_fp8(tensors: Tensors) -> Tensors:
    """Matrices in 8 bits, the rest as it was."""
    return {name: x.to(torch.float8_e4m3fn) if is_matrix(name, x) else x for name, x in tensors.items()}


def scaled_fp8(tensors: Tensors, table: bool = False) -> Tensors:
    """As in t5xxl_fp8_e4m3fn_scaled.safetensors: a scale for each matrix (and the table of tokens), and the marker."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, x in tensors.items():
        if not is_matrix(name, x) and not (table and "shared" in name):
            out[name] = x
            continue
        scale = x.abs().max() / 448
        out[name] = (x / scale).to(torch.float8_e4m3fn)
        out[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return out


def stands_for(tensors: Mapping[str, Tensor]) -> Tensors:
    """The numbers, in float32, that the tensors of an fp8 file stand for."""
    scales = {name.removesuffix(".scale_weight"): x for name, x in tensors.items() if name.endswith(".scale_weight")}
    return {
        name: x.float() * scales.get(name.removesuffix(".weight"), 1.0)
        for name, x in tensors.items()
        if not name.endswith(".scale_weight") and name != "scaled_fp8"
    }


def with_weights(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with these weights, by its own names."""
    module = build()
    module.load_state_dict({**module.state_dict(), **tensors})
    return module


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
