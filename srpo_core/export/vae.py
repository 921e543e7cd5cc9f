"""Autoencoders as ComfyUI and diffusers read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.export.formats import (
    DTYPES,
    Stream,
    cast,
    check_dtype,
    check_file,
    check_format,
    module_config,
    tensors_source,
    write,
)
from srpo_core.models.flux import ImageAutoencoder
from srpo_core.weights.autoencoder_names import FLUX_SCALE, FLUX_SHIFT, taesd_comfyui


def vae_comfyui_tensors(autoencoder: ImageAutoencoder) -> dict[str, Tensor]:
    """An autoencoder under the names by which ComfyUI knows its layout.

    An AutoencoderKL with FLUX's scale and shift keeps diffusers' names, which ComfyUI reads. One of the TAESD layout
    gets ComfyUI's, with `vae_scale` and `vae_shift` such that ComfyUI's FLUX models get the latents that `autoencoder`
    encodes, and its decoder those that they return. ConfigError for others, which ComfyUI would not recognise.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    weights, scale, shift = autoencoder.module.state_dict(), autoencoder.scale, autoencoder.shift
    if isinstance(autoencoder.module, AutoencoderKL):
        if (scale, shift) != (FLUX_SCALE, FLUX_SHIFT):
            raise ConfigError(
                f"this autoencoder can't become a ComfyUI VAE for FLUX: its latents have scale {scale:g} and shift"
                f" {shift:g}, ComfyUI's have {FLUX_SCALE} and {FLUX_SHIFT}; --format diffusers keeps it as it is"
            )
        return weights
    layout = AutoencoderTiny(latent_channels=autoencoder.module.config.latent_channels).state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {name: t.shape for name, t in layout.items()}:
        raise ConfigError(
            "this autoencoder can't become a ComfyUI VAE: of small ones only the TAESD layout is known there; --format"
            " diffusers keeps it as it is"
        )
    return taesd_comfyui(weights, scale, shift)


def export_vae(
    autoencoder: ImageAutoencoder,
    out: Path | str,
    metadata: Mapping[str, str],
    dtype: str = "float32",
    overwrite: bool = False,
    format: str = "comfyui",
) -> Path:
    """Write an autoencoder to one file that ComfyUI loads as a VAE for FLUX models, or in diffusers format.

    In diffusers format it is a folder, or one file if `out` is named so.
    """
    out = Path(out)
    check_format(format)
    check_dtype(dtype, "vae", format)
    if format == "comfyui":
        check_file(out, "a VAE in ComfyUI's format")
    weights = autoencoder.module.state_dict() if format == "diffusers" else vae_comfyui_tensors(autoencoder)
    source = tensors_source(weights)

    def as_asked(meta: bool) -> Stream:
        return cast(source(meta), DTYPES[dtype])

    return write(out, as_asked, metadata, lambda: module_config(autoencoder.module), overwrite)
