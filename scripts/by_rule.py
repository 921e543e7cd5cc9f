"""Numbers that two programs make alike without sharing a file: each is a hash of a tensor's name and its place in it.

Integer arithmetic only, so the same on every machine and under every version of torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = (1 << 32) - 1


def by_rule(name: str, shape: Sequence[int], low: float = -1.0, high: float = 1.0) -> Tensor:
    """A float32 tensor of `shape` with values spread evenly over [low, high)."""
    place = torch.arange(math.prod(shape), dtype=torch.int64)
    hashed = (place * 0x9E3779B1 + zlib.crc32(name.encode())) & _LOW
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & _LOW
    return (low + (high - low) * hashed.double() / (1 << 32)).float().view(*shape)


def weight_by_rule(name: str, shape: Sequence[int]) -> Tensor:
    """A weight under which signals neither die nor explode: matrices of unit gain, norms about 1, biases small."""
    if len(shape) == 1:
        return by_rule(name, shape, 0.8, 1.2) if name.endswith("weight") else by_rule(name, shape, -0.2, 0.2)
    if name.endswith(("cls_token", "pos_embed", "embeddings.weight")):
        return by_rule(name, shape)
    edge = math.sqrt(3 / math.prod(shape[1:]))
    return by_rule(name, shape, -edge, edge)
