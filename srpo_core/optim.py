"""The optimizer, the course of its learning rate, and the running average of what it trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from srpo_core.compact_adamw import CODES, CompactAdamW, decoded
from srpo_core.config import OptimConfig

Parameters = Mapping[str, nn.Parameter]


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of optimizer step 1, 2, ...: a linear rise to config.lr at step warmup_steps, then the schedule.

    `linear` and `cosine` fall from config.lr at the first step after warm-up toward 0, which they'd reach at steps + 1.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr


def make_optimizer(parameters: Parameters, config: OptimConfig, seed: int = 0) -> torch.optim.AdamW | CompactAdamW:
    """AdamW over the trained parameters, in their order; `seed` is of what is rounded stochastically, if anything is.

    It is torch's own where weights and moments are all in float32.
    """
    if config.states == "8bit" or any(parameter.dtype != torch.float32 for parameter in parameters.values()):
        in_8bit = config.states == "8bit"
        return CompactAdamW(
            parameters.values(), config.lr, config.betas, config.eps, config.weight_decay, in_8bit, seed
        )
    on_cuda = any(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(
        parameters.values(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True if on_cuda else None,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `<parameter>/<key>`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`; moments of the other form (optim.states) are converted.

    KeyError for a state of a parameter that isn't trained.
    """
    index = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(index[name], {})[key] = tensor
    if isinstance(optimizer, CompactAdamW):
        for i, parameter in enumerate(parameters.values()):
            if i in state:
                optimizer.put_state(parameter, state[i])
        return
    for parameter, held in zip(parameters.values(), (state.get(i, {}) for i in range(len(index))), strict=True):
        if CODES[0] in held:
            moments = decoded(held, parameter.shape)
            step = held["step"]
            held.clear()
            held |= {"step": step, **moments}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, summed in float32 whatever they are held in."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: Parameters, max_norm: float, norm: Tensor) -> None:
    """A step with gradients whose norm is `norm`, scaled down to `max_norm` if that is less."""
    if isinstance(optimizer, CompactAdamW):
        optimizer.step(scale=(max_norm / (norm + 1e-6)).clamp(max=1.0))  # as clip_grads_with_norm_ has it
        return
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    optimizer.step()


class Average:
    """An exponential moving average of trained parameters, in float32.

    It is on the parameters' device; on the host where they are held in bfloat16 to save memory, which costs a copy of
    them to the host after each step. `shared`: something else holds the parameters' memory too, so that weights can't
    just change places.
    """

    def __init__(self, parameters: Parameters, decay: float, shared: bool = False) -> None:
        self.parameters = parameters
        self.decay, self.shared = decay, shared
        self.on_host = any(parameter.dtype != torch.float32 for parameter in parameters.values())
        self.tensors = {name: self._held(parameter).clone() for name, parameter in parameters.items()}
        self._aside: dict[str, Tensor] = {}

    def _held(self, parameter: Tensor) -> Tensor:
        """A parameter as the average holds it."""
        return parameter.detach().to("cpu", torch.float32) if self.on_host else parameter.detach()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step. Early steps count more, or a short run's average would hardly move."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.on_host:
            for name, parameter in self.parameters.items():
                self.tensors[name].lerp_(self._held(parameter), 1 - decay)
            return
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the context, in its own precision.

        Weights are swapped, not copied, unless they are shared, or the average is on the host: they wait there then.
        """
        bring, take_back = (self._bring, self._take_back) if self.on_host else (self._swap, self._swap)
        brought: list[str] = []
        try:
            for name in self.parameters:
                bring(name)
                brought.append(name)
            yield
        finally:
            for name in brought:
                take_back(name)

    @torch.no_grad()
    def _bring(self, name: str) -> None:
        self._aside[name] = self.parameters[name].detach().to("cpu", copy=True)
        self.parameters[name].copy_(self.tensors[name])

    @torch.no_grad()
    def _take_back(self, name: str) -> None:
        self.parameters[name].copy_(self._aside.pop(name))

    @torch.no_grad()
    def _swap(self, name: str) -> None:
        parameter = self.parameters[name]
        if self.shared:
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
        else:
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data
