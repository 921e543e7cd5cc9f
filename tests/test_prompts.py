"""Prompts and photos: read with care, shuffled as a function of the seed, encoded once."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import encode_text

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.photos import find_photos, load_photo
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
    batch, photos = sequence.at(38, 2)
    assert batch.prompts == tuple(prompts[i] for i in order[38:]) and photos == []
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


def test_photos_come_with_their_captions(tmp_path):
    for name in ("b.jpg", "a.PNG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a\ncat")
    (tmp_path / "b.txt").write_text("a dog ")
    (tmp_path / "notes.md").write_text("not an image")
    assert [(path.name, caption) for path, caption in find_photos(str(tmp_path))] == [
        ("a.PNG", "a cat"),
        ("b.jpg", "a dog"),
    ]


def test_photos_missing_or_without_captions_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data.photos='.*nowhere': no such folder"):
        find_photos(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"holds no images"):
        find_photos(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"1 of 2 images have no caption \(b.png\); write it to .*b.txt"):
        find_photos(str(tmp_path))


def test_a_photo_is_scaled_to_cover_and_cropped_around_its_centre(tmp_path):
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # the middle third, a square
    image.save(tmp_path / "wide.png")
    photo = load_photo(tmp_path / "wide.png", 10, 10)
    assert photo.shape == (3, 10, 10) and photo.dtype == torch.float32
    assert torch.allclose(photo[:, :, 2:8], torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1), atol=0.01)


def test_a_photo_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 10))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.jpg", exif=exif)
    photo = load_photo(tmp_path / "turned.jpg", 20, 20)
    assert photo[:, :8].mean() < 0.1 and photo[:, 12:].mean() > 0.9


def test_a_broken_photo_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"broken.png can't be read"):
        load_photo(tmp_path / "broken.png", 8, 8)
