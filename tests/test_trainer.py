"""A run as a whole: what it learns, what it leaves in its folder, and the step against the same sums done by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import PROMPTS, tiny_config, weights_hash

from srpo_core.align import direct_align, sample_align_steps
from srpo_core.assemble import assemble
from srpo_core.checkpoint import best, list_checkpoints, read_state
from srpo_core.config import RewardConfig
from srpo_core.description import load_run
from srpo_core.evaluate import read_evaluation
from srpo_core.flow import shifted_sigmas
from srpo_core.metrics import Clock, read_metrics
from srpo_core.photos import load_photos
from srpo_core.preference import ControlWords, relative_reward
from srpo_core.randomness import generator_for
from srpo_core.rollout import called_steps, rollout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of 8 steps with everything on."""
    run_dir = tmp_path_factory.mktemp("finished")
    config = tiny_config(
        run_dir, optim__steps=8, optim__ema_decay=0.5, output__evaluate_prompts=3, output__tensorboard=True,
        output__preview_every=4,
    )  # fmt: skip
    outcome = assemble(config).train()
    assert (outcome.step, outcome.finished, outcome.run_dir) == (8, True, run_dir)
    return run_dir


def test_training_raises_the_relative_reward(tmp_path):
    config = tiny_config(tmp_path, optim__steps=30, optim__lr=2e-3, reward__liked=["Real"], reward__disliked=["Flat"])
    assemble(config).train()
    previews = [line["preview"] for line in read_metrics(tmp_path) if "preview" in line]
    assert previews[-1]["relative"] > previews[0]["relative"] + 0.03


def test_the_run_folder_holds_what_it_promises(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == list(range(9))
    assert set(lines[0]) == {"step", "preview", "seconds"}
    assert {
        "step", "loss", "score", "reward", "liked", "disliked", "grad_norm", "lr", "velocity_drift", "sigma", "seconds",
        "peak_memory_gib", "source",
    } == set(lines[1])  # fmt: skip
    assert set(lines[1]["seconds"]) == {"rollout", "gradient", "optimizer", "drift", "total"}
    assert set(lines[4]["seconds"]) == set(lines[1]["seconds"]) | {"preview", "checkpoint"}
    assert [line["step"] for line in lines if "preview" in line] == [0, 4, 8]
    words = RewardConfig().liked + RewardConfig().disliked
    columns = {"reward", "relative", "sgp", "brightness", *(f"word:{word}" for word in words)}
    assert set(lines[4]["preview"]) == columns
    preview = json.loads((finished / "previews" / "step-000004.json").read_text())
    assert preview["prompts"] == list(PROMPTS["eval"][:2]) and len(preview["brightness"]) == 2
    assert Image.open(finished / "previews" / "step-000004.png").size[0] > 2 * 192
    assert load_run(str(finished / "run.json")).optim.steps == 8
    assert json.loads((finished / "run.json").read_text())["made_with"]["versions"]["torch"]
    assert list((finished / "tensorboard").glob("events*"))
    assert not list(finished.rglob(".tmp*"))


def test_evaluation_compares_the_base_and_the_trained_model(finished):
    record = read_evaluation(finished)
    assert record["prompts"] == list(PROMPTS["eval"])
    for when in ("before", "after"):
        assert {len(values) for values in record[when].values()} == {3}
        assert len(list((finished / "evaluation" / when).glob("*.png"))) == 3
    assert record["before"]["reward"] != record["after"]["reward"]
    first_preview = json.loads((finished / "previews" / "step-000000.json").read_text())
    assert record["before"]["reward"][:2] == pytest.approx(first_preview["reward"], rel=1e-5)  # the same noise


def test_the_newest_and_the_best_checkpoint_are_kept(finished):
    previews = {line["step"]: line["preview"]["relative"] for line in read_metrics(finished) if line["step"] in (4, 8)}
    best_step = max(previews, key=previews.get)
    assert {folder.name for folder in list_checkpoints(finished)} == {f"step-{best_step:06d}", "step-000008"}
    assert best(finished).name == f"step-{best_step:06d}"
    assert read_state(best(finished))["best"]["score"] == previews[best_step]


def test_drift_grows_from_zero_and_words_turn(finished):
    lines = read_metrics(finished)[1:]
    assert 0 < lines[0]["velocity_drift"] < lines[-1]["velocity_drift"]
    words = ControlWords(tiny_config("x").reward.liked, tiny_config("x").reward.disliked)
    assert [(line["liked"], line["disliked"]) for line in lines] == [words.pair(step) for step in range(1, 9)]
    assert (lines[0]["liked"], lines[0]["disliked"]) == ("Detail", "Painting")


def test_a_step_is_the_sum_of_its_branches(tmp_path):
    config = tiny_config(tmp_path, optim__accumulation=2, align__draws_per_rollout=2, seed=3, reward__scale=2.0)
    trainer, reference = assemble(config), assemble(config)
    metrics = trainer.learner.step(1, Clock(lambda: None))
    flow, prompts = reference.flow, reference.learner.data.rollouts
    total = torch.zeros(())
    for micro in range(2):
        noise = torch.randn(2, 4, 8, 8, generator=generator_for(3, 1, 0, f"noise {micro}"))
        batch = prompts.at(2 * micro, 2)
        clean = rollout(flow, batch, noise, shifted_sigmas(3, 3.0), 1.0)
        for draw in range(2):
            steps = sample_align_steps(config.align, 3.0, 2, generator_for(3, 1, 0, f"levels {micro} {draw}"))
            for step, words in zip(steps, (("Detail", "Painting"), ("Painting", "Detail")), strict=True):
                images = reference.autoencoder.decode(direct_align(flow, clean, step, 3.5))
                score = 2.0 * relative_reward(reference.reward, images, batch.prompts, *words, step.k)
                total = total + torch.relu(5.0 - score).mean() / 8
    total.backward()
    gradients = [parameter.grad for parameter in flow.module.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert metrics.loss == pytest.approx(total.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in trainer.flow.module.parameters())


def test_prompts_are_visited_in_order_through_accumulation(tmp_path):
    learner = assemble(tiny_config(tmp_path, optim__accumulation=2)).learner
    visited = [learner._rollout(step, micro).prompts.prompts for step in (1, 2) for micro in (0, 1)]
    assert sum(visited, ()) == learner.data.rollouts.at(0, 8).prompts


def test_the_first_step_moves_weights_by_the_warmed_up_rate(tmp_path):
    trainer = assemble(tiny_config(tmp_path, optim__warmup_steps=4, optim__weight_decay=0.0, optim__eps=1e-16))
    before = {name: parameter.detach().clone() for name, parameter in trainer.learner.trained.items()}
    metrics = trainer.learner.step(1, Clock(lambda: None))
    moved = torch.cat([(p - before[name]).detach().flatten().abs() for name, p in trainer.learner.trained.items()])
    assert metrics.lr == 2.5e-4 and moved.max().item() == pytest.approx(
        2.5e-4, rel=1e-2
    )  # Adam's first step is lr * sign


def test_bfloat16_trains_float32_weights(tmp_path):
    trainer = assemble(tiny_config(tmp_path, model__dtype="bfloat16", optim__steps=1))
    assert trainer.train().finished
    assert {parameter.dtype for parameter in trainer.learner.trained.values()} == {torch.float32}


def test_photos_take_the_place_of_rollouts(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, caption in enumerate(("a red wall", "a green wall", "a blue wall")):
        Image.new("RGB", (40, 24), [(200, 30, 30), (30, 200, 30), (30, 30, 200)][i]).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(caption)
    config = tiny_config(tmp_path / "run", data__photos=str(photos), optim__steps=2)
    trainer = assemble(config)
    batches = [trainer.learner.data.at(micro, 0, 1) for micro in (0, 1)]
    for batch in batches:
        assert [path.with_suffix(".txt").read_text() for path in batch.photos] == list(batch.prompts.prompts)
    first, second = trainer.learner._rollout(1, 0), trainer.learner._rollout(2, 0)
    assert torch.equal(first.clean, trainer.autoencoder.encode(load_photos(batches[0].photos, 16, 16)))
    assert not torch.equal(first.noise, second.noise)
    assert trainer.train().finished


def test_same_noise_leaves_out_the_rank(tmp_path):
    noises = {}
    for same in (True, False):
        trainer = assemble(tiny_config(tmp_path, rollout__same_noise=same, optim__steps=8))
        for rank in (0, 1):
            trainer.learner.world = replace(trainer.world, rank=rank)
            noises[same, rank] = trainer.learner._rollout(1, 0).noise
    assert torch.equal(noises[True, 0], noises[True, 1])
    assert not torch.equal(noises[False, 0], noises[False, 1])


def test_a_failing_preview_warns_and_training_goes_on(tmp_path, capsys):
    trainer = assemble(tiny_config(tmp_path))

    def broken(images, prompts):
        raise RuntimeError("no brightness today")

    trainer.measures["brightness"] = broken
    assert trainer.train().finished
    assert "no brightness today" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert not any("preview" in line for line in read_metrics(tmp_path))


def test_plain_lines_tell_of_time_left_and_score(tmp_path, capsys):
    assemble(tiny_config(tmp_path)).train()
    out = capsys.readouterr().out
    assert "1/4  score: denoise" in out and "left" in out and "preview at step 4: reward" in out


def test_micro_batches_rolled_out_together_are_those_rolled_out_alone(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 24), "olive").save(photos / "0.png")
    (photos / "0.txt").write_text("an olive wall")
    more = {"optim__accumulation": 4, "data__photos": str(photos), "data__photo_share": 0.25, "optim__steps": 2}
    alone = assemble(tiny_config(tmp_path / "alone", **more)).learner
    together = assemble(tiny_config(tmp_path / "together", rollout__at_once=3, **more)).learner
    sizes = []
    velocity = together.flow.velocity

    def counted(latents, *given):
        sizes.append(len(latents))
        return velocity(latents, *given)

    together.flow.velocity = counted
    ours, theirs = (learner._rollouts(1, range(4)) for learner in (together, alone))
    assert max(sizes) > 2 and sum(sizes) == 3 * 2 * 3  # steps, prompts and micro-batches that aren't photos
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.noise, other.noise) and one.prompts.prompts == other.prompts.prompts
        torch.testing.assert_close(one.clean, other.clean, rtol=1e-4, atol=1e-5)
    for step in (1, 2):
        told, wanted = (learner.step(step, Clock(lambda: None)) for learner in (together, alone))
        assert told.loss == pytest.approx(wanted.loss, rel=1e-5) and told.source == wanted.source


@pytest.mark.parametrize("at_once", [2, 3, 99])
def test_branches_trained_on_in_one_pass_are_those_trained_on_alone(tmp_path, at_once):
    more = {"optim__accumulation": 2, "optim__steps": 2}
    draws = {"draws_per_rollout": 2}  # of two branches each
    alone = assemble(tiny_config(tmp_path / "alone", align=draws, **more)).learner
    together = assemble(tiny_config(tmp_path / "together", align=draws | {"at_once": at_once}, **more)).learner
    sizes, velocity = [], together.flow.velocity

    def counted(latents, *given):
        if torch.is_grad_enabled():
            sizes.append(len(latents))
        return velocity(latents, *given)

    together.flow.velocity = counted
    for step in (1, 2):
        told, wanted = (learner.step(step, Clock(lambda: None)).line() for learner in (together, alone))
        for name in ("loss", "sigma", "grad_norm"):
            assert told[name] == pytest.approx(wanted[name], rel=1e-5), name
        for name in ("score", "reward"):
            assert told[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
    assert sizes == 4 * {2: [4, 4], 3: [6, 2], 99: [8]}[at_once]  # pictures of two prompts, for each micro-batch
    for name, parameter in together.trained.items():
        torch.testing.assert_close(parameter, alone.trained[name], rtol=1e-4, atol=1e-6)


def test_what_is_made_ready_ahead_is_what_would_be_made_then(tmp_path, monkeypatch):
    ahead = assemble(tiny_config(tmp_path / "ahead", optim__accumulation=2)).learner
    plain = assemble(tiny_config(tmp_path / "plain", optim__accumulation=2)).learner
    monkeypatch.setattr(plain, "_look_ahead", lambda _: None)
    for step in (1, 2, 4):  # 3 is left out: what is there is not what is asked for
        assert ahead.step(step, Clock(lambda: None)).line() == plain.step(step, Clock(lambda: None)).line()
        assert (ahead._ahead is None) == (step == 4)  # the last one
    assert weights_hash(ahead.flow.module) == weights_hash(plain.flow.module)


def test_the_model_is_called_as_often_as_the_run_says(tmp_path):
    learner = assemble(tiny_config(tmp_path, rollout__num_steps=7, rollout__calls=4)).learner
    levels, velocity = [], learner.flow.velocity

    def noted(latents, sigma, *given):
        levels.append(float(sigma[0]))
        return velocity(latents, sigma, *given)

    learner.flow.velocity = noted
    learner._rollout(1, 0)
    assert levels == [float(shifted_sigmas(7, 3.0)[step]) for step in called_steps(7, 4)]
