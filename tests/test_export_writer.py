"""The writer of safetensors files: what the library reads of them, and nothing half done."""

from __future__ import annotations

import resource
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from small_flux import metadata, original_file, same

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.export import writer
from srpo_core.export.convert import convert


@pytest.fixture
def original(tmp_path):
    return original_file(tmp_path / "original.safetensors")


def test_the_library_reads_what_is_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, 5, generator=generator)
    tensors = {
        "zählwerk.weight": numbers, "b": numbers.bfloat16().T, "half": numbers.half(), "c.scale": torch.tensor(3.5),
        "fp8": numbers.to(torch.float8_e4m3fn), "e5": numbers.to(torch.float8_e5m2), "nothing": torch.zeros(0, 4),
        "count": torch.arange(5), "bytes": torch.arange(5, dtype=torch.uint8), "truth": torch.tensor([True, False]),
        "double": numbers.double(), "i32": torch.arange(3, dtype=torch.int32), "last": numbers[1:3, ::2],
    }  # fmt: skip
    path = tmp_path / "deep" / "ours.safetensors"
    writer.write_file(path, writer.plan(tensors.items()), tensors.items(), {"note": "ümlaut"})
    same(load_file(path), tensors)
    assert metadata(path) == {"format": "pt", "note": "ümlaut"}
    assert path.stat().st_size == writer.size(writer.plan(tensors.items()), {"note": "ümlaut"})
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 64)
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(33, dtype=torch.int16)}
    writer.write_file(tmp_path / "x.safetensors", writer.plan(tensors.items()), tensors.items(), {})
    same(load_file(tmp_path / "x.safetensors"), tensors)


def test_a_stream_that_breaks_its_promise_leaves_nothing(tmp_path):
    planned = writer.plan({"a": torch.zeros(2), "b": torch.zeros(3)}.items())
    for given in ({"a": torch.zeros(2)}, {"b": torch.zeros(3), "a": torch.zeros(2)}, {"a": torch.zeros(2).half()}):
        with pytest.raises(RuntimeError, match="planned"):
            writer.write_file(tmp_path / "x.safetensors", planned, given.items(), {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="two tensors would be called a"):
        writer.plan([("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, original):
    """A limit on the size of files stands for a full disk."""
    out = convert(original, tmp_path / "out.safetensors")
    folder = convert(original, tmp_path / "folder", overwrite=True)
    before = {path: path.read_bytes() for path in (out, folder / writer.WEIGHTS)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for place in (out, folder):
            with pytest.raises(TrainingError, match="could not be written"):
                convert(original, place, dtype="bfloat16", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "original.safetensors", "out.safetensors"]


def test_room_on_the_disk_is_checked_first(tmp_path, original, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB and its disk has 0\.00 GiB free: make room"):
        convert(original, tmp_path / "new" / "out.safetensors")
    assert not (tmp_path / "new").exists()
