"""A LoRA out of two checkpoints: the best of its rank, exact where the change has that rank, its error told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lora_files import named, random_pairs, save
from safetensors import safe_open
from safetensors.torch import load_file
from small_flux import MATRICES, original_file

from srpo_core import cli
from srpo_core.config import ConfigError
from srpo_core.export import extract
from srpo_core.export.convert import convert, extract_lora
from srpo_core.lora import ChosenLora
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.lora_names import read_lora

RANK = 4


@pytest.fixture
def base(tmp_path):
    return original_file(tmp_path / "base.safetensors")


def changed(base, path, change):
    """A checkpoint whose tensors are `change(name, tensor)` of the base's."""
    return save(path, {name: change(name, tensor) for name, tensor in load_file(base).items()})


def noisy(base, path, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return changed(base, path, lambda name, t: t + 0.01 * torch.randn(t.shape, generator=generator))


# ---- the decomposition


def decaying(rows, columns, power, seed=0):
    """A matrix whose singular values fall as 1 / i^power, which are returned too."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator)).Q
    values = torch.arange(1, count + 1).float() ** -power
    return left * values @ right.T, values


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (600, 700), (700, 600)])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 3.0])
def test_it_is_the_nearest_of_its_rank(shape, power):
    """Eckart and Young: what is missed is the root of the sum of the other singular values' squares.

    Sides above 512 go through the iteration; equal singular values (power 0) are its hardest case.
    """
    matrix, values = decaying(*shape, power)
    for rank in (1, 8, 30):
        up, down = extract.low_rank(matrix, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        missed = (matrix - up @ down).norm().item()
        assert missed == pytest.approx(values[rank:].norm().item(), rel=2e-3 if power == 0.3 else 1e-3, abs=2e-6)
        assert missed >= values[rank:].norm().item() * (1 - 1e-5) - 2e-6


@pytest.mark.parametrize("rank", [4, 32])
def test_noise_is_held_as_well_as_can_be(rank, monkeypatch):
    """Singular values of noise lie close together: the iteration comes within 1e-4 of the least error, and ends."""
    matrix = torch.randn(800, 900, generator=torch.Generator().manual_seed(1))
    least = torch.linalg.svdvals(matrix)[rank:].norm().item()
    whole = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **options: whole.append(min(m.shape)) or svd(m, **options))
    up, down = extract.low_rank(matrix, rank)
    assert least * (1 - 1e-5) <= (matrix - up @ down).norm().item() <= least * (1 + 1e-4)
    assert max(whole) < 100


def test_up_and_down_share_the_size():
    matrix, values = decaying(50, 60, 1.0)
    up, down = extract.low_rank(matrix, 10)
    assert torch.allclose(up.norm(dim=0), values[:10].sqrt(), atol=1e-5)
    assert torch.allclose(down.norm(dim=1), values[:10].sqrt(), atol=1e-5)


def test_a_rank_above_the_smaller_side_is_that_side():
    matrix, _ = decaying(6, 20, 1.0)
    up, down = extract.low_rank(matrix, 64)
    assert up.shape == (6, 6) and torch.allclose(up @ down, matrix, atol=1e-5)


# ---- from files


def test_a_merged_lora_comes_back(tmp_path, base):
    """The product of each layer, at its rank; limits are the roundings of the merged weights."""
    pairs = random_pairs(MATRICES, rank=RANK)
    lora = save(tmp_path / "lora.safetensors", named(pairs, "kohya"))
    tuned = convert(base, tmp_path / "tuned.safetensors", merge=[ChosenLora(lora)])
    path, errors = extract_lora(tuned, base, RANK, tmp_path / "out.safetensors")
    theirs = read_lora(lora, "").layers
    for name, layer in read_lora(path, "").layers.items():
        exact = theirs[name].change()
        assert layer.rank == RANK
        assert (layer.change() - exact).norm() < 2e-6 * exact.norm(), name
    assert read_lora(path, "").layers.keys() == theirs.keys()
    assert errors.relative().keys() == {"attention", "mlp", "others", "total"}
    assert max(errors.relative().values()) < 1e-6
    assert errors.beyond == {}


def test_a_full_change_is_told_with_its_errors(tmp_path, base):
    """Errors, by group, against a whole SVD of each layer here; biases and norms are named."""
    tuned = noisy(base, tmp_path / "tuned.safetensors")
    path, errors = extract_lora(tuned, base, RANK, tmp_path / "out.safetensors")
    new, old = (dict(transformer_at(p, "").stream()) for p in (tuned, base))
    sums = {}
    for name in new:
        if new[name].ndim == 2:
            values = torch.linalg.svdvals(new[name].double() - old[name].double())
            block = "_blocks." in name
            group = "attention" if block and ".attn." in name else "mlp" if block and "norm" not in name else "others"
            for key in (group, "total"):
                missed, size = sums.get(key, (0.0, 0.0))
                sums[key] = missed + values[RANK:].square().sum().item(), size + values.square().sum().item()
    relative = errors.relative()
    assert relative.keys() == sums.keys()
    for group, (missed, size) in sums.items():
        assert relative[group] == pytest.approx(math.sqrt(missed / size), rel=1e-4)
    left_out = {name for name in new if new[name].ndim == 1}
    assert errors.beyond.keys() == left_out
    bias = "proj_out.bias"
    assert errors.beyond[bias] == pytest.approx(((new[bias] - old[bias]).norm() / old[bias].norm()).item(), rel=1e-5)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["srpo_extracted"])
    assert record["rank"] == RANK and record["base"] == "base.safetensors"
    assert record["relative_error"] == relative and record["left_out"] == errors.beyond


def test_merging_it_comes_nearer_with_rank(tmp_path, base):
    tuned, distances = noisy(base, tmp_path / "tuned.safetensors"), []
    new = dict(transformer_at(tuned, "").stream())
    for rank in (1, 16, 128):
        lora, errors = extract_lora(tuned, base, rank, tmp_path / f"{rank}.safetensors")
        merged = load_file(convert(base, tmp_path / f"m{rank}.safetensors", merge=[ChosenLora(lora)]))
        missed = sum((merged[n] - new[n]).square().sum().item() for n in new if new[n].ndim == 2)
        size = sum(
            (load - new[n]).square().sum().item() for n, load in transformer_at(base, "").stream() if load.ndim == 2
        )
        assert math.sqrt(missed / size) == pytest.approx(errors.relative()["total"], rel=1e-3, abs=1e-5)
        distances.append(missed)
    assert distances[0] > distances[1] > 1e3 * distances[2]


def test_names_and_dtypes_may_differ(tmp_path, base):
    """The base under original names in bfloat16, the tuned model a diffusers folder in float32."""
    tuned = convert(noisy(base, tmp_path / "n.safetensors"), tmp_path / "tuned")
    rounded = convert(base, tmp_path / "b16.safetensors", format="comfyui", dtype="bfloat16")
    one, _ = extract_lora(tuned, rounded, RANK, tmp_path / "one.safetensors")
    plain, _ = extract_lora(tmp_path / "n.safetensors", base, RANK, tmp_path / "two.safetensors")
    ours, theirs = read_lora(one, "").layers, read_lora(plain, "").layers
    assert ours.keys() == theirs.keys()  # the base's numbers are exact in bfloat16
    for name in ours:
        assert torch.allclose(ours[name].change(), theirs[name].change(), atol=1e-6), name


def test_a_scaled_fp8_model_can_be_compared(tmp_path, base):
    small = convert(base, tmp_path / "fp8.safetensors", format="comfyui", dtype="scaled-fp8")
    path, errors = extract_lora(base, small, RANK, tmp_path / "out.safetensors")
    assert 0.5 < errors.relative()["total"] < 1
    assert all(".transformer_blocks" in f".{name}" or "single" in name for name in read_lora(path, "").layers)


# ---- what doesn't go


def test_models_that_dont_belong_together(tmp_path, base):
    schnell = original_file(tmp_path / "s.safetensors", guidance=False)
    with pytest.raises(ConfigError, match=r"different models: .*base\.safetensors has time_text_embed\.guidance"):
        extract_lora(schnell, base, RANK, tmp_path / "x.safetensors")
    wide = original_file(tmp_path / "w.safetensors", text=32)
    with pytest.raises(ConfigError, match=r"context_embedder\.weight is \[128, 32\] in the one and \[128, 24\]"):
        extract_lora(wide, base, RANK, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="same matrices: there is nothing to extract"):
        extract_lora(base, save(tmp_path / "same.safetensors", load_file(base)), RANK, tmp_path / "x.safetensors")
    lora = save(tmp_path / "lora.safetensors", named(random_pairs(MATRICES), "kohya"))
    with pytest.raises(ConfigError, match=r"--extract=.*LoRA, .*not a FLUX transformer"):
        extract_lora(base, lora, RANK, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="is also read from"):
        extract_lora(base, lora, RANK, lora, overwrite=True)
    with pytest.raises(ConfigError, match="only a transformer can be that"):
        extract_lora(base, wide, RANK, tmp_path / "x.safetensors", dtype="scaled-fp8")
    with pytest.raises(ConfigError, match="a LoRA is one file"):
        extract_lora(base, wide, RANK, tmp_path / "folder")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_command_tells_the_errors(tmp_path, base, capsys):
    tuned = noisy(base, tmp_path / "tuned.safetensors")
    words = [
        "export",
        tuned,
        "--extract",
        base,
        "--rank",
        RANK,
        "--out",
        tmp_path / "l.safetensors",
        "--dtype",
        "bfloat16",
    ]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "attention" in said and "total" in said and "biases and norms differ too" in said and "models/loras" in said
    tensors = load_file(tmp_path / "l.safetensors")
    assert {t.dtype for n, t in tensors.items() if not n.endswith("alpha")} == {torch.bfloat16}


def test_the_error_is_that_of_the_numbers_written(tmp_path, base):
    """In bfloat16 even a change that is of low rank is not held exactly."""
    tuned = noisy(base, tmp_path / "tuned.safetensors")
    path, errors = extract_lora(tuned, base, 128, tmp_path / "l.safetensors", dtype="bfloat16")
    new, old = (dict(transformer_at(place, "").stream()) for place in (tuned, base))
    missed, size = 0.0, 0.0
    for name, layer in read_lora(path, "").layers.items():
        difference = new[f"{name}.weight"] - old[f"{name}.weight"]
        missed += (difference - layer.change()).square().sum().item()
        size += difference.square().sum().item()
    assert errors.relative()["total"] == pytest.approx(math.sqrt(missed / size), rel=1e-3)
    assert errors.relative()["total"] > 1e-3


def test_numbers_that_are_none_are_told(tmp_path, base):
    broken = changed(base, tmp_path / "nan.safetensors", lambda name, t: t * torch.nan if "linear2" in name else t)
    with pytest.raises(ConfigError, match=r"proj_out\..* holds infinite numbers or NaN"):
        extract_lora(broken, base, RANK, tmp_path / "x.safetensors")
