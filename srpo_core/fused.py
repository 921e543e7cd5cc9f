"""Small functions of many elementwise operations as one kernel on a GPU: their temporary tensors never exist."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, put through torch.compile where its first argument is on a CUDA device and Triton is there.

    The numbers are the same, but for the last digit of what is not exactly rounded (powers, roots). Elsewhere, and
    where compiling fails, it runs as it is. Inside another compiled function it becomes a part of that one.
    """
    compiled: list[Callable[..., Any] | None] = []

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not is_fused(first.device):
            return function(first, *args)
        if not compiled:
            compiled.append(torch.compile(function, fullgraph=True))
        if compiled[0] is not None:
            try:
                return compiled[0](_plain(first), *args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many kinds: no compiler on the machine, an unknown GPU, ...
                warnings.warn(f"{function.__name__} can't be compiled and runs slower: {error}", stacklevel=2)
                compiled[0] = None
        return function(first, *args)

    return call


def _plain(tensor: Tensor) -> Tensor:
    """The tensor of a frozen parameter: of parameters themselves each shape is compiled for, up to a limit."""
    return tensor if tensor.requires_grad else tensor.detach()


@functools.cache
def is_fused(device: torch.device) -> bool:
    """Whether `fused` functions are compiled on a device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
