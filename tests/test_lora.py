"""LoRA: no effect at the start, only its own weights train, and its names and numbers are peft's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import encode_text, tiny_config, tiny_flow, weights_hash

from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, read_tensors
from srpo_core.config import ConfigError, LoraConfig
from srpo_core.lora import ChosenLora, add_lora, has_lora, lora_targets
from srpo_core.randomness import generator_for


def velocity(flow) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=generator_for(1, 0, 0, "test"))
    return flow.velocity(latents, torch.full((2,), 0.8), encode_text(["a", "b"]), 3.5)


def test_a_new_lora_changes_nothing_and_freezes_the_base():
    flow = tiny_flow()
    before = velocity(flow)
    names = add_lora(flow.module, LoraConfig(rank=3), flow.lora_targets["all"], generator_for(0, 0, 0, "lora"))
    assert torch.equal(velocity(flow), before)
    assert has_lora(flow.module) and not has_lora(tiny_flow().module)
    assert [name for name, p in flow.module.named_parameters() if p.requires_grad] == names
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)


def test_it_is_the_same_each_time_and_leaves_the_global_generator_alone():
    def fingerprint(seed):
        flow = tiny_flow()
        add_lora(flow.module, LoraConfig(rank=2), flow.lora_targets["all"], generator_for(seed, 0, 0, "lora"))
        return weights_hash(flow.module)

    first = fingerprint(0)
    torch.manual_seed(123)
    assert fingerprint(0) == first != fingerprint(1)


def test_targets_are_layers_inside_blocks():
    flow = tiny_flow()
    names = add_lora(flow.module, LoraConfig(rank=1), ("proj_out",))
    assert {name.split(".lora_")[0] for name in names} == {"single_transformer_blocks.0.proj_out"}


def test_alpha_scales_the_effect():
    effects = []
    for alpha in (None, 4.0):
        flow = tiny_flow()
        base = velocity(flow)
        add_lora(flow.module, LoraConfig(rank=2, alpha=alpha), ("attn.to_out.0",), generator_for(0, 0, 0, "lora"))
        for name, parameter in flow.module.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.constant_(parameter, 1e-3)
        effects.append(velocity(flow) - base)
    ratio = effects[1].norm() / effects[0].norm()
    assert ratio.item() == pytest.approx(2.0, rel=0.01)


def test_training_moves_the_lora_alone(tmp_path):
    trainer = assemble(tiny_config(tmp_path, lora__rank=2, model__dtype="bfloat16", optim__steps=2))
    base = {name: p.detach().clone() for name, p in trainer.flow.module.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in trainer.learner.trained.items()}
    trainer.train()
    after = dict(trainer.flow.module.named_parameters())
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    assert {p.dtype for p in start.values()} == {torch.float32}
    assert not any(torch.equal(start[name], after[name]) for name in start)
    assert read_tensors(latest(tmp_path), "weights").keys() == start.keys()


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:-0.5", "a.safetensors", -0.5),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", 1.0),
        ("C:/loras/a.safetensors:0.8", "C:/loras/a.safetensors", 0.8),
        ("odd:name.safetensors", "odd:name.safetensors", 1.0),
    ],
)
def test_a_file_and_its_strength(text, path, strength):
    assert ChosenLora.parse(text) == ChosenLora(Path(path), strength)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_is_finite(strength):
    with pytest.raises(ConfigError, match=f"a number such as 0.8, not {strength}"):
        ChosenLora.parse(f"a.safetensors:{strength}")


def test_an_unknown_group_is_refused_with_the_groups():
    with pytest.raises(ConfigError, match=r"lora.targets='atention' .*did you mean 'attention'\?.*mlp, all"):
        lora_targets(tiny_flow().lora_targets, "atention")


def test_a_group_without_layers_is_refused():
    with pytest.raises(ConfigError, match="no layers called nothing"):
        add_lora(tiny_flow().module, LoraConfig(rank=1), ("nothing",))
