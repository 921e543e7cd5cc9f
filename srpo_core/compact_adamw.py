"""AdamW (arXiv 1711.05101) for weights held in bfloat16 or moments held in 8 bits, or both.

Sums are done in float32. Weights in bfloat16 are rounded stochastically: their spacing is 1/256 to 1/128 of their size,
and most updates are far smaller, which rounding to the nearest would lose altogether. Random numbers are a function of
(seed, step, parameter, place in it), so a resumed run draws those of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srpo_core.moments import (
    BLOCK,
    first_codes,
    first_values,
    mixed,
    random_bits,
    rounded,
    second_codes,
    second_values,
    uniform,
)
from srpo_core.transfer import sent

SMALLEST = 4096
"""Parameters of fewer numbers, or not of whole blocks, keep their moments in float32."""
PIECE = 2**22
"""Numbers that are updated at once without a kernel: a few hundred MB of temporary tensors at most."""
CODES = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Constants(NamedTuple):
    """What is the same in every step."""

    beta1: float
    beta2: float
    eps: float
    decay: float


class CompactAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, but for how it holds things.

    State of a parameter: "step" and either "exp_avg" and "exp_avg_sq" in float32, or, `in_8bit` and large enough, the
    codes and scales of both in blocks of 256 numbers (CODES). They are there from the start.
    """

    uses_kernel = importlib.util.find_spec("triton") is not None
    """Whether updates on a GPU are one kernel each (adamw_kernel); otherwise they are done in pieces."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        in_8bit: bool,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.in_8bit, self.seed = in_8bit, seed
        self.report: Callable[[str], None] = warnings.warn
        """Is told what makes steps take longer."""
        for parameter in self._parameters():
            self.state[parameter] = self._empty_state(parameter)
        self._steps = [state["step"] for state in self.state.values()]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        zeros, count = parameter.detach().new_zeros, parameter.numel()
        state = {"step": torch.zeros(())}
        if not self.in_8bit or count < SMALLEST or count % BLOCK:
            return state | {name: zeros(parameter.shape, dtype=torch.float32) for name in MOMENTS}
        blocks = count // BLOCK
        for codes, scale, dtype in ((*CODES[:2], torch.int8), (*CODES[2:], torch.uint8)):
            state[codes] = zeros((blocks, BLOCK), dtype=dtype)
            state[scale] = zeros((blocks, 1), dtype=torch.float32)
        return state

    def put_state(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Give a parameter its state, in this optimizer's form or the other: moments are encoded or decoded."""
        state = self.state[parameter]
        held = {name: tensor.to(state["step" if name == "step" else _any_moment(state)].device)
                for name, tensor in tensors.items()}  # fmt: skip
        state["step"].copy_(held["step"])
        for name in state.keys() - {"step"}:
            if name not in held:
                held |= _encoded(held) if name in CODES else decoded(held, parameter.shape)
            state[name].copy_(held[name].view_as(state[name]))

    @torch.no_grad()
    def step(self, closure: Any = None, scale: Tensor | None = None) -> None:
        """An update of every parameter that has a gradient, which is first scaled by `scale`, a number on its device.

        Its memory beyond the states is small. Parameters are on one device and have made as many steps each.
        """
        torch._foreach_add_(self._steps, 1)
        for group in self.param_groups:
            constants = Constants(*group["betas"], group["eps"], group["weight_decay"])
            device = group["params"][0].device
            numbers, seeds = self._numbers(group["lr"], constants, device, int(self._steps[0]))
            if scale is not None:
                numbers[3] = scale
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                for i, parameter in enumerate(group["params"]):
                    if parameter.grad is not None and parameter.numel():
                        self._update(parameter, numbers, seeds, i, constants)

    def _numbers(self, lr: float, constants: Constants, device: torch.device, step: int) -> tuple[Tensor, Tensor]:
        """What a step's updates take: [lr, lr / bias correction of the first moment, root of the second's, scale of the
        gradient], and a seed for each parameter, int32."""
        rate, root = lr / (1 - constants.beta1**step), (1 - constants.beta2**step) ** 0.5
        count = len(self._parameters())
        digests = (hashlib.sha256(f"{self.seed} {step} {i} rounding".encode()).digest() for i in range(count))
        seeds = [int.from_bytes(digest[:4], "little", signed=True) for digest in digests]
        numbers = torch.tensor([lr, rate, root, 1.0], dtype=torch.float32)
        return sent(numbers, device), sent(torch.tensor(seeds, dtype=torch.int32), device)

    def _update(self, parameter: nn.Parameter, numbers: Tensor, seeds: Tensor, i: int, constants: Constants) -> None:
        state = self.state[parameter]
        in_8bit = CODES[0] in state
        moments = [state[name] for name in (CODES if in_8bit else MOMENTS)]
        if parameter.is_cuda and self.uses_kernel:
            from srpo_core import adamw_kernel

            try:
                return adamw_kernel.update(
                    parameter, parameter.grad.contiguous(), moments, numbers, seeds, i, constants
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many kinds, before anything is computed: it can't be compiled here
                self.report(f"the optimizer's kernel can't be compiled, so its steps take seconds longer: {error}")
                self.uses_kernel = False
        shape, update = ((-1, BLOCK), update_8bit) if in_8bit else ((-1,), update_plain)
        whole = [parameter.detach().view(shape), parameter.grad.reshape(shape)]
        whole += moments if in_8bit else [moment.view(shape) for moment in moments]
        rows = max(1, PIECE // (BLOCK if in_8bit else 1))
        for start in range(0, len(whole[0]), rows):
            pieces = (tensor[start : start + rows] for tensor in whole)
            update(*pieces, numbers, seeds[i], start * (BLOCK if in_8bit else 1), constants)


def _any_moment(state: dict[str, Tensor]) -> str:
    return next(name for name in state if name != "step")


def _encoded(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes of moments in float32, each rounded to the nearest in its own way."""
    first, second = (moments[name].float().reshape(-1, BLOCK) for name in MOMENTS)
    half = torch.full_like(first, 0.5)
    return dict(zip(CODES, (*first_codes(first, half), *second_codes(second, half)), strict=True))


def decoded(state: dict[str, Tensor], shape: Iterable[int]) -> dict[str, Tensor]:
    """Moments in float32 of a state in 8 bits."""
    first, first_scale, second, second_scale = (state[name] for name in CODES)
    moments = first_values(first, first_scale), second_values(second, second_scale)
    return {name: moment.view(*shape) for name, moment in zip(MOMENTS, moments, strict=True)}


def update_8bit(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    numbers: Tensor,
    seed: Tensor,
    start: int,
    constants: Constants,
) -> None:
    """Update a weight [n, 256] and its moments' codes [n, 256] and scales [n, 1] in place.

    `start` is the place of its first number in the parameter; see CompactAdamW._numbers for `numbers` and `seed`.
    """
    bits = random_bits(seed, start, weight)
    moments = first_values(first, first_scale), second_values(second, second_scale)
    value, m, v = _adamw(weight.float(), gradient.float(), *moments, numbers, constants)
    _store(weight, value, bits)
    draws = mixed(bits ^ 0x5BD1E995)
    held = first, first_scale, second, second_scale
    new = *first_codes(m, uniform(draws, 0)), *second_codes(v, uniform(draws, 12))
    for tensor, value in zip(held, new, strict=True):
        tensor.copy_(value)


def update_plain(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    numbers: Tensor,
    seed: Tensor,
    start: int,
    constants: Constants,
) -> None:
    """Update a weight [n] and its moments [n], float32, in place; see `update_8bit`."""
    value, m, v = _adamw(weight.float(), gradient.float(), first, second, numbers, constants)
    _store(weight, value, random_bits(seed, start, weight))
    first.copy_(m)
    second.copy_(v)


def _adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor, constants: Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """The new weight and moments, as torch.optim.AdamW computes them in float32."""
    lr, rate, root, scale = numbers.unbind()
    gradient = gradient * scale
    first = first + (gradient - first) * (1 - constants.beta1)
    second = second * constants.beta2 + gradient * gradient * (1 - constants.beta2)
    weight = weight * (1 - lr * constants.decay)
    return weight - rate * first / (second.sqrt() / root + constants.eps), first, second


def _store(weight: Tensor, value: Tensor, bits: Tensor) -> None:
    weight.copy_(rounded(value, bits) if weight.dtype == torch.bfloat16 else value)
