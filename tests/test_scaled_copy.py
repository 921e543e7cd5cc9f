"""The scaled-fp8 copy beside a FLUX file: made once, renewed when the file changes, never in another file's place."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from flux_weights import DEV, bytes_alive, header_only, original_shapes
from safetensors.torch import load_file, save_file
from small_flux import SHAPES, diffusers_tensors, metadata, original_file, same

from srpo_core.config import ConfigError
from srpo_core.export import writer
from srpo_core.export.convert import convert
from srpo_core.export.scaled_copy import copy_path, scaled_copy
from srpo_core.models.flux_files import transformer_at
from srpo_core.weights.recognise import recognise
from srpo_core.weights.tensors import open_tensors

SETTING, WAY_OUT = "weights='scaled fp8'", "choose 'bfloat16'"


def copy_of(path, **on):
    return scaled_copy(transformer_at(path, ""), SETTING, WAY_OUT, **on)


@pytest.fixture
def source(tmp_path):
    return original_file(tmp_path / "flux.safetensors", metadata={"srpo_step": "7", "other": "x"})


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("flux.safetensors", "flux-scaled-fp8.safetensors"),
        ("FLUX.1.sft", "FLUX.1-scaled-fp8.safetensors"),
        ("model.safetensors.index.json", "model-scaled-fp8.safetensors"),
        ("model-00002-of-00003.safetensors", "model-scaled-fp8.safetensors"),
    ],
)
def test_its_name(tmp_path, name, copy):
    assert copy_path(tmp_path / name) == tmp_path / copy


def test_it_is_what_export_makes(tmp_path, source):
    copy = copy_of(source)
    assert copy == tmp_path / "flux-scaled-fp8.safetensors"
    same(load_file(copy), load_file(convert(source, tmp_path / "export.safetensors", "comfyui", "scaled-fp8")))
    assert recognise(open_tensors(copy, "")).quantisation == "scaled fp8"
    exact, rounded = diffusers_tensors(source), diffusers_tensors(copy)
    for name, tensor in exact.items():  # within a block, half a step of 3 mantissa bits, or of the smallest one
        scale = tensor.abs().max() / 448
        assert ((rounded[name].float() - tensor).abs() <= tensor.abs() / 16 + scale * 2**-10).all(), name


def test_it_keeps_what_is_known_of_its_origin(source):
    known = metadata(copy_of(source))
    assert known["srpo_step"] == "7"
    assert "other" not in known


def test_it_is_made_once(source):
    first = copy_of(source)
    made = first.stat().st_mtime_ns
    told = []
    assert copy_of(source, on_bytes=lambda *bytes: told.append(bytes)) == first
    assert first.stat().st_mtime_ns == made
    assert not told


def test_a_changed_file_gets_a_new_copy(source):
    before = load_file(copy_of(source))
    original_file(source, dtype=torch.bfloat16)
    tensors = {name: 2 * tensor for name, tensor in load_file(source).items()}
    save_file(tensors, source)
    after = load_file(copy_of(source))
    scale = "double_blocks.0.img_attn.qkv.scale_weight"
    assert after[scale] == 2 * before[scale]


def test_shards(tmp_path, source):
    whole = load_file(copy_of(source))
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(SHAPES)
    parts = {f"flux-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    tensors = load_file(source)
    for name, held in parts.items():
        save_file({one: tensors[one] for one in held}, folder / name)
    index = folder / "flux.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {one: name for name, held in parts.items() for one in held}}))
    copy = copy_of(index)
    assert copy == folder / "flux-scaled-fp8.safetensors"
    same(load_file(copy), whole)
    made = copy.stat().st_mtime_ns
    assert copy_of(index).stat().st_mtime_ns == made
    last = list(parts)[1]
    save_file({one: 3 * tensors[one] for one in parts[last]}, folder / last)
    assert copy_of(index).stat().st_mtime_ns != made


@pytest.mark.parametrize("other", ["weights", "damaged", "text"])
def test_another_file_in_its_place_stays(tmp_path, source, other):
    place = copy_path(source)
    if other == "weights":
        original_file(place)
    else:
        place.write_bytes(b"notes" if other == "text" else b"\xff" * 64)
    before = place.read_bytes()
    with pytest.raises(ConfigError, match=r"weights='scaled fp8' would write .*flux-scaled-fp8.*another file is there"):
        copy_of(source)
    assert place.read_bytes() == before


def test_progress_ends_at_all_of_it(source):
    told = []
    copy = copy_of(source, on_bytes=lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done) and done[0] == 0
    assert set(totals) == {done[-1]}
    assert 0 < copy.stat().st_size - done[-1] < 20_000


class Interrupted(BaseException):
    """As ComfyUI's own interruption is one."""


def test_an_interruption_leaves_nothing(tmp_path, source):
    def stop(done, total):
        if done > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        copy_of(source, on_bytes=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["flux.safetensors"]


def test_a_full_disk_is_told_before(tmp_path, source, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB and its disk has 0\.00 GiB free: make room, or choose 'bf"):
        copy_of(source)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="its user may write anywhere")
def test_a_read_only_folder(tmp_path, source):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match=r"weights='scaled fp8': .*can't be written to .*; choose 'bfloat16'"):
            copy_of(source)
    finally:
        tmp_path.chmod(0o700)


def test_memory_holds_one_layer(tmp_path, monkeypatch):
    """Of 57 blocks, no more than one stacked layer's tensors are in memory at once."""
    shapes = original_shapes(**DEV | {"width": 256, "text": 128})
    source = header_only(tmp_path / "flux.safetensors", shapes)
    peak = bytes_alive(monkeypatch)
    copy_of(source)
    largest = max(2 * shape[0] * shape[-1] for shape in shapes.values())
    assert peak[0] <= 2 * largest
