"""Frozen matrices in 4 bits and in fp8: what they stand for, what that costs, and that a LoRA learns beside them."""

from __future__ import annotations

import pytest
import test_lora_files_in_runs as runs
import torch
from safetensors.torch import load_file, save_file
from test_lora_files_in_runs import config, relative_error, velocity
from torch import nn
from torch.nn.utils import parametrize

from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, load_weights, read_tensors
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.models import load_model
from srpo_core.models.flux import load_flow
from srpo_core.weights.compressed import FORMS, form_for, put_weight
from srpo_core.weights.eight_bit import Rows
from srpo_core.weights.four_bit import BLOCK, Blocks, nf4_levels, to_blocks

folder = runs.folder  # the fixture
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels that QLoRA's paper prints (appendix E)."""


def settings(folder, **model):
    model = {"family": "flux", "path": str(folder), "dtype": "float32", "recompute": False} | model
    return {"model": model, "lora__rank": 2}


def held(folder, memory: str) -> nn.Module:
    chosen = ModelConfig(path=str(folder), dtype="float32", recompute=False, frozen_memory=memory)
    return load_flow(chosen, "cpu").module


def test_the_levels_are_the_published_ones():
    torch.testing.assert_close(nf4_levels(), torch.tensor(PUBLISHED), atol=1e-5, rtol=0)


def test_weights_take_the_nearest_level_of_their_block():
    weight = torch.randn(6, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    codes, form = Blocks.of(weight, torch.float32)
    assert codes.shape == (6, BLOCK) and codes.dtype == torch.uint8
    back = form(codes)
    assert torch.equal(back[2], torch.zeros(2 * BLOCK))
    scale = (form.scales.float() * form.largest / 255).repeat_interleave(BLOCK, 1)
    distances = (weight.unsqueeze(-1) - scale.unsqueeze(-1) * nf4_levels()).abs()
    torch.testing.assert_close((back - weight).abs(), distances.amin(-1), atol=1e-6, rtol=1e-5)
    reach = weight.view(6, 2, BLOCK).abs().amax(2)
    assert (form.scales.float() * form.largest / 255 >= reach - 1e-6).all()  # no weight is out of reach


@pytest.mark.parametrize(("memory", "expected"), [("8bit", 0.008), ("fp8", 0.026), ("4bit", 0.093)])
def test_what_each_form_costs_on_weights_like_a_normal_distribution(memory, expected):
    """The numbers of the docstrings: the root mean square error by that of the weights, and the bytes."""
    weight = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, form = FORMS[memory].of(weight, torch.float32)
    assert float(relative_error(form(codes), weight)) == pytest.approx(expected, rel=0.08)
    held = codes.numel() * codes.element_size() + sum(b.numel() * b.element_size() for b in form.buffers())
    assert held / weight.numel() == pytest.approx(0.5 + 1 / BLOCK if memory == "4bit" else 1, rel=0.02)
    again, form_again = FORMS[memory].of(form(codes), torch.float32)
    assert relative_error(form_again(again), form(codes)) < 0.002  # what is rounded already stays


def test_every_matrix_of_the_blocks_is_held_in_few_bits_and_no_other(folder):
    module = held(folder, "4bit")
    found = {n: layer for n, layer in module.named_modules() if parametrize.is_parametrized(layer)}
    linears = {n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and "blocks" in n}
    assert set(found) == linears
    for layer in found.values():
        original = layer.parametrizations.weight.original
        assert original.dtype == torch.uint8 and original.numel() == layer.weight.numel() // 2
    assert form_for("4bit", nn.Linear(96, 8)) is Rows  # 8 bits where rows are not whole blocks


def test_a_model_with_fewer_bits_is_off_by_more(folder):
    plain = load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module
    errors = [float(relative_error(velocity(held(folder, memory)), velocity(plain))) for memory in FORMS]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.3


@pytest.mark.parametrize("memory", ["fp8", "4bit"])
def test_a_lora_learns_beside_few_bits_what_it_learns_beside_the_numbers_they_stand_for(folder, tmp_path, memory):
    trainer = assemble(config(folder, tmp_path / "held", **settings(folder, frozen_memory=memory)))
    trainer.train()
    plain = load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module
    compressed = held(folder, memory)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            put_weight(layer, compressed.get_submodule(name).weight)
    plain.save_pretrained(tmp_path / "numbers")
    assemble(config(folder, tmp_path / "plain", **settings(folder, transformer=str(tmp_path / "numbers")))).train()
    ours, theirs = (read_tensors(latest(tmp_path / name), "weights") for name in ("held", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = load_model(trainer.config.model, "cpu").flow.module
    load_weights(latest(tmp_path / "held"), again)
    assert torch.equal(velocity(again), velocity(trainer.flow.module))


def test_the_fp8_matrices_of_a_file_stay_bit_for_bit(folder, tmp_path):
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if n.endswith(".weight") and t.ndim == 2 else t for n, t in weights.items()}
    save_file(small, tmp_path / "fp8.safetensors")
    chosen = ModelConfig(
        path=str(folder), transformer=str(tmp_path / "fp8.safetensors"), dtype="float32", frozen_memory="fp8"
    )
    layer = load_flow(chosen, "cpu").module.get_submodule("transformer_blocks.0.attn.to_q")
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(layer.parametrizations.weight.original.view(torch.uint8), small[name].view(torch.uint8))
    assert torch.equal(layer.weight, small[name].float())


def test_all_weights_cannot_be_trained_in_4_bits(folder, tmp_path):
    chosen = settings(folder, frozen_memory="4bit") | {"lora__rank": 0}
    with pytest.raises(ConfigError, match=r"model\.frozen_memory='4bit'.*lora\.rank=0"):
        assemble(config(folder, tmp_path, **chosen))


def test_codes_are_made_without_computing_too():
    codes, scales, largest = to_blocks(torch.empty(4, 128, device="meta"))
    assert codes.shape == (4, 64) and scales.shape == (4, 2) and largest.shape == (4, 1)
