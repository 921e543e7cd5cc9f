"""ComfyUI's MODEL, VAE and CONDITIONING seen through the engine's interfaces.

A MODEL answers only inside a sampling session of ComfyUI, which loads it, applies its LoRAs and prepares what it is
conditioned on; `with_flow` opens one and hands out a FlowModel. ComfyUI's images are [B, H, W, 3], the engine's
[B, 3, H, W]; both in [0, 1]. ComfyUI's LATENT is in the VAE's own range, the engine's latents in the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from srpo_core.randomness import SEEDS, fixed_noise

RATIO = "downscale_ratio"
"""How the keys of a LATENT begin that tell the size of its empty samples in pixels; finished ones have none."""
NOISES = ("ComfyUI", "engine")
"""Whose random numbers a seed stands for: those of ComfyUI's samplers, or those of `srpo sample`."""
Conditioning = list[list[Any]]


def to_engine(images: Tensor) -> Tensor:
    """ComfyUI's images [B, H, W, 3 or more, or 1 of grey] -> [B, 3, H, W], float32."""
    colours = images[..., :3].movedim(-1, 1).float()
    return colours.expand(-1, 3, -1, -1) if colours.shape[1] == 1 else colours


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


def latent_shape(model: ModelPatcher, latent: Mapping[str, Any]) -> Sequence[int]:
    """(C, h, w) of what a MODEL draws for a LATENT: the MODEL's channels, and as many pixels as the LATENT asks for.

    ComfyUI's empty LATENTs tell how many pixels each of their values stands for (`downscale_ratio_...`). ConfigError
    for the LATENT of a video or of sound where the MODEL draws pictures.
    """
    if latent["samples"].ndim != 4 and model.model.latent_format.latent_dimensions == 2:
        raise ConfigError(
            "latent: it is no picture's, but that of a video or of sound, and this MODEL draws pictures; connect"
            " EmptySD3LatentImage"
        )
    ratios = {name: value for name, value in latent.items() if name.startswith(RATIO)}
    return comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(latent["samples"]), **ratios).shape[1:]


def seeds_in(latent: Mapping[str, Any], seed: int) -> list[int]:
    """The seed of each picture of a LATENT: seed + its number. Those taken out of a batch keep their numbers in it."""
    return [(seed + i) % SEEDS for i in latent.get("batch_index", range(len(latent["samples"])))]


def noise_of(seeds: Sequence[int], shape: Sequence[int], kind: str = NOISES[0]) -> Tensor:
    """Noise [len(seeds), *shape], float32 on the CPU: a picture's is that of its seed alone."""
    if kind == "engine":
        return torch.cat([fixed_noise(seed, 1, shape, "sample") for seed in seeds])
    return torch.cat([comfy.sample.prepare_noise(torch.zeros(1, *shape), seed) for seed in seeds])


def in_parts(positive: Conditioning, noise: Tensor, size: int) -> Iterator[tuple[Conditioning, Tensor]]:
    """Noise [B, C, h, w] in parts of at most `size` pictures, each with the CONDITIONING of its own pictures.

    Of a CONDITIONING with a row per prompt, picture i has row i, as in ComfyUI's samplers; the first follows the last.
    """
    for numbers in torch.arange(len(noise)).split(size):
        yield [_rows(cond, options, numbers) for cond, options in positive], noise[numbers]


def _rows(cond: Tensor, options: Mapping[str, Any], numbers: Tensor) -> list[Any]:
    """An entry of a CONDITIONING with the rows of some pictures, the same in what belongs to them (pooled_output)."""
    count = len(cond)
    if count == 1:
        return [cond, options]
    rows = numbers % count
    chosen = {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in options.items()
    }
    return [cond[rows], chosen]


def decoded(vae: VAE, samples: Tensor) -> Tensor:
    """The samples [B, C, h, w] of a LATENT -> [B, 3, H, W] in [0, 1].

    A VAE for videos gives each latent's frames one after the other.
    """
    images = vae.decode(samples)
    return to_engine(images.reshape(-1, *images.shape[-3:]))


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
    """A VAE in the model's latent range, as an Autoencoder that only decodes; without gradient."""

    def __init__(self, vae: VAE, model: ModelPatcher) -> None:
        self.vae = vae
        self.format = model.get_model_object("latent_format")

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.vae, self.format.process_out(latents))
