"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device: on an NVIDIA GPU it may still be on its way when this returns.

    Not so on a Mac's, whose copies read the host's memory later, when it may hold something else (torch 2.5 to 2.13:
    pytorch issues 139550 and 189690).
    """
    return tensor.to(device, dtype or tensor.dtype, non_blocking=torch.device(device).type == "cuda")
