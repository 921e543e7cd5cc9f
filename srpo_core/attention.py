"""Which attention kernel a run uses on its GPU: without gradient the fastest, with gradient one that can be trusted.

cuDNN's forward pass is the fastest on Hopper, but its backward pass gave NaN or illegal accesses on FLUX's shapes
(torch 2.11, H100 and H200), and an illegal access ends the process: it is never tried with gradient. Compiled code
keeps the kernel that was chosen when it was traced, so flows choose in every call, by whether it has a gradient.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from srpo_core.config import ConfigError
from srpo_core.interfaces import FlowModel, PromptBatch

NATIVE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's own kernels by the names of model.attention."""
PACKAGES = {"flash-attn-2": ("flash_attn", "flash"), "flash-attn-3": ("flash_attn_interface", "_flash_3")}
"""Further ones: the module of each, and diffusers' name for it."""
WITHOUT_GRADIENT = ("flash", "cudnn", "efficient", "flash-attn-2", "flash-attn-3")
WITH_GRADIENT = ("flash", "efficient", "flash-attn-2", "flash-attn-3")
"""Those that are tried, the usual one first."""
TOLERANCE = 0.02
"""Relative error against float32 that bfloat16 stays well under."""
GAIN = 0.97
"""Share of the usual kernel's time that another one must stay under: what is about as fast isn't worth a change."""
HEADS = 2
"""Heads that are compared with float32."""
TRIES, WARM_UP = 8, 3


@dataclass(frozen=True)
class Attention:
    """The kernels of calls without and with gradient: names of model.attention, or "native" for PyTorch's choice."""

    rollout: str = "native"
    gradient: str = "native"

    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the context calls use their kernel, by whether gradients are enabled now."""
        return self.with_gradient() if torch.is_grad_enabled() else self.without_gradient()

    def without_gradient(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the context the rollout's kernel is used."""
        return contextlib.nullcontext() if self.rollout == "native" else kernel(self.rollout)

    def with_gradient(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the context the gradient step's kernel is used.

        Recomputed blocks choose theirs in the backward pass, so that belongs inside too.
        """
        return _without_cudnn() if self.gradient == "native" else kernel(self.gradient)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def kernel(name: str) -> contextlib.AbstractContextManager[Any]:
    """Inside the context attention takes a kernel; where PyTorch's own can't do a call, the next one that can."""
    if name in PACKAGES:
        from diffusers.models.attention_dispatch import attention_backend

        return attention_backend(PACKAGES[name][1])
    order = dict.fromkeys((name, "flash", "efficient", "math"))
    return sdpa_kernel([NATIVE[one] for one in order], set_priority=True)


def choose_attention(
    wanted: str, flow: FlowModel, prompts: PromptBatch, latents: Tensor, guidance: float, packages: bool = True
) -> tuple[Attention, str]:
    """The kernels of a run, and a line about them for the user ("" where there is nothing to choose).

    `prompts` and `latents` have the run's shapes; auto calls the flow once to see what its attention works on, and
    tries no further `packages` where these aren't wanted.
    ConfigError for a kernel that isn't there.
    """
    if wanted in PACKAGES and importlib.util.find_spec(PACKAGES[wanted][0]) is None:
        there = ", ".join(("auto", "native", *(name for name in (*NATIVE, *PACKAGES) if _is_there(name))))
        raise ConfigError(f"model.attention={wanted!r}: the package {PACKAGES[wanted][0]} isn't there; {there} are")
    if wanted == "native" or not latents.is_cuda:
        return Attention(), ""
    if wanted == "cudnn":
        return Attention("cudnn"), "attention: cudnn without gradient, PyTorch's choice of the others with it"
    if wanted in NATIVE:
        return Attention(wanted, wanted), ""
    query, is_wide = _query_of(flow, prompts, latents, guidance)
    if wanted in PACKAGES:
        if is_wide:
            raise ConfigError(
                f"model.attention={wanted!r} takes queries in bfloat16, this run's are in float32; model.dtype and"
                " model.trained_memory=bfloat16 change that, or set it to auto"
            )
        return Attention(wanted, wanted), ""
    if query is None or query.dtype == torch.float32:
        return Attention(), ""
    return _measured(query, {**NATIVE, **PACKAGES} if packages and not is_wide else NATIVE)


def _is_there(name: str) -> bool:
    return name in NATIVE or importlib.util.find_spec(PACKAGES[name][0]) is not None


def _measured(query: Tensor, suitable: Container[str]) -> tuple[Attention, str]:
    """The fastest of the `suitable` kernels for queries of a shape [B, heads, tokens, width]."""
    told, chosen = [], []
    for names, gradient in ((WITHOUT_GRADIENT, False), (WITH_GRADIENT, True)):
        tried = [name for name in names if name in suitable and _is_there(name)]
        times = {name: seconds for name in tried if (seconds := trial(name, query, gradient))}
        chosen.append(fastest(times))
        listed = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in times.items())
        told.append(f"{chosen[-1]} {'with' if gradient else 'without'} gradient ({listed or 'none agrees'})")
    shape = " x ".join(map(str, query.shape))
    return Attention(*chosen), f"attention of {shape}: {'; '.join(told)}"


def fastest(times: dict[str, float]) -> str:
    """The kernel of the least time; the first one unless another is clearly faster; "native" if there is none."""
    if not times:
        return "native"
    usual, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] < GAIN * times[usual] else usual


class _Seen(TorchFunctionMode):
    """Notes the first query that attention gets."""

    query: Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.query is None:
            self.query = args[0] if args else kwargs["query"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _query_of(flow: FlowModel, prompts: PromptBatch, latents: Tensor, guidance: float) -> tuple[Tensor | None, bool]:
    """A query of the flow's attention, in the precision that it is worked out in; None if there is none.

    And whether it comes in float32: autocast narrows it for PyTorch's own kernels alone.
    """
    with _Seen() as seen:
        flow.velocity(latents, torch.full((len(latents),), 0.9, device=latents.device), prompts, guidance)
    if seen.query is None:
        return None, False
    return seen.query.to(getattr(flow, "dtype", seen.query.dtype)), seen.query.dtype == torch.float32


def trial(name: str, like: Tensor, gradient: bool) -> float | None:
    """Seconds of a kernel on random numbers of a query's shape; None if it can't do that or its results are wrong."""
    generator = torch.Generator(like.device).manual_seed(0)
    numbers = torch.randn(4, *like.shape, generator=generator, device=like.device).to(like.dtype)
    *inputs, upstream = (part.detach().requires_grad_(gradient) for part in numbers)
    try:
        with kernel(name) if name in PACKAGES else sdpa_kernel(NATIVE[name]), torch.set_grad_enabled(gradient):
            ours = _results(name, inputs, upstream.detach(), gradient)
            few = [part[:, :HEADS].detach().float().requires_grad_(gradient) for part in inputs]
            with sdpa_kernel(SDPBackend.MATH):
                exact = _results("math", few, upstream[:, :HEADS].detach().float(), gradient)
            for mine, theirs in zip(ours, exact, strict=True):
                error = (mine[:, :HEADS].float() - theirs).norm() / theirs.norm()
                if not float(error) < TOLERANCE:
                    return None
            return _seconds(lambda: _results(name, inputs, upstream.detach(), gradient), like.device)
    except (RuntimeError, ValueError, TypeError, ImportError):  # a kernel that can't, each in its own words
        return None


def _results(name: str, inputs: list[Tensor], upstream: Tensor, gradient: bool) -> list[Tensor]:
    """The attention of query, key and value, with their gradients where these are wanted."""
    if name in PACKAGES:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out = dispatch_attention_fn(*(part.transpose(1, 2) for part in inputs)).transpose(1, 2)
    else:
        out = F.scaled_dot_product_attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)] if gradient else [out]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, on the device's own clock."""
    for _ in range(WARM_UP):
        work()
    if device.type != "cuda":
        raise RuntimeError(f"attention kernels are measured on NVIDIA GPUs, not on {device.type}")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    for _ in range(TRIES):
        work()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / TRIES
