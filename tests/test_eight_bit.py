"""Frozen matrices in 8 bits beside a LoRA: what they stand for, what it costs, and that training goes on as ever."""

from __future__ import annotations

import pytest
import test_lora_files_in_runs as runs
import torch
from flux_runs import load_transformer
from safetensors.torch import load_file, save_file
from test_lora_files_in_runs import config, lora_file, relative_error, velocity
from torch import nn
from torch.nn.utils import parametrize

from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, load_weights, read_tensors
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.export import export_run
from srpo_core.models import load_model
from srpo_core.models.flux import load_flow
from srpo_core.weights.compressed import put_weight
from srpo_core.weights.eight_bit import to_rows

folder = runs.folder  # the fixture


def settings(folder, **model):
    model = {"family": "flux", "path": str(folder), "dtype": "float32", "recompute": False} | model
    return {"model": model, "lora__rank": 2}


def in_8bit(folder):
    chosen = ModelConfig(path=str(folder), dtype="float32", recompute=False, frozen_memory="8bit")
    return load_flow(chosen, "cpu").module


def expanded(folder):
    """The numbers that the codes stand for, in a module of plain layers."""
    plain, held = (
        load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module,
        in_8bit(folder),
    )
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            put_weight(layer, held.get_submodule(name).weight)
    return plain


def test_every_matrix_of_the_blocks_is_held_in_8_bits_and_no_other(folder):
    module = in_8bit(folder)
    held = {n for n, layer in module.named_modules() if parametrize.is_parametrized(layer)}
    linears = {n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and "blocks" in n}
    assert held == linears and len(held) > 15
    assert {module.get_submodule(n).parametrizations.weight.original.dtype for n in held} == {torch.int8}
    assert not any(p.requires_grad for p in module.parameters())


def test_rounding_is_half_a_step_at_most_and_moves_the_velocity_little(folder):
    plain = load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module
    held = in_8bit(folder)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            assert ((held.get_submodule(name).weight - layer.weight).abs() <= 0.5001 * step).all()
    assert 0 < relative_error(velocity(held), velocity(plain)) < 0.05


def test_a_lora_learns_beside_8_bits_what_it_learns_beside_the_numbers_they_stand_for(folder, tmp_path):
    """The gradient through expanded weights is that of plain layers: two steps leave the same LoRA."""
    trainer = assemble(config(folder, tmp_path / "held", **settings(folder, frozen_memory="8bit")))
    trainer.train()
    expanded(folder).save_pretrained(tmp_path / "numbers")
    plain = settings(folder, transformer=str(tmp_path / "numbers"))
    assemble(config(folder, tmp_path / "plain", **plain)).train()
    ours, theirs = (read_tensors(latest(tmp_path / name), "weights") for name in ("held", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_recomputed_blocks_give_the_same_lora(folder, tmp_path):
    weights = []
    for recompute in (False, True):
        run_dir = tmp_path / str(recompute)
        assemble(config(folder, run_dir, **settings(folder, frozen_memory="8bit", recompute=recompute))).train()
        weights.append(read_tensors(latest(run_dir), "weights"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("held", "scale", "share"), [("8bit", 0.3, 4), ("4bit", 1.0, 2)])
def test_a_lora_file_merges_into_few_bits(folder, tmp_path, held, scale, share):
    """model.lora changes what the codes stand for by the LoRA, to within their rounding."""
    path = lora_file(tmp_path / "some.safetensors", folder, scale=scale)
    moved = {}
    for memory in ("full", held):
        chosen = ModelConfig(
            family="flux", path=str(folder), dtype="float32", recompute=False, lora=str(path), frozen_memory=memory
        )
        moved[memory] = load_model(chosen, "cpu").flow.module
    base = load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module
    effect = relative_error(velocity(moved["full"]), velocity(base))
    assert relative_error(velocity(moved[held]), velocity(moved["full"])) < effect / share


def test_a_weight_put_into_codes_reads_back_rounded():
    layer = nn.Linear(8, 4)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    put_weight(layer, weight)
    assert torch.equal(layer.weight, weight)
    codes, scale = to_rows(torch.zeros(2, 3))
    assert torch.equal(codes * scale, torch.zeros(2, 3))


def test_all_weights_cannot_be_trained_in_8_bits(folder, tmp_path):
    chosen = settings(folder, frozen_memory="8bit") | {"lora__rank": 0}
    with pytest.raises(ConfigError, match=r"model\.frozen_memory='8bit'.*lora\.rank=0"):
        assemble(config(folder, tmp_path, **chosen))


def test_the_fp8_matrices_of_a_file_stay_as_they_are_in_a_run(folder, tmp_path):
    """They are codes of 8 bits already: as many bytes in memory as in the file, and no second rounding."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if n.endswith(".weight") and t.ndim == 2 else t for n, t in weights.items()}
    save_file(small, tmp_path / "fp8.safetensors")
    chosen = settings(folder, frozen_memory="8bit", transformer=str(tmp_path / "fp8.safetensors"))
    module = assemble(config(folder, tmp_path / "run", **chosen)).flow.module
    held = {n: p for n, p in module.named_parameters() if n.endswith("parametrizations.weight.original")}
    assert len(held) > 15 and {p.dtype for p in held.values()} == {torch.float8_e4m3fn}
    query = module.get_submodule("transformer_blocks.0.attn.to_q.base_layer")
    assert torch.equal(query.weight, small["transformer_blocks.0.attn.to_q.weight"].float())


def test_a_run_in_8_bits_is_drawn_and_exported(folder, tmp_path):
    """Its pictures are those of its own base; its transformer is the base in model.dtype with the LoRA added."""
    trainer = assemble(config(folder, tmp_path / "run", **settings(folder, frozen_memory="8bit")))
    trainer.train()
    again = load_model(trainer.config.model, "cpu").flow.module
    load_weights(latest(tmp_path / "run"), again)
    assert torch.equal(velocity(again), velocity(trainer.flow.module))
    base = load_flow(ModelConfig(path=str(folder), dtype="float32", recompute=False), "cpu").module
    load_weights(latest(tmp_path / "run"), base)
    path = export_run(tmp_path / "run", tmp_path / "whole.safetensors", what="transformer")
    assert relative_error(velocity(load_transformer(path)), velocity(base)) < 1e-5
