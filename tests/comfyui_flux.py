"""FLUX in the folders of a real server: toy models that train in seconds, and files of full size with holes for content."""

from __future__ import annotations

from pathlib import Path

import torch
from flux_weights import TOY, header_only, original_shapes, original_vae_shapes, random_tensors
from safetensors.torch import save_file
from tiny_flux import _clip_tokenizer, _t5_tokenizer, randomise
from torch import nn

CLIP_WIDTH, T5_WIDTH = 64, 24
SETTINGS = {
    "data.height": 16, "data.width": 16, "model.dtype": "float32", "output.preview_steps": 1, "rollout.num_steps": 1,
    "optim.accumulation": 1, "lora.rank": 2,
}  # fmt: skip
"""A run of the toys, in more_settings."""


def toy_files(base: Path) -> dict[str, str]:
    """Toy FLUX in a server's models folder, as single files under names of its own and as one checkpoint.

    Gives the settings that its runs need.
    """
    transformer = random_tensors(original_shapes(**TOY | {"text": T5_WIDTH, "pooled": CLIP_WIDTH}))
    vae = random_tensors(original_vae_shapes((32, 32, 64)), 1)
    clip, t5 = _towers()
    _save(base / "models/diffusion_models/toy.safetensors", transformer)
    _save(base / "models/vae/toy-vae.safetensors", vae)
    _save(base / "models/text_encoders/toy-clip.safetensors", clip)
    _save(base / "models/text_encoders/t5xxl_toy.safetensors", t5)
    named = {"model.diffusion_model.": transformer, "vae.": vae}
    _save(base / "models/checkpoints/half.safetensors", _joined(named))
    named |= {"text_encoders.clip_l.transformer.": clip, "text_encoders.t5xxl.transformer.": t5}
    _save(base / "models/checkpoints/whole.safetensors", _joined(named))
    tokenizers = base / "tokenizers"
    _clip_tokenizer(tokenizers / "tokenizer")
    _t5_tokenizer(tokenizers / "tokenizer_2")
    return SETTINGS | {"model.tokenizers": str(tokenizers)}


def _towers() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=514, hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    found = (_tensors(randomise(CLIPTextModel(clip), 1, 0.5)), _tensors(randomise(T5EncoderModel(t5), 2, 0.5)))
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in found[0].items()}
    return text, {name: tensor for name, tensor in found[1].items() if name != "encoder.embed_tokens.weight"}


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}


def _joined(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.clone() for prefix, tensors in parts.items() for name, tensor in tensors.items()}


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def full_size_files(base: Path) -> None:
    """FLUX.1-dev and HPS v2.1 under their usual names in a server's models folder: headers, with holes for content."""
    from open_clip import get_model_config
    from test_plan import DEV, new_open_clip, shapes_of
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                                            num_attention_heads=12, num_hidden_layers=12))  # fmt: skip
        t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                     feed_forward_proj="gated-gelu"))  # fmt: skip
    hps = new_open_clip(get_model_config("ViT-H-14"), quick_gelu=False)
    for name, shapes, dtype in (
        ("diffusion_models/flux1-dev.safetensors", original_shapes(**DEV), "BF16"),
        ("vae/ae.safetensors", original_vae_shapes(), "F32"),
        ("text_encoders/clip_l.safetensors", shapes_of(clip), "F16"),
        ("text_encoders/t5xxl_fp16.safetensors", shapes_of(t5), "F16"),
        ("srpo_rewards/HPS_v2.1_compressed.safetensors", shapes_of(hps), "F32"),
    ):
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        header_only(base / "models" / name, shapes, dtype)
