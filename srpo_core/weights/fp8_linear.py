"""Linear layers in fp8 (e4m3): codes with a scale for each row of the weight and of the activations.

On an NVIDIA GPU that multiplies fp8 numbers the product is `torch._scaled_mm`; on a CPU the same codes are multiplied
in float32, so both round in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srpo_core.config import ConfigError

from .eight_bit import to_fp8_rows

MULTIPLE = 16
"""Both sides of a weight must be multiples of this."""
CAPABILITY = (8, 9)
"""The first NVIDIA GPUs that multiply fp8 numbers: Ada, then Hopper."""
TOLERANCE = 0.01
PARTS = ("codes", "scale", "down", "up")
"""What an `Fp8Linear` is given."""


def scaled_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(codes * scale) [rows, in] times the transpose of (weight * weight_scale) [out, in]: bfloat16 [rows, out]."""
    if codes.is_cuda:
        return torch._scaled_mm(
            codes, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    with torch.autocast(codes.device.type, enabled=False):
        return (codes.float() @ weight.float().t() * scale * weight_scale.t()).bfloat16()


class Fp8Linear(nn.Module):
    """A linear layer whose weight [out, in] is held as codes and scales, given to it before it is called.

    Input and output are those of `nn.Linear`; the output is in `dtype`. With `down` [r, in] and `up` [out, r], in that
    precision too, there is a LoRA beside it.
    """

    def __init__(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self.dtype = bias, dtype
        for name in PARTS:
            self.register_buffer(name, None, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        out = scaled_product(*to_fp8_rows(rows), self.codes, self.scale)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        out = out.to(self.dtype)
        if self.down is not None:
            out = out + F.linear(F.linear(rows.to(self.dtype), self.down), self.up)
        return out.view(*inputs.shape[:-1], out.shape[-1])


def takes_fp8(out_features: int, in_features: int) -> bool:
    """Whether a weight's sides are such that it can be multiplied in fp8."""
    return out_features % MULTIPLE == 0 and in_features % MULTIPLE == 0


def check_fp8(device: torch.device, setting: str) -> None:
    """ConfigError, in the words of `setting`, unless the device multiplies fp8 numbers by rows; tried on a small one.

    A CPU does in float32, which is slow: for tests.
    """
    if device.type == "cpu":
        return
    choices = "set it to model"
    if device.type != "cuda":
        raise ConfigError(f"{setting}: {device.type} has no products in fp8, NVIDIA GPUs have from Ada on; {choices}")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ConfigError(
            f"{setting}: {name} (compute capability {capability[0]}.{capability[1]}) has no products in fp8, which"
            f" came with {CAPABILITY[0]}.{CAPABILITY[1]}; {choices}"
        )
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(rows, 128, generator=generator) for rows in (40, 96)]
    parts = [part for matrix in numbers for part in to_fp8_rows(matrix)]
    exact = scaled_product(*parts).float()
    try:
        ours = scaled_product(*(part.to(device) for part in parts)).float().cpu()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}: {name} can't multiply fp8 numbers by rows ({reason}); {choices}") from error
    if not float((ours - exact).norm() / exact.norm()) < TOLERANCE:
        raise ConfigError(f"{setting}: products in fp8 are wrong on {name} with this version of torch; {choices}")
