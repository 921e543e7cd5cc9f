"""`compact_adamw`'s updates as one kernel for NVIDIA GPUs: each number is read once and written once.

It computes what `update_8bit` and `update_plain` do, in their order, with their random numbers; results differ in the
last digit at most, where a GPU's division and roots do.
"""

# ruff: noqa: ANN001 (arguments of a kernel have types of Triton's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_core.moments import BLOCK, OCTAVE

ROWS = 4
"""Blocks of moments that one program updates."""


@triton.jit
def _mixed(bits):
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=["index"])
def _kernel(
    weight, gradient, first, first_scale, second, second_scale, numbers, seeds, index, count,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr, decay: tl.constexpr, IN_8BIT: tl.constexpr,
    NARROW: tl.constexpr, PER_OCTAVE: tl.constexpr, SIDE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    place = rows[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    there = place < count
    row_there = rows * SIDE < count
    lr, rate, root = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    factor = tl.load(numbers + 3)
    bits = _mixed(place.to(tl.uint32) * 0x9E3779B9 + tl.load(seeds + index).to(tl.uint32, bitcast=True))
    w = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32) * factor
    if IN_8BIT:
        part = tl.load(first + place, mask=there, other=0).to(tl.float32) / 127
        m = part * tl.abs(part) * tl.load(first_scale + rows, mask=row_there, other=0.0)[:, None]
        codes = tl.load(second + place, mask=there, other=0).to(tl.float32)
        scale = tl.load(second_scale + rows, mask=row_there, other=0.0)[:, None]
        v = tl.where(codes > 0, tl.exp2((codes - 255) / PER_OCTAVE) * scale, 0.0)
    else:
        m = tl.load(first + place, mask=there, other=0.0)
        v = tl.load(second + place, mask=there, other=0.0)
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    w = w * (1 - lr * decay) - rate * m / (tl.sqrt(v) / root + eps)
    if NARROW:
        raised = (w.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        tl.store(weight + place, raised.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=there)
    else:
        tl.store(weight + place, w, mask=there)
    if IN_8BIT:
        draws = _mixed(bits ^ 0x5BD1E995)
        size = tl.abs(m)
        top = tl.max(size, 1)
        share = size / tl.where(top > 0, top, 1.0)[:, None]
        low = tl.floor(tl.sqrt(share) * 127)
        up = ((draws & 0xFFF).to(tl.float32) + 0.5) / 4096 < (share * 16129 - low * low) / (2 * low + 1)
        code = tl.minimum(low + tl.where(up, 1.0, 0.0), 127.0)
        tl.store(first + place, tl.where(m < 0, -code, code).to(tl.int8), mask=there)
        tl.store(first_scale + rows, top, mask=row_there)
        exponent = tl.ceil(tl.log2(tl.maximum(tl.max(v, 1), 7.52316384526264e-37)))  # 2^-120
        octaves = tl.log2(tl.maximum(v, 1.1754943508222875e-38)) - exponent[:, None]  # 2^-126
        octaves = tl.minimum(tl.maximum(octaves, -254 / PER_OCTAVE), 0.0) * PER_OCTAVE
        low = tl.floor(octaves)
        rise = (tl.exp2((octaves - low) / PER_OCTAVE) - 1) / (2 ** (1 / PER_OCTAVE) - 1)
        up = (((draws >> 12) & 0xFFF).to(tl.float32) + 0.5) / 4096 < rise
        code = tl.minimum(low + 255 + tl.where(up, 1.0, 0.0), 255.0)
        tl.store(second + place, tl.where(v > 0, code, 0.0).to(tl.uint8), mask=there)
        tl.store(second_scale + rows, tl.exp2(exponent), mask=row_there)
    else:
        tl.store(first + place, m, mask=there)
        tl.store(second + place, v, mask=there)


def update(
    weight: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    numbers: Tensor,
    seeds: Tensor,
    index: int,
    constants: tuple[float, float, float, float],
) -> None:
    """Update a contiguous weight and its moments in place: both in float32, or codes and scales of both.

    On a GPU it must be the current device. `numbers` [4] and `seeds`, of which number `index` is the weight's, are
    CompactAdamW's.
    """
    in_8bit = len(moments) == 4
    first, first_scale, second, second_scale = moments if in_8bit else (moments[0], moments[0], moments[1], moments[1])
    count = weight.numel()
    _kernel[(triton.cdiv(count, ROWS * BLOCK),)](
        weight, gradient, first, first_scale, second, second_scale, numbers, seeds, index, count, *constants,
        IN_8BIT=in_8bit, NARROW=weight.dtype == torch.bfloat16, PER_OCTAVE=OCTAVE, SIDE=BLOCK, HIGH=ROWS,
    )  # fmt: skip
