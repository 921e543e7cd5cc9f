"""Prompts and photos: read with care, shuffled as a function of the seed, encoded once."""

from __future__ import annotations

import pytest
import torch
from tiny import encode_text

from srpo_core.config import ConfigError
from srpo_core.prompts import encode, prompt_sequence, read_prompts, shuffled_order, without_held_out


def test_blank_lines_and_marks_are_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog  \n\n".encode())
    assert read_prompts(str(path), "data.prompts") == ["a cat", "a dog"]


def test_builtin_is_the_familys_own():
    assert read_prompts("builtin", "data.prompts", ("a", "b")) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"data.eval_prompts=builtin: this model family brings no prompts"):
        read_prompts("builtin", "data.eval_prompts")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "holds no prompts"), (b" \n\n", "holds no prompts"), (b"\xff\xfe\xfa", "UTF-8")],
)
def test_a_file_that_gives_no_prompts_is_an_error(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data.prompts='.*prompts.txt'.*{message}"):
        read_prompts(str(path), "data.prompts")


def test_held_out_prompts_are_not_trained_on():
    assert without_held_out(["a", "b", "c"], ["b"]) == ["a", "c"]
    with pytest.raises(ConfigError, match=r"none is left to train on"):
        without_held_out(["b"], ["b", "c"])


def test_every_epoch_has_every_prompt_in_another_order():
    order = shuffled_order(seed=7, count=10, length=35)
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled_order(7, 10, 12) == order[:12] and shuffled_order(8, 10, 35) != order


def test_only_visited_prompts_are_encoded_each_once():
    encoded = []

    def count(prompts):
        encoded.extend(prompts)
        return encode_text(prompts)

    prompts = [f"prompt {i}" for i in range(100)]
    sequence = prompt_sequence(count, prompts, seed=0, length=40)
    order = shuffled_order(0, 100, 40)
    assert encoded == [prompts[i] for i in order]
    batch = sequence.at(38, 2)
    assert batch.prompts == tuple(prompts[i] for i in order[38:])
    assert torch.equal(batch.embeds["prompt_embeds"], encode_text(batch.prompts).embeds["prompt_embeds"])
    encoded.clear()
    prompt_sequence(count, prompts[:3], seed=0, length=40)
    assert sorted(encoded) == prompts[:3]


def test_encoding_goes_in_batches():
    sizes = []

    def count(prompts):
        sizes.append(len(prompts))
        return encode_text(prompts)

    assert len(encode(count, ["a"] * 10, batch_size=4)) == 10
    assert sizes == [4, 4, 2]
