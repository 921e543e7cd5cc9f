"""FLUX's autoencoder under its sets of names: the original ones (ae.safetensors), diffusers' and both of TAESD's.

Original blocks count levels from the picture inward in the decoder too, diffusers' from the latents outward. The
projections of attention are 1x1 convolutions in the original and linear layers in diffusers. Sources: the released
files, diffusers' `convert_ldm_vae_checkpoint`, and ComfyUI's taesd.py for `taesd_encoder.` and `taesd_decoder.` names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .fp8 import dequantised
from .loading import Stream
from .recognise import Contents
from .tensors import TensorFile

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
"""FLUX's latents are (the autoencoder's - shift) * scale; ComfyUI applies both to whichever VAE it is given."""
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RENAMED = (
    (r"(encoder)\.down\.(\d+)\.block\.(\d+)\.(.+)", "{0}.down_blocks.{1}.resnets.{2}.{3}"),
    (r"(encoder)\.down\.(\d+)\.downsample\.(.+)", "{0}.down_blocks.{1}.downsamplers.0.{2}"),
    (r"(decoder)\.up\.(\d+)\.block\.(\d+)\.(.+)", "{0}.up_blocks.{1}.resnets.{2}.{3}"),
    (r"(decoder)\.up\.(\d+)\.upsample\.(.+)", "{0}.up_blocks.{1}.upsamplers.0.{2}"),
    (r"(encoder|decoder)\.norm_out\.(.+)", "{0}.conv_norm_out.{1}"),
)


def to_diffusers(
    file: TensorFile,
    contents: Contents,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Stream:
    """An autoencoder's tensors under the names of diffusers' AutoencoderKL or AutoencoderTiny, dequantised.

    `dtype` and `device` are those of `dequantised`. Names that it doesn't have come through as they are. ComfyUI's
    `vae_scale` and `vae_shift` are left to `autoencoder_config`.
    """
    own = file.prefix(contents.prefix)
    levels = len({match[1] for name in own.info if (match := re.match(r"decoder\.up\.(\d{1,5})\.", name))})
    for name, tensor in dequantised(own, dtype, device):
        if contents.layout == "taesd":
            if name in ("vae_scale", "vae_shift"):
                continue
            name = _taesd(name)
        elif contents.layout == "original":
            name = _original(name, levels)
            if ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        yield name, tensor


def _original(name: str, levels: int) -> str:
    attention = re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)", name)
    if attention and attention[2] in _ATTENTION:
        return f"{attention[1]}.mid_block.attentions.0.{_ATTENTION[attention[2]]}.{attention[3]}"
    middle = re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name)
    if middle:
        return _shortcut(f"{middle[1]}.mid_block.resnets.{int(middle[2]) - 1}.{middle[3]}")
    for pattern, target in _RENAMED:
        found = re.fullmatch(pattern, name)
        if found:
            parts = list(found.groups())
            if ".up_blocks." in target:
                parts[1] = str(levels - 1 - int(parts[1]))
            return _shortcut(target.format(*parts))
    return name


def _shortcut(name: str) -> str:
    return name.replace(".nin_shortcut.", ".conv_shortcut.")


def _taesd(name: str) -> str:
    """ComfyUI counts the layers of one sequence, whose decoder begins with a clamp that diffusers doesn't count."""
    found = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", name)
    if not found:
        return name
    return f"{found[1]}.layers.{int(found[2]) - (found[1] == 'decoder')}.{found[3]}"


def taesd_comfyui(weights: Mapping[str, Tensor], scale: float, shift: float) -> dict[str, Tensor]:
    """A tiny autoencoder's tensors under ComfyUI's names, from diffusers'.

    Its latents are (the encoder's - shift) * scale. `vae_scale` and `vae_shift` beside them make ComfyUI's FLUX models,
    which apply FLUX's own scale and shift, get just these.
    """
    tensors = {
        "vae_scale": torch.tensor(FLUX_SCALE / scale),
        "vae_shift": torch.tensor(FLUX_SHIFT - shift * scale / FLUX_SCALE),
    }
    for name, tensor in weights.items():
        side, _, index, rest = name.split(".", 3)
        place = int(index) + (side == "decoder")  # ComfyUI's decoder counts its clamp as layer 0
        tensors[f"taesd_{side}.{place}.{rest}"] = tensor
    return tensors


def autoencoder_config(file: TensorFile, contents: Contents) -> tuple[str, dict[str, Any]]:
    """(name of the diffusers class, its keyword arguments), read off the shapes.

    Fixed are 32 groups in norms, and what no tensor tells: the scale and shift of FLUX's latents. A tiny autoencoder's
    latents are FLUX's own (scale 1, shift 0) unless ComfyUI's `vae_scale` and `vae_shift` lie beside it.
    """
    outline = file.outline()
    shapes = {name: tuple(tensor.shape) for name, tensor in to_diffusers(outline, contents)}
    try:
        if "decoder.layers.0.weight" in shapes:
            config = _tiny_config(shapes, file.prefix(contents.prefix))
            return "AutoencoderTiny", config
        return "AutoencoderKL", _kl_config(shapes)
    except (KeyError, IndexError) as error:
        raise file.error(f"is no whole autoencoder (it lacks {error})", "download it again") from error


def _tiny_config(shapes: Mapping[str, tuple[int, ...]], file: TensorFile) -> dict[str, Any]:
    config = {"latent_channels": shapes["decoder.layers.0.weight"][1], "scaling_factor": 1.0, "shift_factor": 0.0}
    if "vae_scale" in file and "vae_shift" in file:
        scale, shift = (float(file.read(name).float().reshape(-1)[0]) for name in ("vae_scale", "vae_shift"))
        config |= {"scaling_factor": FLUX_SCALE / scale, "shift_factor": (FLUX_SHIFT - shift) * scale}
    return config


def _kl_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    levels = count(r"encoder\.down_blocks\.(\d{1,5})\.")
    widths = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d{1,5})\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": FLUX_SCALE,
        "shift_factor": FLUX_SHIFT,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
    }
