"""Trained weights in bfloat16: updates far below their spacing count on average; a run is a function of its seed."""

from __future__ import annotations

import pytest
import torch
from test_resume import COURSE, course, whole_and_resumed
from tiny import tiny_config
from torch import nn

from srpo_core.assemble import assemble
from srpo_core.checkpoint import checkpoint_folder, latest, read_tensors
from srpo_core.checks import check_files
from srpo_core.compact_adamw import CompactAdamW
from srpo_core.config import ConfigError
from srpo_core.export import export_run
from srpo_core.lora import has_lora
from srpo_core.metrics import read_metrics
from srpo_core.moments import mixed, random_bits, rounded, uniform
from srpo_core.optim import Average, gradient_norm

NARROW = {"model__dtype": "bfloat16", "model__trained_memory": "bfloat16"}


def draws(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.stack([random_bits(torch.tensor(seed, dtype=torch.int32), 0, like) for seed in range(count)])


def test_the_expected_value_of_a_rounded_number_is_the_number():
    values = torch.tensor([1.0, 1.001, -1.001, 3.14159, -2e-3, 0.9999, 1e-30, 65504.7])
    rounds = torch.stack([rounded(values, bits).float() for bits in draws(20_000, values)])
    spacing = 2.0 ** (values.abs().log2().floor() - 7)
    assert ((rounds - values).abs() < spacing).all()  # to one of the two neighbours
    assert torch.equal(rounds[:, 0], torch.ones(20_000))  # what fits is not touched
    error = (rounds.double().mean(0) - values.double()).abs() / spacing
    assert (error < 5 * 0.5 / 20_000**0.5).all()


def test_random_bits_are_those_of_coins():
    """Each bit is set half of the time, and no two bits go together; pieces of a tensor draw what the whole does."""
    like = torch.zeros(100_000)
    bits = random_bits(torch.tensor(7, dtype=torch.int32), 0, like)
    set_bits = torch.stack([(bits >> i) & 1 for i in range(32)]).float() - 0.5
    correlation = set_bits @ set_bits.T / len(like) * 4
    assert (set_bits.mean(1).abs() < 5 * 0.5 / len(like) ** 0.5).all()
    assert ((correlation - torch.eye(32)).abs() < 5.5 / len(like) ** 0.5).all()
    piece = random_bits(torch.tensor(7, dtype=torch.int32), 40_000, like[40_000:])
    assert torch.equal(piece, bits[40_000:])
    other = random_bits(torch.tensor(8, dtype=torch.int32), 0, like)
    assert abs(torch.corrcoef(torch.stack([uniform(bits, 0), uniform(other, 0)]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([uniform(mixed(bits), 0), uniform(mixed(bits), 12)]))[0, 1]) < 0.02


def moved(make, dtype: torch.dtype, steps: int = 200) -> torch.Tensor:
    """How far weights of 1 have moved after steps of 1e-5, in one direction."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return 1 - weight.detach().float()


def test_updates_far_below_the_spacing_move_weights_and_plain_rounding_loses_them():
    """The spacing of bfloat16 below 1 is 1/256; 200 updates of 1e-5 make half of that."""
    settings = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    plain = moved(lambda weights: torch.optim.AdamW(weights, **settings), torch.bfloat16)
    assert torch.equal(plain, torch.zeros(64, 64))
    ours = moved(lambda weights: CompactAdamW(weights, **settings, in_8bit=False), torch.bfloat16)
    assert float(ours.mean()) == pytest.approx(200 * 1e-5, rel=0.1)
    assert torch.equal(ours * 256, (ours * 256).round())  # each by whole steps


def test_in_float32_it_is_adamw_of_torch():
    results = []
    for make in (torch.optim.AdamW, lambda *args, **settings: CompactAdamW(*args, **settings, in_8bit=False)):
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 5), (7,))]
        optimizer = make(weights, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        for _ in range(20):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        results.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert torch.allclose(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    settings = COURSE | NARROW | ({"lora__rank": 2} if kind == "lora" else {}) | {"optim__states": "8bit"}
    whole, _ = whole_and_resumed(tmp_path, **settings)
    assert {parameter.dtype for parameter in whole.learner.trained.values()} == {torch.bfloat16}
    assert has_lora(whole.flow.module) == (kind == "lora")
    for name in ("weights", "ema", "optimizer"):
        ours, theirs = (read_tensors(checkpoint_folder(tmp_path / run, 7), name) for run in ("whole", "broken"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {t.dtype for t in read_tensors(latest(tmp_path / "whole"), "ema").values()} == {torch.float32}
    assert course(tmp_path / "broken") == course(tmp_path / "whole")


def test_another_seed_rounds_otherwise(tmp_path):
    hashes = set()
    for seed in (0, 0, 1):
        weight = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
        optimizer = CompactAdamW([weight], 1e-4, (0.9, 0.999), 1e-8, 0.0, in_8bit=False, seed=seed)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        hashes.add(tuple(weight.detach().flatten().tolist()))
    assert len(hashes) == 2


def test_it_learns_as_much_as_in_float32(tmp_path):
    """The relative reward that a run gains; with plain rounding nearly all of its updates would be lost."""
    gains = {}
    words = {"reward__liked": ["Real"], "reward__disliked": ["Flat"]}
    for name, more in {"float32": {"model__dtype": "bfloat16"}, "bfloat16": NARROW | {"optim__states": "8bit"}}.items():
        run = tiny_config(tmp_path / name, optim__steps=24, optim__lr=1e-3, output__preview_every=24, **words, **more)
        assemble(run).train()
        previews = [line["preview"]["relative"] for line in read_metrics(tmp_path / name) if "preview" in line]
        gains[name] = previews[-1] - previews[0]
    assert gains["float32"] > 0.01 and gains["bfloat16"] == pytest.approx(gains["float32"], rel=0.2)


def test_a_run_goes_on_with_weights_held_otherwise(tmp_path):
    """From float32 to bfloat16 and back: weights are rounded once, moments converted."""
    held = [{}, NARROW | {"optim__states": "8bit"}, {}]
    for i, settings in enumerate(held):
        run = tiny_config(tmp_path, optim__steps=2 + 2 * i, **{"model__dtype": "bfloat16"} | settings)
        trainer = assemble(run)
        assert trainer.train(resume=bool(i)).step == 2 + 2 * i
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(7))
    assert {t.dtype for t in read_tensors(latest(tmp_path), "weights").values()} == {torch.float32}


def test_the_trained_transformer_is_exported_as_it_was_held(tmp_path):
    trainer = assemble(tiny_config(tmp_path / "run", **NARROW))
    trainer.train()
    path = export_run(tmp_path / "run", tmp_path / "whole.safetensors", what="transformer")
    from safetensors.torch import load_file

    exported = load_file(path)
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    trained = trainer.learner.trained
    assert sum(t.double().sum() for t in exported.values()) == sum(t.detach().double().sum() for t in trained.values())


def test_an_average_on_the_host_is_the_one_in_float32_and_gives_the_weights_back():
    parameters = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    average = Average(parameters, 0.3)
    expected = torch.ones(4)
    for step, value in enumerate((2.0, 3.0, 5.0), start=1):
        parameters["w"].data.fill_(value)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(average.tensors["w"], expected) and average.tensors["w"].dtype == torch.float32
    with average.applied():
        assert torch.equal(parameters["w"].detach(), expected.to(torch.bfloat16))
    assert torch.equal(parameters["w"].detach(), torch.full((4,), 5.0, dtype=torch.bfloat16))
    assert torch.allclose(average.tensors["w"], expected)


def test_the_norm_of_gradients_in_bfloat16_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(50_000, generator=generator).to(torch.bfloat16) for _ in range(3)]
    expected = torch.cat([gradient.double() for gradient in gradients]).norm()
    assert float(gradient_norm(gradients)) == pytest.approx(float(expected), rel=1e-5)


def test_they_are_computed_with_in_bfloat16():
    with pytest.raises(ConfigError, match=r"model\.trained_memory='bfloat16' with model\.dtype='float32'"):
        check_files(tiny_config("run", model__trained_memory="bfloat16"))
