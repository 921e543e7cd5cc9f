"""The optimizer, the course of its learning rate, and the running average of what it trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

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


def make_optimizer(parameters: Parameters, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, in their order."""
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
    """Inverse of `optimizer_tensors`. KeyError for a state of a parameter that isn't trained."""
    index = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(index[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """An exponential moving average of trained parameters, on their device.

    `shared`: something else holds the parameters' memory too, so that weights can't just change places.
    """

    def __init__(self, parameters: Parameters, decay: float, shared: bool = False) -> None:
        self.parameters = parameters
        self.decay, self.shared = decay, shared
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step. Early steps count more, or a short run's average would hardly move."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the context; weights are swapped, not copied, unless shared."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            if self.shared:
                kept = parameter.detach().clone()
                parameter.copy_(self.tensors[name])
                self.tensors[name].copy_(kept)
            else:
                parameter.data, self.tensors[name] = self.tensors[name], parameter.data
