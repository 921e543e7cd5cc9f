"""Exports of FLUX runs, whose base is read a tensor at a time: the same bits as of the trained module."""

from __future__ import annotations

import copy

import pytest
import torch
from flux_runs import RANK, config, load_transformer, lora_file, relative_error, save_flux, velocity
from safetensors.torch import load_file

from srpo_core import export
from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, load_weights
from srpo_core.config import ConfigError
from srpo_core.weights.lora_names import read_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux") / "flux")


@pytest.fixture(scope="module")
def full(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "full"
    trainer = assemble(config(folder, run_dir, optim__ema_decay=0.5))
    trainer.train()
    return run_dir, trainer.flow.module


@pytest.mark.parametrize(
    ("format", "name"),
    [("diffusers", "trained"), ("diffusers", "trained.safetensors"), ("comfyui", "trained.safetensors")],
)
def test_an_exported_run_gives_the_same_velocity_bit_for_bit(full, tmp_path, format, name):
    run_dir, module = full
    export.export_run(run_dir, tmp_path / name, averaged=False, format=format)
    assert torch.equal(velocity(load_transformer(tmp_path / name)), velocity(module))


def test_the_average_is_exported_where_there_is_one(full, tmp_path):
    run_dir, module = full
    averaged = copy.deepcopy(module)
    load_weights(run_dir / "checkpoints" / "step-000002", averaged)
    path = export.export_run(run_dir, tmp_path / "a.safetensors", format="comfyui")
    assert torch.equal(velocity(load_transformer(path)), velocity(averaged))
    assert not torch.equal(velocity(averaged), velocity(module))


def test_a_full_run_is_exported_without_its_base(full, tmp_path, monkeypatch):
    """The checkpoint holds all of it: of the base, only headers are read."""
    from srpo_core.weights.tensors import TensorFile

    read = []
    monkeypatch.setattr(
        TensorFile, "read", lambda self, name, old=TensorFile.read: read.append(self) or old(self, name)
    )
    export.export_run(full[0], tmp_path / "a.safetensors", averaged=False)
    assert read and all("checkpoints" in str(file.path) or file._meta for file in read)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_merges_while_it_is_read(folder, tmp_path, dtype):
    """The same bits as the trained module's own weights with its LoRA added, also on top of model.lora."""
    first = lora_file(tmp_path / "first.safetensors", folder, seed=3)
    settings = {"model__lora": str(first), "model__lora_strength": 0.7, "lora__rank": RANK, "model__dtype": dtype}
    trainer = assemble(config(folder, tmp_path / "run", **settings))
    trainer.train()
    module = trainer.flow.module
    ours = load_file(
        export.export_run(tmp_path / "run", tmp_path / "a.safetensors", what="transformer", dtype="float32")
    )
    theirs = load_file(export.export_transformer(module, tmp_path / "b.safetensors", {}))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
    if dtype == "float32":
        assert relative_error(velocity(load_transformer(tmp_path / "a.safetensors")), velocity(module)) < 1e-5


def test_an_export_never_takes_the_place_of_what_the_run_is_made_of(folder, full, tmp_path):
    base = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before = base.read_bytes()
    for out in (base, folder / "transformer", full[0] / "checkpoints" / "step-000002" / "weights.safetensors"):
        with pytest.raises(ConfigError, match="is also read from"):
            export.export_run(full[0], out, what="transformer", overwrite=True)
    assert base.read_bytes() == before


def test_a_checkpoints_file_is_a_lora_with_its_alpha(folder, tmp_path):
    """It can be named in lora.start, model.lora or --lora as it is."""
    assemble(config(folder, tmp_path / "run", lora__rank=RANK, lora__alpha=3.0)).train()
    ours = read_lora(latest(tmp_path / "run") / "weights.safetensors", "").layers
    exported = read_lora(export.export_run(tmp_path / "run"), "").layers
    assert ours.keys() == exported.keys() and {layer.alpha for layer in ours.values()} == {3.0}
    assert all(torch.equal(ours[name].change(), exported[name].change()) for name in ours)
