"""Images made ready for a reward's image tower: differentiable, on tensors [B, 3, H, W] in [0, 1].

Resizing is bicubic (a = -0.5) with antialiasing, as PIL's and as torchvision's on tensors. Like the latter it doesn't
round to 8 bits, and it may leave [0, 1] a little beside sharp edges, where PIL clamps: the gradient stays whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Fit = Literal["crop", "pad"]


def resize_crop(images: Tensor, size: int) -> Tensor:
    """Short side to `size`, then the centre square: [B, 3, size, size]. Sides are rounded down, as torchvision does."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = _resize(images, size * height // short, size * width // short)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_pad(images: Tensor, size: int) -> Tensor:
    """Long side to `size`, then black on both sides of the other: [B, 3, size, size], as the HPS v2 scorer does."""
    height, width = images.shape[-2:]
    long = max(height, width)
    images = _resize(images, max(1, round(height * (size / long))), max(1, round(width * (size / long))))
    vertical, horizontal = (size - side for side in images.shape[-2:])
    top, left = vertical // 2, horizontal // 2
    return F.pad(images, (left, horizontal - left, top, vertical - top))


def square(images: Tensor, size: int, fit: Fit) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size] in the way that reward.fit names."""
    return (resize_pad if fit == "pad" else resize_crop)(images, size)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel."""
    shift, width = (_channels(tuple(values), images.device, images.dtype) for values in (mean, std))
    return (images - shift) / width


@functools.lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number for each channel [C, 1, 1], kept: bringing it to a GPU would have the host wait each time."""
    with torch.inference_mode(False):  # for use with gradient too
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    if torch.are_deterministic_algorithms_enabled():  # there is no such backward pass on GPUs
        rows, columns = (
            _weights(*sides, images.device, images.dtype)
            for sides in zip((height, width), images.shape[-2:], strict=True)
        )
        return rows @ images @ columns.mT
    return _bicubic(images, height, width)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


@functools.lru_cache(maxsize=64)
def _weights(new: int, old: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix [new, old] that resizes one side: of a picture whose other side stays as it is."""
    with torch.inference_mode(False), torch.no_grad():
        return _bicubic(torch.eye(old, device=device, dtype=dtype)[None, None], new, old)[0, 0]
