"""ComfyUI's MODEL, VAE and CONDITIONING seen through the engine's interfaces.

A MODEL answers only inside a sampling session of ComfyUI, which loads it, applies its LoRAs and prepares what it is
conditioned on; `with_flow` opens one and hands out a FlowModel. ComfyUI's images are [B, H, W, 3], the engine's
[B, 3, H, W]; both in [0, 1]. ComfyUI's LATENT is in the VAE's own range, the engine's latents in the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.sd import VAE
from node_helpers import conditioning_set_values
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.errors import NotFiniteError
from srpo_core.interfaces import FlowModel, PromptBatch
from srpo_core.randomness import fixed_noise

NOISES = ("ComfyUI", "engine")
"""Whose random numbers a seed stands for: those of ComfyUI's samplers, or those of `srpo sample`."""
SEEDS = 2**64
Conditioning = list[list[Any]]


def to_engine(images: Tensor) -> Tensor:
    """ComfyUI's images [B, H, W, 3 or more] -> [B, 3, H, W], float32."""
    return images[..., :3].movedim(-1, 1).float()


def to_comfy(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> ComfyUI's [B, H, W, 3] on the CPU, in [0, 1]."""
    return images.movedim(1, -1).clamp(0, 1).float().cpu()


def require_flow_model(model: ModelPatcher, name: str = "model") -> None:
    """ConfigError unless a MODEL predicts the velocity of a rectified flow (FLUX, SD3, ...), as this method needs."""
    if not isinstance(model.get_model_object("model_sampling"), CONST):
        kind = type(model.model).__name__
        raise ConfigError(
            f"{name}: this MODEL ({kind}) is no rectified-flow model, and SRPO is defined for those: load FLUX.1 or"
            " another flow model"
        )


def full_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """The samples [B, C, h, w] of a LATENT, with the channels that a MODEL needs if they are empty."""
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"])


def batch_noise(seed: int, latents: Tensor, kind: str = NOISES[0]) -> Tensor:
    """Noise [B, C, h, w] like `latents`, on the CPU: row i is that of seed + i alone."""
    seeds = [(seed + i) % SEEDS for i in range(len(latents))]
    if kind == "engine":
        rows = [fixed_noise(one, 1, latents.shape[1:], "sample") for one in seeds]
    else:
        rows = [comfy.sample.prepare_noise(torch.zeros_like(latents[:1], device="cpu"), one) for one in seeds]
    return torch.cat(rows)


class SessionFlow:
    """A MODEL within its sampling session, as a FlowModel. Conditioning and guidance are the session's."""

    def __init__(self, guider: comfy.samplers.CFGGuider, arguments: Mapping[str, Any]) -> None:
        self.guider, self.arguments = guider, arguments
        self.denoised: Tensor | None = None
        """The clean latents that the last call predicts, [B, C, h, w]."""

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: float) -> Tensor:
        """latents [B, C, h, w] at levels sigma [B] in (0, 1] -> the predicted noise - clean."""
        self.denoised = self.guider(latents, sigma, **self.arguments)
        return (latents - self.denoised) / sigma.view(-1, *[1] * (latents.ndim - 1))


class _Work(comfy.samplers.Sampler):
    """A sampler that does with the model whatever it was made for."""

    def __init__(self, work: Callable[[FlowModel, Tensor], Tensor]) -> None:
        self.work = work

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        return self.work(SessionFlow(model_wrap, extra_args), noise)


def with_flow(
    model: ModelPatcher,
    positive: Conditioning,
    guidance: float,
    noise: Tensor,
    sigmas: Tensor,
    work: Callable[[SessionFlow, Tensor], Tensor],
    seed: int = 0,
) -> Tensor:
    """What `work(flow, noise)` returns, latents [B, C, h, w] in the model's range, in the range of LATENT, on the CPU.

    `work` runs on the model's device, inside one sampling session; `sigmas` is the schedule that the session tells
    the model's patches of. NotFiniteError if the model's numbers are none.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning_set_values(positive, {"guidance": guidance})})
    guider.set_cfg(1.0)
    found = guider.sample(noise, torch.zeros_like(noise), _Work(work), sigmas, disable_pbar=True, seed=seed).cpu()
    if not bool(torch.isfinite(found).all()):
        raise NotFiniteError(
            "model: its numbers are not finite (NaN or infinite), so there is no picture; load it in bfloat16 or"
            " float32, or lower the strength of its LoRAs"
        )
    return found


def prompts_of(count: int) -> PromptBatch:
    """Stands where the engine asks for prompts: in a session the CONDITIONING has them."""
    return PromptBatch(("",) * count)


class ComfyAutoencoder:
    """A VAE in the model's latent range, as an Autoencoder; without gradient."""

    def __init__(self, vae: VAE, model: ModelPatcher) -> None:
        self.vae = vae
        self.format = model.get_model_object("latent_format")

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]."""
        return self.format.process_in(self.vae.encode(images.movedim(1, -1)))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]; a VAE for videos gives each latent's frames one after the other."""
        images = self.vae.decode(self.format.process_out(latents))
        return images.reshape(-1, *images.shape[-3:]).movedim(-1, 1)
