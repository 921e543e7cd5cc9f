"""FLUX in the folders of a real server: toys that train in seconds, and files of full size with holes for content."""

from __future__ import annotations

from pathlib import Path

import torch
from flux_weights import DEV, header_only, original_shapes, original_vae_shapes, random_tensors
from safetensors.torch import save_file
from test_flux_files import SIZES, WIDTHS, text_towers, under
from tiny_flux import _clip_tokenizer, _t5_tokenizer

SETTINGS = {
    "data.height": 16, "data.width": 16, "model.dtype": "float32", "output.preview_steps": 1, "rollout.num_steps": 1,
    "optim.accumulation": 1, "lora.rank": 2,
}  # fmt: skip
"""A run of the toys, in more_settings."""


def toy_files(base: Path) -> dict[str, str]:
    """Toy FLUX in a server's models folder, as single files under names of its own and as one checkpoint.

    Gives the settings that its runs need.
    """
    transformer, vae = random_tensors(original_shapes(**SIZES)), random_tensors(original_vae_shapes(WIDTHS), 1)
    clip, t5 = _towers()
    _save(base / "models/diffusion_models/toy.safetensors", transformer)
    _save(base / "models/vae/toy-vae.safetensors", vae)
    _save(base / "models/text_encoders/toy-clip.safetensors", clip)
    _save(base / "models/text_encoders/t5xxl_toy.safetensors", t5)
    half = under("model.diffusion_model.", transformer) | under("vae.", vae)
    _save(base / "models/checkpoints/half.safetensors", half)
    texts = under("text_encoders.clip_l.transformer.", clip) | under("text_encoders.t5xxl.transformer.", t5)
    _save(base / "models/checkpoints/whole.safetensors", half | texts)
    tokenizers = base / "tokenizers"
    _clip_tokenizer(tokenizers / "tokenizer")
    _t5_tokenizer(tokenizers / "tokenizer_2")
    return SETTINGS | {"model.tokenizers": str(tokenizers)}


def _towers() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    clip, t5 = (under("", module.state_dict()) for module in text_towers())
    clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    return clip, {name: tensor for name, tensor in t5.items() if name != "encoder.embed_tokens.weight"}


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def full_size_files(base: Path) -> None:
    """FLUX.1-dev and HPS v2.1 under their usual names in a server's models folder: headers, with holes for content."""
    from open_clip import get_model_config
    from test_plan import shapes_of
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from srpo_core.rewards.clip_files import new_open_clip

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
