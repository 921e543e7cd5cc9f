"""Checkpoints: whole or not there, pruned with care, and put back into a model."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_config, tiny_flow, weights_hash

from srpo_core import checkpoint
from srpo_core.assemble import assemble
from srpo_core.checkpoint import (
    best,
    checkpoint_folder,
    latest,
    list_checkpoints,
    load_weights,
    prune,
    read_state,
    read_tensors,
    save,
)
from srpo_core.errors import TrainingError
from srpo_core.lora import has_lora

STATE = {"best": None, "lora": None, "metrics": {}}


def save_step(run_dir, step, **state):
    return save(run_dir, step, {"weights": {"w": torch.full((4,), float(step))}}, STATE | state)


def test_a_checkpoint_reads_as_it_was_written(tmp_path):
    tensors = {"weights": {"a": torch.arange(6.0).view(2, 3).T}, "optimizer": {"a/step": torch.tensor(3.0)}}
    folder = save(tmp_path, 20, tensors, STATE | {"best": {"step": 10, "score": 0.5, "by": "reward"}})
    assert folder == tmp_path / "checkpoints" / "step-000020" == latest(tmp_path)
    assert torch.equal(read_tensors(folder, "weights")["a"], tensors["weights"]["a"])
    assert torch.equal(read_tensors(folder, "optimizer")["a/step"], torch.tensor(3.0))
    assert read_state(folder) == {"format": 1, "step": 20, **STATE, "best": {"step": 10, "score": 0.5, "by": "reward"}}


def test_order_is_by_step_and_strangers_are_left_alone(tmp_path):
    for step in (5, 1_000_000, 999_999):
        save_step(tmp_path, step)
    stranger = tmp_path / "checkpoints" / "step-by-step notes"
    stranger.mkdir()
    (stranger / "state.json").write_text("{}")
    assert [checkpoint.checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [5, 999_999, 1_000_000]
    prune(tmp_path, 1, None)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-1000000"]
    assert stranger.is_dir()


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save_step(tmp_path, step)
    prune(tmp_path, 2, best_step=2)
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["2", "4", "5"]


def test_best_is_the_one_that_the_newest_names(tmp_path):
    assert best(tmp_path) is None
    save_step(tmp_path, 1)
    assert best(tmp_path) is None
    save_step(tmp_path, 2, best={"step": 1, "score": 0.0, "by": "relative"})
    assert best(tmp_path) == checkpoint_folder(tmp_path, 1)


@pytest.mark.parametrize("moment", ["weights", "state", "rename"])
def test_a_save_that_dies_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, moment):
    """As after kill -9: nothing cleans up, and what is there is whole."""
    save_step(tmp_path, 1)
    killed = KeyboardInterrupt("killed")

    def die(*_):
        raise killed

    if moment == "rename":
        monkeypatch.setattr(os, "replace", die)
    else:
        monkeypatch.setattr(checkpoint, "save_file" if moment == "weights" else "sync", die)
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 2)
    monkeypatch.undo()
    assert latest(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert list((tmp_path / "checkpoints").glob(".tmp-*"))
    save_step(tmp_path, 2)
    prune(tmp_path, 2, None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_spares_the_last_checkpoint(tmp_path, monkeypatch, error):
    save_step(tmp_path, 1)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match=r"step 2 .*the disk is full.*step-000001.*make room.*--resume"):
        save_step(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert torch.equal(read_tensors(latest(tmp_path), "weights")["w"], torch.ones(4))


def test_a_truncated_file_is_named_with_the_way_out(tmp_path):
    save_step(tmp_path, 1)
    folder = save_step(tmp_path, 2)
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TrainingError, match=r"step-000002/weights.safetensors can't be read.*go on from step-000001"):
        read_tensors(folder, "weights")
    (folder / "state.json").write_text('{"format": 99}')
    with pytest.raises(TrainingError, match=r"state.json can't be read: its format is 99"):
        read_state(folder)


def test_a_run_with_a_truncated_checkpoint_stops_before_it_trains(tmp_path):
    settings = {"optim__steps": 4, "output__keep_checkpoints": 2, "output__preview_every": 0}
    assemble(tiny_config(tmp_path, **settings)).train()
    path = latest(tmp_path) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    before = (tmp_path / "metrics.jsonl").read_text()
    again = tiny_config(tmp_path, **settings | {"optim__steps": 5})
    with pytest.raises(TrainingError, match=r"step-000004/optimizer.safetensors can't be read.*go on from step-000002"):
        assemble(again).train(resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    latest(tmp_path).rename(tmp_path / "broken")
    assert assemble(again).train(resume=True).step == 5


def test_load_weights_takes_the_average_unless_told_otherwise(tmp_path):
    trainer = assemble(tiny_config(tmp_path, optim__ema_decay=0.9, optim__steps=2))
    trainer.train()
    flow = tiny_flow()
    load_weights(latest(tmp_path), flow.module, averaged=False)
    assert weights_hash(flow.module) == weights_hash(trainer.flow.module)
    load_weights(latest(tmp_path), flow.module)
    with trainer.learner.averaged():
        assert weights_hash(flow.module) == weights_hash(trainer.flow.module)
    assert weights_hash(flow.module) != weights_hash(trainer.flow.module)


def test_load_weights_adds_the_lora_of_a_lora_checkpoint(tmp_path):
    trainer = assemble(tiny_config(tmp_path, lora__rank=2, lora__alpha=4.0, lora__targets="attention", optim__steps=2))
    trainer.train()
    assert read_state(latest(tmp_path))["lora"]["alpha"] == 4.0
    flow = tiny_flow()
    load_weights(latest(tmp_path), flow.module)
    assert has_lora(flow.module)
    assert weights_hash(flow.module) == weights_hash(trainer.flow.module)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = save(tmp_path, 1, {"weights": {"nobody.weight": torch.ones(2)}}, STATE)
    with pytest.raises(TrainingError, match=r"doesn't fit the model .*nobody.weight \[2\]"):
        load_weights(folder, tiny_flow().module)


def test_a_checkpoint_that_lacks_a_tensor_is_not_resumed(tmp_path):
    trainer = assemble(tiny_config(tmp_path))
    tensors = trainer.learner.tensors()
    name = next(iter(tensors["weights"]))
    del tensors["weights"][name]
    folder = save(tmp_path, 1, tensors, STATE)
    with pytest.raises(TrainingError, match=rf"{name} is missing"):
        trainer.learner.restore(folder)


def test_state_json_is_plain_json(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=2)).train()
    state = json.loads((latest(tmp_path) / "state.json").read_text())
    assert state["format"] == 1 and state["step"] == 2 and state["metrics"]["step"] == 2 and state["lora"] is None
