"""Images made ready for a reward's image tower: differentiable, on tensors [B, 3, H, W] in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def resize_crop(images: Tensor, size: int) -> Tensor:
    """Short side to `size` (bicubic, antialiased), then the centre square: [B, 3, size, size]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        target = [round(height * size / short), round(width * size / short)]
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel."""
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)
