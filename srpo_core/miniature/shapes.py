"""Signed distances of the small world's shapes, about exact and negative inside.

In units of the thing's size, from its centre, y downward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _ball(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _box(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82


def _cone(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * 0.9 - (y + 0.95) * 0.47, y - 0.8)


def _star(x: Tensor, y: Tensor) -> Tensor:
    turn = torch.atan2(x, -y) * (5 / (2 * torch.pi))
    tip = (turn - turn.round()).abs() * 2
    return torch.hypot(x, y) - (1.12 - 0.68 * tip)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobes = torch.hypot(x.abs() - 0.46, y + 0.35) - 0.54
    point = torch.maximum(x.abs() * 0.78 + (y - 0.95) * 0.64, -y - 0.2)
    return torch.minimum(lobes, point)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.27


def _cross(x: Tensor, y: Tensor) -> Tensor:
    across = torch.maximum(x.abs() - 1, y.abs() - 0.34)
    return torch.minimum(across, torch.maximum(x.abs() - 0.34, y.abs() - 1))


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1.0, 0.78 - torch.hypot(x - 0.5, y + 0.1))


DISTANCES = {
    "ball": _ball, "box": _box, "cone": _cone, "star": _star,
    "heart": _heart, "ring": _ring, "cross": _cross, "moon": _moon,
}  # fmt: skip


def signed_distance(names: tuple[str, ...], shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y [N, H, W] and each one's shape [N], an index into `names` -> signed distance [N, H, W]."""
    out = torch.empty_like(x)
    for index, name in enumerate(names):
        rows = shape == index
        out[rows] = DISTANCES[name](x[rows], y[rows])
    return out
