"""Moments in 8 bits: right on average, near AdamW's own, saved and taken up as they are."""

from __future__ import annotations

import os

import pytest
import torch
from test_resume import COURSE, whole_and_resumed
from tiny import tiny_config
from torch import nn

from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, read_tensors
from srpo_core.compact_adamw import BLOCK, CODES, CompactAdamW
from srpo_core.config import OptimConfig
from srpo_core.moments import first_codes, first_values, second_codes, second_values
from srpo_core.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors

SETTINGS = {"lr": 5e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}


def spread(count: int = 16, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes [count, 256]."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, BLOCK, generator=generator)
    return numbers * torch.exp(torch.randn(count, BLOCK, generator=generator)) * 1e-4


def average_of(encode, decode, values: torch.Tensor, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros_like(values, dtype=torch.float64)
    for _ in range(count):
        total += decode(*encode(values, torch.rand(values.shape, generator=generator)))
    return total / count


def test_first_moments_are_right_on_average_and_to_one_code():
    values = spread(2)
    largest = values.abs().amax(1, keepdim=True)
    distance = ((values.abs() / largest).sqrt() * 127 + 1) * 2 / 127**2 * largest  # between neighbouring codes
    once = first_values(*first_codes(values, torch.rand(values.shape, generator=torch.Generator().manual_seed(2))))
    assert ((once - values).abs() <= distance).all()
    assert torch.equal(once.sign()[values.abs() > distance], values.sign()[values.abs() > distance])
    mean = average_of(first_codes, first_values, values)
    assert ((mean - values).abs() < 6 * 0.5 * distance / 4000**0.5).all()


def test_second_moments_are_right_on_average_within_their_range_and_never_lost():
    values = spread(2).square()
    codes, scale = second_codes(values, torch.full_like(values, 0.5))
    held = second_values(codes, scale)
    inside = values >= scale * 2.0 ** (-254 / 10)
    assert inside.float().mean() > 0.98
    assert ((held / values).log2().abs()[inside] <= 0.1001).all()  # a tenth of an octave
    assert (held[~inside] >= values[~inside]).all()  # rounded up: updates only become smaller
    nothing = torch.zeros(1, BLOCK)
    assert torch.equal(second_values(*second_codes(nothing, nothing)), nothing)
    mean = average_of(second_codes, second_values, values)
    assert ((mean / values - 1).abs()[inside] < 6 * 0.036 / 4000**0.5).all()


def test_what_changes_by_less_than_a_code_still_changes():
    """Fifty steps without gradient: first moments decay by 0.9 each, second ones by 0.999, on average."""
    first, second = torch.full((64, BLOCK), 1e-3), torch.full((64, BLOCK), 1e-6)
    first[:, 0], second[:, 0] = 1.0, 1.0  # a block's largest, of which the others are far off
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draws = torch.rand(2, 64, BLOCK, generator=generator)
        first = torch.cat([torch.ones(64, 1), first_values(*first_codes(first, draws[0]))[:, 1:] * 0.9], 1)
        second = torch.cat([torch.ones(64, 1), second_values(*second_codes(second, draws[1]))[:, 1:] * 0.999], 1)
    assert float(first[:, 1:].mean()) == pytest.approx(1e-3 * 0.9**50, rel=0.25)
    assert float(second[:, 1:].mean()) == pytest.approx(1e-6 * 0.999**50, rel=0.01)


def learned(optimizer_of, steps: int = 50) -> torch.Tensor:
    """What 50 steps with noisy gradients of many sizes add to weights."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(64, BLOCK, generator=generator) * 0.02
    sizes = torch.exp(torch.randn(64, BLOCK, generator=generator)) * 1e-4
    pull = torch.randn(64, BLOCK, generator=generator)
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of([weight])
    for _ in range(steps):
        weight.grad = (0.3 * pull + torch.randn(64, BLOCK, generator=generator)) * sizes
        optimizer.step()
    return weight.detach() - start


def test_fifty_steps_are_near_those_of_adamw_and_no_shorter():
    exact = learned(lambda weights: torch.optim.AdamW(weights, **SETTINGS))
    ours = learned(lambda weights: CompactAdamW(weights, **SETTINGS, in_8bit=True))
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.07
    assert float((ours * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.01)


def test_small_and_uneven_parameters_keep_their_moments_in_float32():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (63, 65), (128,))]
    optimizer = CompactAdamW(parameters, **SETTINGS, in_8bit=True)
    assert [set(optimizer.state[p]) - {"step"} == set(CODES) for p in parameters] == [True, False, False]
    held = sum(t.numel() * t.element_size() for name, t in optimizer.state[parameters[0]].items() if name != "step")
    assert held == 4096 * 2 + 4096 // BLOCK * 8


def test_an_update_in_pieces_is_that_of_the_whole(monkeypatch):
    from srpo_core import compact_adamw

    results = []
    for piece in (2**22, 4 * BLOCK):
        monkeypatch.setattr(compact_adamw, "PIECE", piece)
        weight = nn.Parameter(spread(64).to(torch.bfloat16))
        optimizer = CompactAdamW([weight], **SETTINGS | {"lr": 1e-4}, in_8bit=True)
        for _ in range(3):
            weight.grad = weight.detach().clone()
            optimizer.step()
        results.append([weight.detach(), *(optimizer.state[weight][name] for name in CODES)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_states_are_converted_into_each_other():
    """AdamW's own state, put into 8 bits and back, is off by what codes are off by."""

    def trained(states: str):
        parameters = {"a": nn.Parameter(torch.zeros(64, 64)), "b": nn.Parameter(torch.zeros(3))}
        return parameters, make_optimizer(parameters, OptimConfig(states=states))

    (wide, adamw), (narrow, compact), (again, other) = trained("float32"), trained("8bit"), trained("float32")
    for parameter in wide.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    adamw.step()
    state = optimizer_tensors(adamw, wide)
    load_optimizer_tensors(compact, narrow, state)
    held = optimizer_tensors(compact, narrow)
    of_b = {"b/step", "b/exp_avg", "b/exp_avg_sq"}
    assert set(held) == {f"a/{name}" for name in ("step", *CODES)} | of_b
    load_optimizer_tensors(other, again, held)
    back = optimizer_tensors(other, again)
    assert back.keys() == state.keys() and back["a/step"] == 1
    assert torch.equal(back["b/exp_avg"], state["b/exp_avg"])
    for name, limit in (("exp_avg", 0.01), ("exp_avg_sq", 0.03)):
        assert float((back[f"a/{name}"] - state[f"a/{name}"]).norm() / state[f"a/{name}"].norm()) < limit


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole_and_resumed(tmp_path, **COURSE, optim__states="8bit")
    saved = read_tensors(latest(tmp_path / "whole"), "optimizer")
    assert {t.dtype for name, t in saved.items() if name.endswith("_codes")} == {torch.int8, torch.uint8}
    assert all(torch.equal(t, read_tensors(latest(tmp_path / "broken"), "optimizer")[n]) for n, t in saved.items())


@pytest.mark.parametrize(("before", "after"), [("float32", "8bit"), ("8bit", "float32")])
def test_a_run_goes_on_with_states_held_otherwise(tmp_path, before, after):
    assemble(tiny_config(tmp_path, optim__steps=2, optim__states=before)).train()
    trainer = assemble(tiny_config(tmp_path, optim__steps=3, optim__states=after))
    assert trainer.train(resume=True).step == 3
    assert any(name.endswith("_codes") for name in read_tensors(latest(tmp_path), "optimizer")) == (after == "8bit")


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="a GPU, or Triton with TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "in_8bit"), [((40, 512), True), ((37, 51), True), ((8, 512), False)])
def test_the_kernel_does_what_the_sums_do(dtype, shape, in_8bit):
    """The same random numbers, and sums to the last digit."""
    from srpo_core import adamw_kernel

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    results = []
    for interpreted in (False, True):
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(size, generator=generator) * 0.02 for size in (3, shape)]
        weights = [nn.Parameter(start.to(device, dtype)) for start in starts]
        optimizer = CompactAdamW(weights, **SETTINGS | {"lr": 1e-3}, in_8bit=in_8bit, seed=3)
        optimizer.uses_kernel = interpreted and on_gpu
        if interpreted and not on_gpu:

            def through(parameter, *rest, held=optimizer.state):
                moments = [t for name, t in held[parameter].items() if name != "step"]
                adamw_kernel.update(parameter.detach(), parameter.grad, moments, *rest[:3], tuple(rest[3]))

            optimizer._update = through
        for _ in range(4):
            for weight in weights:
                noise = torch.randn(2, *weight.shape, generator=generator)
                weight.grad = (noise[0] * torch.exp(noise[1]) * 1e-3).to(device, dtype)
            optimizer.step()
        results.append([weights[1].detach(), *(t for n, t in optimizer.state[weights[1]].items() if n != "step")])
    for ours, theirs in zip(*results, strict=True):
        close = torch.isclose(ours.float(), theirs.float(), rtol=1e-5, atol=1e-9)
        assert (~close).float().mean() < 1e-3  # a draw next to its limit
