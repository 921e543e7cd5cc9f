"""What goes wrong is told in the user's words, and what was good stays."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from tiny import PROMPTS, tiny_config

from srpo_core import checkpoint
from srpo_core.assemble import assemble
from srpo_core.checkpoint import latest, read_tensors
from srpo_core.checks import size_notes
from srpo_core.config import ConfigError, ParallelConfig, RunConfig
from srpo_core.description import load_run
from srpo_core.devices import make_world
from srpo_core.errors import TrainingError, enough_memory, ran_out_of_memory
from srpo_core.interfaces import Components
from srpo_core.metrics import read_metrics
from srpo_core.run_folder import check_space, check_start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__family": "flax"}, r"unknown model family 'flax'; did you mean 'flux'\?"),
        ({"model__family": "tiny:lode"}, r"tiny has no 'lode'"),
        ({"reward__name": "clap"}, r"reward.name='clap': unknown reward; did you mean 'clip'\?"),
        (
            {"data__height": 30},
            r"data.height=30, data.width=16: this model takes multiples of 4; the nearest are 32 and 16",
        ),
        ({"data__prompts": "nowhere.txt"}, r"data.prompts='nowhere.txt': no such file"),
        ({"data__eval_prompts": "nowhere.txt"}, r"data.eval_prompts='nowhere.txt': no such file"),
        ({"data__photos": "nowhere"}, r"data.photos='nowhere': no such folder"),
        ({"lora__rank": 2, "lora__targets": "heads"}, r"lora.targets='heads' is no group"),
        ({"parallel__device": "gpu"}, r"parallel.device='gpu' can't be used here"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        assemble(tiny_config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_family_may_refuse_a_size_with_a_plain_value_error(tmp_path, monkeypatch):
    def refuse(self, height, width):
        raise ValueError("at most 8 pixels")

    monkeypatch.setattr("srpo_core.models.flux.FluxFlow.latent_shape", refuse)
    with pytest.raises(ConfigError, match=r"data.height=16, data.width=16: at most 8 pixels"):
        assemble(tiny_config(tmp_path))


def test_an_empty_prompt_file_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"data.prompts=.*holds no prompts"):
        assemble(tiny_config(tmp_path / "run", data__prompts=str(tmp_path / "empty.txt")))


def test_files_are_checked_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"data.prompts"):
        assemble(tiny_config(tmp_path, model__family="no:such", data__prompts="nowhere.txt"))
    with pytest.raises(ConfigError, match=r"reward.name='clap': unknown reward"):
        assemble(tiny_config(tmp_path, model__family="no:such", reward__name="clap"))


def test_prompts_that_are_all_held_out_are_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS["eval"]))
    with pytest.raises(ConfigError, match=r"every prompt is also in data.eval_prompts"):
        assemble(tiny_config(tmp_path / "run", data__prompts=str(tmp_path / "prompts.txt")))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4"):
        make_world(ParallelConfig(device="cpu"))


def test_auto_picks_a_device_that_works():
    world = make_world(ParallelConfig())
    assert torch.ones(1, device=world.device).item() == 1 and world.is_main and world.size == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_an_absent_device_is_named():
    with pytest.raises(ConfigError, match=r"parallel.device='cuda:1' can't be used here"):
        make_world(ParallelConfig(device="cuda:1"))


def test_a_full_disk_is_told_before_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(ConfigError, match=r"checkpoints need about .* MiB more .* free; make room"):
        assemble(tiny_config(tmp_path / "run")).train()
    assert not (tmp_path / "run").exists()


def test_room_is_needed_for_the_newest_the_best_and_one_being_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    config = tiny_config(tmp_path, optim__steps=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 30 * 2**30))
    check_space(config, 10 * 2**30)
    with pytest.raises(ConfigError, match=r"33.0 GiB more \(11.0 GiB each, 3 at once\), 30.0 GiB are free"):
        check_space(config, 11 * 2**30)
    check_space(tiny_config(tmp_path, optim__steps=1), 30 * 2**30)


def test_a_disk_that_fills_up_stops_the_run_with_its_last_checkpoint(tmp_path, monkeypatch):
    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))
    write = checkpoint.save_file

    def full_at_step_4(tensors, path, metadata):
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full_at_step_4)
    with pytest.raises(
        TrainingError, match=r"checkpoint of step 4 .*the disk is full.*last good checkpoint is .*000002"
    ):
        trainer.train()
    assert latest(tmp_path).name == "step-000002"
    monkeypatch.undo()
    assert assemble(tiny_config(tmp_path, output__preview_every=0)).train(resume=True).finished


def nan_reward(from_call: int, in_gradient: bool):
    """A reward that turns bad at a call: in its value, or only in its gradient."""
    calls = 0

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def reward(images, prompts):
        nonlocal calls
        calls += 1
        images = Broken.apply(images) if calls >= from_call and in_gradient else images
        scores = images.mean((1, 2, 3)).repeat(len(prompts) // len(images))
        return scores * float("nan") if calls >= from_call and not in_gradient else scores

    return reward


@pytest.mark.parametrize(
    ("in_gradient", "message"),
    [(False, "step 3: the loss of the denoise branch is not finite"), (True, "step 3: the gradient is not finite")],
)
def test_nan_stops_before_the_weights_take_it_in(tmp_path, in_gradient, message):
    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))
    (one,) = trainer.learner.rewards
    broken = nan_reward(from_call=5, in_gradient=in_gradient)  # two calls a step
    trainer.learner.rewards = [replace(one, reward=broken)]
    with pytest.raises(TrainingError, match=rf"{message}.*lower optim.lr.*last good checkpoint is .*step-000002"):
        trainer.train()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert all(parameter.isfinite().all() for parameter in trainer.learner.trained.values())
    kept = read_tensors(latest(tmp_path), "weights")
    assert all(torch.equal(kept[name], parameter) for name, parameter in trainer.learner.trained.items())


def test_a_rollout_that_overflows_is_named(tmp_path):
    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))
    with torch.no_grad():
        next(iter(trainer.learner.trained.values())).fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the rollout is not finite.*there is no checkpoint yet"):
        trainer.train()


def test_running_out_of_memory_says_what_to_try(tmp_path):
    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))

    def full(latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.learner.autoencoder.decode = full
    with pytest.raises(TrainingError, match=r"step 1: out of memory; try model.recompute=auto.*lora.rank"):
        trainer.train()


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "srpo_core.checks.load_model",
            r"loading the model: out of memory; .*lora.rank=16.*Tried to allocate 2 GiB.$",
        ),
        ("tiny.encode_text", r"encoding prompts: out of memory; try model.t5_memory"),
        ("tiny.load_reward", r"loading the reward: out of memory"),
        ("srpo_core.trainer.rollout", r"the first rollout, before training: out of memory; try model.recompute=auto"),
        ("srpo_core.preview.rollout", r"evaluation before training: out of memory; .*output.evaluate_prompts=0"),
    ],
)
def test_running_out_of_memory_outside_a_step_names_the_phase(tmp_path, monkeypatch, place, message):
    monkeypatch.setattr(place, out_of_memory)
    with pytest.raises(TrainingError, match=message):
        assemble(tiny_config(tmp_path, output__evaluate_prompts=2, output__preview_every=0)).train()


def test_running_out_of_memory_in_a_preview_is_a_warning(tmp_path, capsys):
    trainer = assemble(tiny_config(tmp_path))
    trainer.measures["brightness"] = out_of_memory
    assert trainer.train().finished
    assert "the preview of step 0 failed, training goes on: OutOfMemoryError" in capsys.readouterr().out


def test_a_host_without_memory_is_understood_too(tmp_path):
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                  RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")):  # fmt: skip
        assert ran_out_of_memory(error)
        with pytest.raises(TrainingError, match=r"here: out of memory; try that"), enough_memory("here", "try that"):
            raise error
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory")):
        assert not ran_out_of_memory(error)


def test_a_part_that_fails_in_a_step_is_named_with_the_line(tmp_path):
    def wrong_shape(images, prompts):
        return images.mean()

    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))
    trainer.learner.rewards = [replace(trainer.learner.rewards[0], reward=wrong_shape)]
    with pytest.raises(
        TrainingError, match=r"step 1: the reward \(reward.name='tiny:load_reward'\) failed: ValueError: .*score per"
    ):
        trainer.train()

    def broken(latents):
        raise IndexError("no such layer")

    trainer = assemble(tiny_config(tmp_path, output__preview_every=0))
    trainer.learner.autoencoder.decode = broken
    with pytest.raises(
        TrainingError, match=r"\(model.autoencoder\) failed: IndexError: no such .*test_errors.py, line \d+"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("lambda images, prompts: images.mean((1, 2, 3))", r"score per text, \[2\]; got \[1\]"),
        ("lambda images, prompts: images.detach().mean((1, 2, 3)).repeat(2)", "its scores have no gradient"),
        ("lambda images, prompts: torch.ones(len(prompts), requires_grad=True)", "don't depend on the images"),
        ("lambda images, prompts: images.mean((1, 2, 3)).repeat(2).log() / 0", "are not finite"),
        ("lambda images, prompts: images.means()", r"AttributeError: .*own.py, line 3"),
        ("open('weights that are not there')", r"failed: FileNotFoundError.*own.py, line 3"),
    ],
)
def test_a_reward_of_the_users_own_is_tried_before_the_model_is_read(tmp_path, monkeypatch, code, message):
    (tmp_path / "own.py").write_text(f"import torch\ndef load(config, device):\n    return {code}\n")
    monkeypatch.setattr("srpo_core.assemble._prepare", lambda *_: pytest.fail("the model was read"))
    own = {"name": f"{tmp_path}/own.py:load"}
    for reward in (own, {"name": "tiny:load_reward", "more": [own]}):
        with pytest.raises((ConfigError, TrainingError), match=rf"reward.name='.*own.py:load'\).*{message}"):
            assemble(tiny_config(tmp_path / "run", reward=reward))
    assert not (tmp_path / "run").exists()


def test_a_size_that_the_model_was_not_trained_at_is_told_once(tmp_path, capsys):
    settings = ["data.height=64", "data.width=64", "optim.steps=1", f"output.dir={tmp_path}", "data.batch_size=1",
                "output.evaluate_prompts=0", "output.preview_every=0", "rollout.num_steps=1"]  # fmt: skip
    assemble(load_run("miniature", settings)).train()
    out = capsys.readouterr().out
    assert out.count("miniature was trained on pictures of 128 x 128; at 64 x 64") == 1
    config = load_run("miniature")
    assert size_notes(config, Components(None, None, None, side=128)) == []


def test_output_dir_may_not_be_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match=r"is a file; name a folder"):
        check_start(tiny_config(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_start(tiny_config(tmp_path))
    check_start(RunConfig(output={"dir": str(tmp_path / "new")}), resume=True)


def test_a_folder_below_a_file_is_refused_by_its_setting(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"output\.dir=.*can't be written to: .*file is a file; name another"):
        check_start(tiny_config(tmp_path / "file" / "run", optim__steps=1))
    assert (tmp_path / "file").read_text() == "mine"
