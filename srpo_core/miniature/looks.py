"""The look of a picture, measured from its pixels alone: no network, nothing that training can have seen.

Three raw quantities, each a median or mean over the picture so that a thing's contour or place hardly moves them. Each
is put on a scale on which 0 is the mean of pictures drawn in the disliked looks and 1 the mean of pictures drawn in the
liked ones (`calibrate` measures those means; the numbers below are its result and a test measures them again).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import DISLIKED, LIKED, random_scenes
from .world import random_layout, random_looks, render

# name: (mean over disliked looks, mean over liked looks)
SCALE: dict[str, tuple[float, float]] = {
    "texture": (0.0066, 0.0158),
    "light": (0.468, 0.714),
    "natural_colour": (-0.299, -0.150),
}


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blur(images: Tensor, sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def raw_look(images: Tensor) -> dict[str, Tensor]:
    """images [B, 3, H, W] in [0, 1] -> raw texture, light and natural_colour, [B] each.

    texture: median of |fine detail| against the local brightness; fine is what a blur of H/64 removes.
    light: median slope of the brightness blurred by H/16, against the brightness.
    natural_colour: minus the mean chroma (largest minus smallest channel).
    """
    luma, height = _luma(images.float()), images.shape[-2]
    smooth = _blur(luma, height / 64)
    texture = _median((luma - smooth).abs() / (smooth + 0.05))
    broad = _blur(luma, height / 16)
    slope = torch.hypot(*torch.gradient(broad[:, 0], dim=(1, 2))) * height / (broad[:, 0] + 0.05)
    chroma = images.float().amax(1) - images.float().amin(1)
    return {"texture": texture, "light": _median(slope), "natural_colour": -chroma.mean((1, 2))}


def _median(values: Tensor) -> Tensor:
    """[B, ...] -> [B]; of an even count the lower one. As `Tensor.median`, which on GPUs isn't deterministic."""
    ordered = values.flatten(1).sort(1).values
    return ordered[:, (ordered.shape[1] - 1) // 2]


def look(images: Tensor) -> dict[str, Tensor]:
    """images [B, 3, H, W] in [0, 1] -> `look`, the mean of the quantities, and each of them on its scale, [B] each.

    0 is disliked and 1 liked; a quantity is cut to [-0.5, 1.5].
    """
    scaled = {
        name: ((value - SCALE[name][0]) / (SCALE[name][1] - SCALE[name][0])).clamp(-0.5, 1.5)
        for name, value in raw_look(images).items()
    }
    return {"look": torch.stack(list(scaled.values())).mean(0), **scaled}


def calibrate(count: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Measure SCALE on `count` fresh pictures of each side."""
    sides = []
    for words in (DISLIKED, LIKED):
        rng = random.Random(f"calibrate {seed} {words[0]}")
        chosen: Sequence[str] = [rng.choice(words) for _ in range(count)]
        layout = random_layout(random_scenes(count, seed + 77), rng)
        images = render(layout, random_looks(chosen, rng), torch.Generator().manual_seed(seed))
        sides.append({name: value.mean().item() for name, value in raw_look(images).items()})
    return {name: (sides[0][name], sides[1][name]) for name in sides[0]}
