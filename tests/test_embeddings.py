"""The cache of embeddings: exact, whole files only, shared by encoders and processes; prompts read through it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import encode_text

from srpo_core.config import ConfigError
from srpo_core.description import make_config
from srpo_core.embeddings import EmbeddingCache, StoredPrompts, embedding_cache, encode
from srpo_core.errors import TrainingError
from srpo_core.interfaces import PromptBatch
from srpo_core.prompts import prompt_sequence

PROMPTS = ["a cat", "", "eine Katze in Zürich", "two\nlines", "図" * 3000]


class CountingEncoder:
    """Encodes as the tiny family does and remembers what it was asked for."""

    fingerprint = "tiny"

    def __init__(self, batch_size=16):
        self.batch_size, self.calls = batch_size, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return encode_text(prompts)

    @property
    def seen(self):
        return [prompt for call in self.calls for prompt in call]


def same(batch, prompts):
    theirs = encode_text(prompts)
    return batch.prompts == theirs.prompts and all(
        torch.equal(batch.embeds[k], theirs.embeds[k]) for k in theirs.embeds
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_come_back_bit_for_bit(tmp_path, dtype):
    """Not-a-number payloads and signed zeros too; each prompt in its own memory."""
    tokens = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7]).to(dtype)
    batch = PromptBatch(tuple(PROMPTS), {"tokens": tokens, "ids": torch.arange(5)})
    cache = EmbeddingCache(tmp_path, "encoder")
    cache.put(batch)
    for row, prompt in enumerate(PROMPTS):
        found = cache.get(prompt)
        assert found["tokens"].dtype == dtype and found["ids"] == row
        assert torch.equal(found["tokens"].view(torch.uint8), tokens[row].view(torch.uint8))
    assert cache.missing(PROMPTS) == []
    assert cache.size(PROMPTS) == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


def test_files_are_named_by_encoder_and_prompt(tmp_path):
    one, other = EmbeddingCache(tmp_path, "one"), EmbeddingCache(tmp_path, "other")
    one.put(encode_text(["a cat"]))
    assert other.get("a cat") is None and one.get("a dog") is None
    assert other.missing(["a cat", "a cat", "b"]) == ["a cat", "b"] and one.missing(["a cat", "b"]) == ["b"]
    with safe_open(one.file("a cat"), "pt") as file:
        assert file.metadata() == {"prompt": "a cat", "encoder": "one"}
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == []


@pytest.mark.parametrize("damage", [b"", b"x", b"\x10\0\0\0\0\0\0\0{}", None], ids=["empty", "stub", "header", "cut"])
def test_damaged_files_are_made_again(tmp_path, damage):
    cache, encoder = EmbeddingCache(tmp_path, "tiny"), CountingEncoder()
    encode(encoder, PROMPTS, cache=cache)
    path = cache.file("a cat")
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert cache.missing(PROMPTS) == ["a cat"]
    encoder.calls.clear()
    stored = encode(encoder, PROMPTS, cache=cache)
    assert encoder.seen == ["a cat"] and same(stored.select(range(5)), PROMPTS)


def test_only_what_is_missing_is_encoded_in_the_encoders_own_batches(tmp_path):
    cache, encoder = EmbeddingCache(tmp_path, "tiny"), CountingEncoder(batch_size=2)
    encode(encoder, ["b", "c"], cache=cache)
    stored = encode(encoder, ["a", "b", "a", "d", "e"], cache=cache)
    assert encoder.calls == [["b", "c"], ["a", "d"], ["e"]]
    assert isinstance(stored, StoredPrompts) and len(stored) == 5
    assert same(stored.select([4, 0, 2]), ["e", "a", "a"])
    encode(None, ["a", "b", "c"], cache=cache)  # nothing is missing: no encoder is needed
    in_memory = encode(encoder, ["a", "b", "a"])
    assert isinstance(in_memory, PromptBatch) and same(in_memory, ["a", "b", "a"])


def test_an_interrupted_encoding_goes_on_where_it_was(tmp_path):
    cache = EmbeddingCache(tmp_path, "tiny")
    prompts = [f"prompt {i}" for i in range(10)]

    class Stops(CountingEncoder):
        def __call__(self, prompts):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(prompts)

    with pytest.raises(KeyboardInterrupt):
        encode(Stops(batch_size=2), prompts, cache=cache)
    encoder = CountingEncoder(batch_size=2)
    assert same(encode(encoder, prompts, cache=cache).select(range(10)), prompts)
    assert encoder.seen == prompts[6:]


def test_a_sequence_reads_from_disk_what_it_would_hold_in_memory(tmp_path):
    prompts, cache = [f"prompt {i}" for i in range(20)], EmbeddingCache(tmp_path, "tiny")
    in_memory = prompt_sequence(encode_text, prompts, seed=3, length=50)
    on_disk = prompt_sequence(CountingEncoder(), prompts, seed=3, length=50, cache=cache)
    again = prompt_sequence(None, prompts, seed=3, length=50, cache=cache)
    for position in range(0, 50, 4):
        wanted = in_memory.at(position, 4)
        for sequence in (on_disk, again):
            found = sequence.at(position, 4)
            assert found.prompts == wanted.prompts
            assert all(torch.equal(found.embeds[name], wanted.embeds[name]) for name in wanted.embeds)


def test_a_sequence_on_disk_holds_texts_and_a_place(tmp_path):
    """And no tensor: its memory doesn't grow with the embeddings."""
    cache = EmbeddingCache(tmp_path, "tiny")
    stored = prompt_sequence(CountingEncoder(), PROMPTS, 0, 5, cache).encoded
    assert vars(stored) == {"prompts": stored.prompts, "cache": cache} and sorted(stored.prompts) == sorted(PROMPTS)
    assert vars(cache) == {"folder": tmp_path, "fingerprint": "tiny"}


def test_a_file_lost_during_a_run_is_named(tmp_path):
    cache = EmbeddingCache(tmp_path, "tiny")
    stored = encode(CountingEncoder(), ["a cat"], cache=cache)
    shutil.rmtree(tmp_path)
    with pytest.raises(TrainingError, match=r"embeddings of 'a cat' were lost or damaged.*--resume makes them again"):
        stored.select([0])


WRITER = """
import sys, torch
from srpo_core.embeddings import EmbeddingCache
from srpo_core.interfaces import PromptBatch
cache, start = EmbeddingCache(sys.argv[1], "tiny"), int(sys.argv[2])
for turn in range(60):
    number = (start + turn) % 20
    cache.put(PromptBatch((f"prompt {number}",), {"tokens": torch.full((1, 64, 64), float(number))}))
"""


def test_processes_share_a_folder(tmp_path):
    """Two processes write the same twenty prompts over and over, each from another one on, while a third reads."""
    root, cache = Path(__file__).parents[1], EmbeddingCache(tmp_path, "tiny")
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(start)], cwd=root, stderr=subprocess.PIPE) for start in (0, 10)]

    def check():
        for number in range(20):
            found = cache.get(f"prompt {number}")
            assert found is None or torch.equal(found["tokens"], torch.full((64, 64), float(number)))

    while any(writer.poll() is None for writer in writers):
        check()
    assert [writer.wait() for writer in writers] == [0, 0], [writer.stderr.read() for writer in writers]
    check()
    assert cache.missing([f"prompt {number}" for number in range(20)]) == []
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 20


def test_where_a_runs_cache_is(tmp_path):
    config = make_config({"output": {"dir": str(tmp_path / "run")}})
    assert embedding_cache(encode_text, config) is None
    assert embedding_cache(CountingEncoder(), config).folder == tmp_path / "run" / "embeddings"
    config.data.embeddings = str(tmp_path / "shared")
    assert embedding_cache(CountingEncoder(), config).folder == tmp_path / "shared"
    (tmp_path / "file").write_text("x")
    config.data.embeddings = str(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match=r"data\.embeddings: the folder .* can't be made"):
        embedding_cache(CountingEncoder(), config)


def test_a_folder_that_cannot_be_written_to_is_told_before_the_encoder_runs(tmp_path):
    """And does no harm where all is there already."""
    cache, encoder = EmbeddingCache(tmp_path / "cache", "tiny"), CountingEncoder()
    encode(encoder, ["a cat"], cache=cache)
    encoder.calls.clear()

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse)
        encode(encoder, ["a cat"], cache=cache)
        with pytest.raises(ConfigError, match=r"data\.embeddings: .* can't be written to \(Read-only file system\)"):
            encode(encoder, ["a cat", "a dog"], cache=cache)
    assert encoder.calls == [] and [path.name for path in cache.folder.glob(".tmp-*")] == []


def test_a_full_disk_stops_after_the_first_batch(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    encoder = CountingEncoder(batch_size=1)
    with pytest.raises(TrainingError, match=r"embeddings of 2 more prompts take .* GB free; data\.embeddings"):
        encode(encoder, ["a", "b", "c"], cache=EmbeddingCache(tmp_path, "tiny"))
    assert encoder.seen == ["a"]
