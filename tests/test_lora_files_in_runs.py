"""Runs on top of a LoRA file, and runs that start from one."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_runs import RANK, config, lora_file, relative_error, save_flux, velocity
from lora_files import named, random_pairs, save
from PIL import Image
from safetensors.torch import load_file
from tiny import weights_hash

from srpo_core import export
from srpo_core.assemble import assemble
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.interfaces import Components
from srpo_core.lora import ChosenLora, merge_lora
from srpo_core.models import load_model
from srpo_core.sampling import SampleSettings, sample
from srpo_core.weights.flux_names import rename
from srpo_core.weights.lora_names import read_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux") / "flux")


# ---- model.lora


def test_a_lora_is_merged_into_the_base(folder, tmp_path):
    path = lora_file(tmp_path / "lora.safetensors", folder)
    plain = ModelConfig(path=str(folder), dtype="float32", recompute=False)
    expected = load_model(plain, "cpu").flow.module
    untouched = velocity(expected)
    merge_lora(expected, read_lora(path, ""), -0.5)
    parts = load_model(plain.model_copy(update={"lora": str(path), "lora_strength": -0.5}), "cpu")
    assert next(parts.outline().module.parameters()).device.type == "meta"
    assert torch.equal(velocity(parts.flow.module), velocity(expected))
    assert parts.flow is parts.flow and parts.autoencoder is parts.autoencoder
    assert not torch.allclose(velocity(expected), untouched, rtol=1e-2)
    parts.release("text_encoder")


def test_other_parts_and_notes_stand_beside_a_merged_lora(folder, tmp_path):
    tensors = load_file(lora_file(tmp_path / "plain.safetensors", folder))
    tensors |= {"lora_te1_x.lora_down.weight": torch.ones(2, 8), "lora_te1_x.lora_up.weight": torch.ones(8, 2)}
    path = save(tmp_path / "lora.safetensors", tensors)
    plain = ModelConfig(path=str(folder), dtype="float32", recompute=False)
    parts = load_model(plain, "cpu")
    with_lora = load_model(plain.model_copy(update={"lora": str(path)}), "cpu")
    parts.full_precision = with_lora.full_precision = True
    for field in fields(Components):
        if field.name not in ("flow", "autoencoder", "text_encoder", "notes"):
            assert getattr(with_lora, field.name) == getattr(parts, field.name), field.name
    assert len(with_lora.notes) == 1 and "2 tensors for text encoders are left out" in with_lora.notes[0]
    run = config(folder, tmp_path / "run", model__lora=str(path), lora__rank=RANK, lora__start=str(path))
    assert sum("are left out" in note for note in assemble(run).notes) == 2


def test_training_everything_on_top_of_a_lora_keeps_float32(folder, tmp_path):
    """The merge is not rounded to model.dtype where all weights are trained."""
    path = lora_file(tmp_path / "lora.safetensors", folder)
    trainer = assemble(config(folder, tmp_path / "run", model__lora=str(path), model__dtype="bfloat16"))
    expected = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    merge_lora(expected, read_lora(path, ""))
    ours, theirs = trainer.flow.module.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_merged_lora_that_doesnt_fit_is_refused_before_loading(folder, tmp_path, monkeypatch):
    from srpo_core.models.flux_files import Part

    monkeypatch.setattr(Part, "load", lambda *_: pytest.fail("the model was loaded"))
    wrong = save(tmp_path / "l.safetensors", named(random_pairs({"transformer_blocks.0.attn.to_q": (64, 64)}), "peft"))
    with pytest.raises(
        ConfigError, match=r"model\.lora=.*changes a weight of \[64, 64\], this model's is \[128, 128\]"
    ):
        assemble(config(folder, tmp_path / "run", model__lora=str(wrong)))
    with pytest.raises(ConfigError, match=r"model\.lora=.*not a LoRA"):
        whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        assemble(config(folder, tmp_path / "run", model__lora=str(whole)))
    with pytest.raises(ConfigError, match=r"model\.lora=.*no such file"):
        assemble(config(folder, tmp_path / "run", model__lora=str(tmp_path / "none.safetensors")))


def test_a_run_on_top_of_a_lora_resumes_bit_for_bit(folder, tmp_path):
    first, start = lora_file(tmp_path / "a.safetensors", folder), lora_file(tmp_path / "b.safetensors", folder, seed=2)
    settings = {"model__lora": str(first), "lora__rank": RANK, "lora__start": str(start), "optim__steps": 3}
    whole = assemble(config(folder, tmp_path / "whole", output__checkpoint_every=1, **settings))
    whole.train()
    half = config(folder, tmp_path / "half", output__checkpoint_every=1, **settings | {"optim__steps": 1})
    assemble(half).train()
    resumed = assemble(config(folder, tmp_path / "half", output__checkpoint_every=1, **settings))
    resumed.train(resume=True)
    assert weights_hash(resumed.flow.module) == weights_hash(whole.flow.module)


# ---- lora.start


def test_training_starts_from_a_lora_file(folder, tmp_path):
    """The start has the file's effect, whichever alpha the run has, and another rank's scale."""
    path = lora_file(tmp_path / "lora.safetensors", folder)
    expected = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    merge_lora(expected, read_lora(path, ""))
    for alpha in (None, 16.0):
        run = config(folder, tmp_path / "run", lora__rank=RANK, lora__start=str(path), lora__alpha=alpha)
        trainer = assemble(run)
        assert relative_error(velocity(trainer.flow.module), velocity(expected)) < 1e-5
    trained = dict(trainer.flow.module.named_parameters())
    name = "transformer_blocks.0.attn.to_q.lora_A.default.weight"
    assert torch.equal(trained[name], load_file(path)["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"])


def test_a_run_goes_on_from_its_own_exported_lora(folder, tmp_path):
    """Export, start from it: the exported LoRA of a run without a step is the file again."""
    trainer = assemble(config(folder, tmp_path / "one", lora__rank=RANK, lora__alpha=8.0))
    trainer.train()
    path = export.export_run(tmp_path / "one")
    again = assemble(config(folder, tmp_path / "two", lora__rank=RANK, lora__alpha=8.0, lora__start=str(path)))
    assert weights_hash(again.flow.module) == weights_hash(trainer.flow.module)


def test_original_names_start_a_run_too(folder, tmp_path):
    """A kohya file beside stacked layers, one LoRA of rank r for q, k and v, starts three of rank r."""
    layers = {"single_blocks.0.linear1": (7 * 128, 128), "single_blocks.0.linear2": (128, 640)}
    for side in ("img", "txt"):
        layers |= {
            f"double_blocks.0.{side}_attn.qkv": (384, 128), f"double_blocks.0.{side}_attn.proj": (128, 128),
            f"double_blocks.0.{side}_mlp.0": (512, 128), f"double_blocks.0.{side}_mlp.2": (128, 512),
        }  # fmt: skip
    pairs = {n: (d, 0.02 * u, a) for n, (d, u, a) in random_pairs(layers, RANK).items()}
    path = save(tmp_path / "kohya.safetensors", named(pairs, "kohya"))
    trainer = assemble(config(folder, tmp_path / "run", lora__rank=RANK, lora__start=str(path)))
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    changes = rename((f"{n}.weight", a / RANK * u @ d) for n, (d, u, a) in pairs.items())
    with torch.no_grad():
        for name, change in changes:
            plain.get_parameter(name).add_(change)
    assert relative_error(velocity(trainer.flow.module), velocity(plain)) < 1e-5


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ({}, {"lora__rank": 4}, r"lora\.start=.* has rank 2, lora\.rank is 4; set lora\.rank=2"),
        ({}, {"lora__rank": 0}, r"lora\.start=.* with lora\.rank=0"),
        ({"group": "attention"}, {}, r"lacks a LoRA of .*(ff|proj_).*lora\.targets='all'"),
        ({"group": "all"}, {"lora__targets": "attention"}, r"has a LoRA of .*, which is not among"),
    ],
)
def test_a_start_that_doesnt_fit_is_refused_before_loading(folder, tmp_path, monkeypatch, file, settings, message):
    from srpo_core.models.flux_files import Part

    monkeypatch.setattr(Part, "load", lambda *_: pytest.fail("the model was loaded"))
    path = lora_file(tmp_path / "lora.safetensors", folder, **file)
    run = {"lora__rank": RANK, "lora__start": str(path)} | settings
    with pytest.raises(ConfigError, match=message):
        assemble(config(folder, tmp_path / "run", **run))


def test_the_first_lora_is_mentioned_when_the_second_is_exported(folder, tmp_path, capsys):
    from srpo_core import cli

    first = lora_file(tmp_path / "first.safetensors", folder)
    assemble(config(folder, tmp_path / "run", model__lora=str(first), lora__rank=RANK, optim__steps=1)).train()
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"on top of {first} (strength 1): this LoRA needs that one too" in said
    assert "first" not in str(load_file(tmp_path / "run" / "export" / "run-000001.safetensors").keys())


def test_a_run_draws_what_its_exported_transformer_draws(folder, tmp_path):
    """Also on top of model.lora; and its base with both LoRA files draws the same."""
    first = lora_file(tmp_path / "first.safetensors", folder)
    run = config(folder, tmp_path / "run", model__lora=str(first), lora__rank=RANK, optim__lr=3e-2)
    assemble(run).train()
    merged = export.export_run(tmp_path / "run", tmp_path / "merged.safetensors", what="transformer", format="comfyui")
    second = export.export_run(tmp_path / "run")
    plain = config(folder, tmp_path / "plain")
    replaced = config(folder, tmp_path / "replaced", model__transformer=str(merged))

    def pixels(name, description, checkpoint=None, loras=()):
        settings = SampleSettings.of(description, steps=4)
        out = sample(description, checkpoint, settings, tmp_path / name, ["a tree"], loras=loras)
        return torch.from_numpy(np.array(Image.open(out.files[0]))).float()

    trained = pixels("one", run, checkpoint=tmp_path / "run" / "checkpoints" / "step-000002")
    assert (pixels("two", replaced) - trained).abs().max() <= 1
    assert (pixels("three", plain, loras=[ChosenLora(first), ChosenLora(second)]) - trained).abs().max() <= 1
    assert (pixels("four", plain) - trained).abs().max() > 2
