"""Functions that are one kernel on a GPU: a model's matrices, of many shapes, share what was compiled for a few."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from srpo_core import fused as fusing
from srpo_core.weights import eight_bit, four_bit

SHAPES = [(rows, columns) for rows in (64, 128, 192, 384) for columns in (64, 128, 256, 320, 768)]
"""More than torch.compile keeps code for: FLUX.1-dev's matrices are of 13 shapes."""


@pytest.fixture
def graphs(monkeypatch):
    """As on a GPU, with a backend that notes for how many shapes it is asked, and runs them as they are."""
    seen = []

    def backend(module, inputs):
        seen.append([one.shape for one in inputs if isinstance(one, torch.Tensor)])
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(fusing, "is_fused", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return seen


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [(eight_bit, "expanded_rows", eight_bit.Rows), (four_bit, "expanded_blocks", four_bit.Blocks)],
    ids=["8 bits", "4 bits"],
)
def test_matrices_of_many_shapes_are_expanded_by_one_kernel(graphs, monkeypatch, module, name, kind):
    plain = getattr(module, name).__wrapped__
    compiled = fusing.fused(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*can't be compiled")
        for seed, shape in enumerate(SHAPES):
            weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
            codes, expander = kind.of(weight, torch.float32)
            held, expanded = nn.Parameter(codes, requires_grad=False), []
            for function in (plain, compiled):
                monkeypatch.setattr(module, name, function)
                expanded.append(expander(held))
            assert torch.equal(*expanded)
    assert 1 <= len(graphs) <= 4


def test_what_is_to_learn_keeps_its_gradient(graphs):
    scaled = fusing.fused(lambda first, factor: first * factor)
    weight = torch.ones(3, requires_grad=True)
    scaled(weight, 2.0).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0)) and len(graphs) == 1
