"""Files of FLUX.1-dev, its text encoders and VAE, a LoRA and HPS v2.1, at full size with random weights, for ComfyUI.

Pictures of random weights mean nothing: such files show mechanics, seconds and memory. 36 GB in all. `tiny` makes a
transformer of two blocks and nothing else (0.9 GB), to try what needs a file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_load import BANK, in_format, weights
from full_size_run import random_stream
from graphs.world import CLIP_FILE, FLUX_FILE, LORA_FILE, SRPO_FILE, T5_FILE, VAE_FILE
from torch import Tensor, nn

from srpo_core.export.writer import plan, write_file
from srpo_core.models.flux_files import CLASSES
from srpo_core.weights.loading import empty_parameters

HPS_FILE = "HPS_v2.1_compressed.pt"
LORA_RANK = 16
Stream = Iterator[tuple[str, Tensor]]


def transformer(models: Path, blocks: tuple[int, int] = (19, 38)) -> None:
    """The transformer under its original names in bfloat16, as the SRPO release and as FLUX.1-dev (a hard link)."""
    path = models / "diffusion_models" / SRPO_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        streams = (in_format(weights(blocks, meta), "original-bf16") for meta in (True, False))
        write_file(path, plan(next(streams)), next(streams), {})
    other = models / "diffusion_models" / FLUX_FILE
    if not other.exists():
        other.hardlink_to(path)


def _lora_stream(meta: bool) -> Stream:
    """LoRA matrices of every linear layer in FLUX.1-dev's blocks, under diffusers' names."""
    with empty_parameters():
        model = CLASSES["FluxTransformer2DModel"](guidance_embeds=True)
    bank = torch.randn(BANK, generator=torch.Generator().manual_seed(2)).bfloat16()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
            for side, shape in (("A", (LORA_RANK, layer.in_features)), ("B", (layer.out_features, LORA_RANK))):
                numbers = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                if not meta:
                    numbers = 0.01 * bank[: shape[0] * shape[1]].view(shape)
                yield f"transformer.{name}.lora_{side}.weight", numbers


def named(module: nn.Module, prefix: str, dtype: torch.dtype, meta: bool) -> Stream:
    """A module's random state in `dtype`, each name behind `prefix` unless it has it."""
    for name, tensor in random_stream(module, meta):
        yield (name if name.startswith(prefix) else prefix + name), tensor.to(dtype)


def _write(path: Path, module: nn.Module, prefix: str = "", dtype: torch.dtype = torch.float16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_file(path, plan(named(module, prefix, dtype, True)), named(module, prefix, dtype, False), {})


def text_encoders(models: Path) -> None:
    """T5-XXL's encoder and CLIP-L's text tower, in float16."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with empty_parameters():
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu",
                vocab_size=32128,
            )
        )  # fmt: skip
    _write(models / "text_encoders" / CLIP_FILE, clip, prefix="text_model.")
    _write(models / "text_encoders" / T5_FILE, t5)


def others(models: Path) -> None:
    """The VAE, HPS v2.1 as its authors publish it (a .pt of float16), and a LoRA."""
    import open_clip
    from diffusers import AutoencoderKL

    with empty_parameters():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
    _write(models / "vae" / VAE_FILE, vae, dtype=torch.bfloat16)
    hps = models / "srpo_rewards" / HPS_FILE
    hps.parent.mkdir(parents=True, exist_ok=True)
    if not hps.is_file():
        module = open_clip.create_model("ViT-H-14", device="meta")
        torch.save({"state_dict": dict(named(module, "", torch.float16, False))}, hps)
    lora = models / "loras" / LORA_FILE
    lora.parent.mkdir(parents=True, exist_ok=True)
    if not lora.is_file():
        write_file(lora, plan(_lora_stream(True)), _lora_stream(False), {})


def make(base: Path, comfyui: Path, tiny: bool) -> None:
    """All files below `base`, each kind in a process of its own; a file that is there stays."""
    picture = base / "input" / "example.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    if not picture.is_file():
        shutil.copyfile(comfyui / "input" / "example.png", picture)
    kinds = ["tiny"] if tiny else ["transformer", "text_encoders", "others"]
    running = [subprocess.Popen([sys.executable, __file__, kind, str(base / "models")]) for kind in kinds]
    failed = [kind for kind, process in zip(kinds, running, strict=True) if process.wait()]
    if failed:
        raise RuntimeError(f"files could not be made: {', '.join(failed)}")


KINDS = {
    "transformer": transformer,
    "text_encoders": text_encoders,
    "others": others,
    "tiny": lambda models: transformer(models, (1, 1)),
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
