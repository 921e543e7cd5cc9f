"""Photos: captions from files and tables, sizes, orientation, colour; and what is wrong with them is told early."""

from __future__ import annotations

import functools
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from tiny import encode_text, tiny_config, weights_hash

from srpo_core.assemble import assemble
from srpo_core.checks import check_files
from srpo_core.config import ConfigError, DataConfig
from srpo_core.errors import TrainingError
from srpo_core.metrics import read_metrics
from srpo_core.photos import Photo, find_photos, load_photo, load_photos
from srpo_core.prompts import ordered_sequence
from srpo_core.training_data import TrainingData, photo_batches, photo_notes, photo_sizes, sources


def picture(path, size=(40, 40), colour=(200, 30, 30), caption="a wall"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def named(folder, **options):
    root = str(folder)
    return {str(photo.path.relative_to(root)): photo.caption for photo in find_photos(root, **options)}


# ---- finding


def test_photos_come_with_their_captions_by_name_from_all_folders(tmp_path):
    picture(tmp_path / "b.jpg", caption="a dog ")
    picture(tmp_path / "a.PNG", caption="a\ncat")
    picture(tmp_path / "more" / "c.webp", caption="\ufeffa bird")
    picture(tmp_path / ".cache" / "d.png", caption=None)
    picture(tmp_path / "._a.png", caption=None)
    (tmp_path / "notes.md").write_text("not an image")
    assert named(tmp_path) == {"a.PNG": "a cat", "b.jpg": "a dog", "more/c.webp": "a bird"}
    assert list(named(tmp_path)) == ["a.PNG", "b.jpg", "more/c.webp"]


@pytest.mark.parametrize("form", ["jsonl", "csv", "captions"])
def test_tables_of_captions_are_relative_to_their_folder(tmp_path, form):
    for name in ("a.png", "deep/b.png"):
        picture(tmp_path / "set" / name, caption=None)
    picture(tmp_path / "alone.png", caption="beside")
    rows = [("a.png", 'a "red", wall'), ("deep/b.png", "two\nlines")]
    if form == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text, "id": 7}) for name, text in rows]
        (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    else:
        table = tmp_path / "set" / ("metadata.csv" if form == "csv" else "captions.csv")
        table.write_text('file_name,text\na.png,"a ""red"", wall"\ndeep/b.png,"two\nlines"\n')
    assert named(tmp_path) == {"alone.png": "beside", "set/a.png": 'a "red", wall', "set/deep/b.png": "two lines"}


def test_the_column_of_captions_can_be_named_and_a_table_wins_over_a_text_file(tmp_path):
    picture(tmp_path / "a.png", caption="beside")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "short", "long": "a long one"}')
    assert named(tmp_path) == {"a.png": "short"}
    assert named(tmp_path, column="long") == {"a.png": "a long one"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"file_name": "a.png"}', r"row 1 has no column prompt, caption or text \(it has file_name\)"),
        ('{"file_name": "b.png", "text": "x"}', r"row 1 names 'b.png', which is no image there"),
        ('{"file_name": "../a.txt", "text": "x"}', r"names '../a.txt', which is no image"),
        ('{"text": "x"}', r"row 1 has no file_name"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', r"row 2 gives a second caption"),
        ('{"file_name": "a.png", "text": 3}', r"row 1: text=3 is no text"),
        ('{"file_name": "a.png", "text": ""}', r"1 of 1 images have no caption \(a.png\)"),
        ('{"file_name": "a.png", "text": null}', r"1 of 1 images have no caption \(a.png\)"),
        ('{"file_name"', r"metadata.jsonl can't be read"),
        ("[1]", r"metadata.jsonl can't be read: line 1 is no object"),
    ],
)
def test_a_table_that_is_wrong_is_named_with_its_row(tmp_path, table, message):
    picture(tmp_path / "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(table)
    with pytest.raises(ConfigError, match=message):
        find_photos(str(tmp_path))


def test_photos_missing_or_without_captions_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data.photos='.*nowhere': no such folder"):
        find_photos(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data.prompts='.*' holds no images"):
        find_photos(str(tmp_path), "data.prompts")
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", caption=" \n")
    with pytest.raises(ConfigError, match=r"1 of 2 images have no caption \(b.png\); write it to .*b.txt, or"):
        find_photos(str(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"the caption .*b.txt can't be read as UTF-8"):
        find_photos(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no picture", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_image_is_named_before_anything_loads(tmp_path, content):
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.png").write_bytes(content)
    config = tiny_config(tmp_path / "run", model__family="no:such", data__photos=str(tmp_path / "photos"))
    with pytest.raises(ConfigError, match=r"a.png can't be read: .*take it out"):
        assemble(config)


def test_sizes_are_read_upright(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    path.with_suffix(".txt").write_text("x")
    (photo,) = find_photos(str(tmp_path))
    assert (photo.height, photo.width) == (30, 20) and load_photo(path, 30, 20).shape == (3, 30, 20)


# ---- reading


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


def middle(path):
    return [round(float(value) * 255) for value in load_photo(path, 8, 8)[:, 4, 4]]


def grey_16_bit_png(value: int, side: int = 8) -> bytes:
    """By the PNG standard: one grey channel of 16 bits, big-endian, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", value) * side) * side
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value", [0, 257, 0x8080, 65535])
def test_16_bit_grey_keeps_its_brightness(tmp_path, value):
    (tmp_path / "grey.png").write_bytes(grey_16_bit_png(value))
    assert middle(tmp_path / "grey.png") == [value // 257] * 3


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert middle(tmp_path / "clear.png") == [255, 255, 255]
    Image.new("RGBA", (8, 8), (0, 0, 255, 128)).save(tmp_path / "half.png")
    assert middle(tmp_path / "half.png") == pytest.approx([127, 127, 255], abs=1)
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    assert middle(tmp_path / "grey.png") == [255, 255, 255]


def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 60])
    image.save(tmp_path / "palette.png")
    assert middle(tmp_path / "palette.png") == [10, 200, 60]
    image.save(tmp_path / "keyed.png", transparency=1)
    assert middle(tmp_path / "keyed.png") == [255, 255, 255]


def test_cmyk_and_bilevel_and_grey_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red, green, blue = middle(tmp_path / "ink.jpg")
    assert red > 250 and green < 5 and blue < 5
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert middle(tmp_path / "bits.png") == [255, 255, 255]
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert middle(tmp_path / "grey.png") == [77, 77, 77]


def test_an_embedded_colour_profile_is_heeded(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert middle(tmp_path / "srgb.png") == pytest.approx([200, 100, 50], abs=1)
    image.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert middle(tmp_path / "broken.png") == [200, 100, 50]
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    image.save(tmp_path / "swapped.png", icc_profile=swapped)  # its red primary is sRGB's green
    assert middle(tmp_path / "swapped.png") == pytest.approx([100, 200, 50], abs=2)


def test_a_truncated_photo_is_named_when_it_is_read(tmp_path):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(content, "JPEG")
    (tmp_path / "half.jpg").write_bytes(content.getvalue()[: content.tell() // 2])
    with pytest.raises(TrainingError, match=r"the photo .*half.jpg can't be read: .*truncated.*repair it"):
        load_photo(tmp_path / "half.jpg", 8, 8)


# ---- sizes and batches


def photo(height: int, width: int, name: str = "x.png") -> Photo:
    return Photo(Path(name), name, height, width)


def test_small_photos_are_counted_and_tiny_ones_refused():
    data = DataConfig(photos="mine", height=64, width=64)
    photos = [photo(64, 64), photo(40, 80), photo(640, 480)]
    sizes = photo_sizes(data, photos)
    assert sizes == [(64, 64)] * 3
    assert any("enlarged: 1 of 3, up to 1.60 times" in note for note in photo_notes(photos, sizes))
    with pytest.raises(ConfigError, match=r"1 of 2 images are too small for 64 x 64.*\(y.png is 300 x 31\)"):
        photo_sizes(data, [photo(64, 64), photo(31, 300, "y.png")])


def test_buckets_keep_more_of_the_picture_and_it_is_told():
    photos = [photo(400, 1200), photo(800, 800), photo(1200, 800)]
    square = DataConfig(photos="mine", height=96, width=96)
    shaped = DataConfig(photos="mine", height=96, width=96, bucket_step=16)
    assert photo_sizes(shaped, photos) == [(64, 144), (96, 96), (112, 80)]
    assert any("bucket_step" in note for note in photo_notes(photos, photo_sizes(square, photos)))
    notes = photo_notes(photos, photo_sizes(shaped, photos))
    assert len(notes) == 1 and notes[0].startswith("3 photos in 3 sizes; cropping leaves 89% of a picture on average")


def test_a_step_that_leaves_no_size_is_named(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    config = tiny_config(tmp_path / "run", data__photos=str(tmp_path / "photos"), data__bucket_step=512)
    with pytest.raises(ConfigError, match=r"data.bucket_step=512: no multiple of it fits into 16 x 16 pixels"):
        check_files(config)


def test_a_step_that_the_model_cannot_take_is_named(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    config = tiny_config(tmp_path / "run", data__photos=str(tmp_path / "photos"), data__bucket_step=7)
    with pytest.raises(ConfigError, match=r"data.bucket_step=7 gives photos 14 x 14 pixels, .*multiples of 4"):
        assemble(config)


def test_every_batch_carries_its_captions_photos_and_size():
    photos = [photo(16, 32, f"wide {i}") for i in range(3)] + [photo(32, 16, f"tall {i}") for i in range(4)]
    sizes = photo_sizes(DataConfig(photos="mine", height=24, width=24, bucket_step=8), photos)
    assert set(sizes) == {(16, 32), (32, 16)}
    batches = photo_batches(photos, sizes, 2, 1, 12, lambda texts, order: ordered_sequence(encode_text, texts, order))
    data = TrainingData(1, (24, 24), 2, photos=batches)
    for rank in (0, 1):
        for micro in range(6):
            batch = data.at(micro, rank, 2)
            assert [str(path) for path in batch.photos] == list(batch.prompts.prompts)
            kind = "wide" if batch.width > batch.height else "tall"
            assert (batch.height, batch.width) in sizes and all(kind in text for text in batch.prompts.prompts)
    both = [data.at(0, rank, 2).prompts.prompts for rank in (0, 1)]
    assert both == [tuple(batches.captions.at(0, 2).prompts), tuple(batches.captions.at(2, 2).prompts)]


def test_sources_are_counted_exactly():
    data = DataConfig(photos="mine", photo_share=0.25)
    assert sources(data, 0, 100) == (25, 75)
    assert sources(DataConfig(photos="mine"), 0, 7) == (7, 0)
    assert sources(DataConfig(photo_share=0.25), 0, 7) == (0, 7)
    for micros in range(1, 30):
        assert sum(sources(data, 3, micros)) == micros


def mixed(tmp_path, **more):
    for i in range(5):
        size = (40, 40) if i % 2 else (80, 40)
        picture(tmp_path / "photos" / f"{i}.png", size, (50 * i, 100, 30), f"wall {i}")
    return {
        "data__photos": str(tmp_path / "photos"), "data__bucket_step": 4, "data__photo_share": 0.5,
        "optim__accumulation": 2, "optim__steps": 6, **more,
    }  # fmt: skip


def test_a_mixed_run_trains_on_both_in_their_shares(tmp_path):
    trainer = assemble(tiny_config(tmp_path / "run", **mixed(tmp_path)))
    seen = [trainer.learner.data.at(micro, 0, 1) for micro in range(12)]
    assert sum(bool(batch.photos) for batch in seen) == 6
    assert {(batch.height, batch.width) for batch in seen if not batch.photos} == {(16, 16)}
    assert len({(batch.height, batch.width) for batch in seen if batch.photos}) == 2
    micro = next(i for i, batch in enumerate(seen) if batch.photos and batch.height != batch.width)
    clean = trainer.learner._rollout(micro // 2 + 1, micro % 2)
    expected = load_photos(seen[micro].photos, seen[micro].height, seen[micro].width)
    assert torch.equal(clean.clean, trainer.autoencoder.encode(expected))
    assert trainer.train().finished
    lines = read_metrics(tmp_path / "run")[1:]
    assert all(line["source"] == {"photos": 2, "rollouts": 2} for line in lines)


def test_a_mixed_run_resumes_bit_for_bit(tmp_path):
    course = mixed(tmp_path, data__photo_share=0.4)
    whole = assemble(tiny_config(tmp_path / "whole", **course))
    whole.train()
    assemble(tiny_config(tmp_path / "broken", **course | {"optim__steps": 3})).train()
    resumed = assemble(tiny_config(tmp_path / "broken", **course))
    assert resumed.train(resume=True).finished
    assert weights_hash(resumed.flow.module) == weights_hash(whole.flow.module)


def test_the_notes_about_photos_are_said_when_training_starts(tmp_path, capsys):
    assemble(tiny_config(tmp_path / "run", **mixed(tmp_path))).train()
    assert "5 photos in 2 sizes" in capsys.readouterr().out


# ---- whatever lies in the folder


@functools.cache  # a profile holds the time at which it was made
def encoded(form: str) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    image = Image.fromarray(noise).convert("P" if form == "PNG" else "RGB")
    exif = Image.Exif()
    exif[0x0112] = 8
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(content, form, **({} if form == "BMP" else {"exif": exif, "icc_profile": srgb}))
    return content.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_read_or_named_and_nothing_else(tmp_path, form, data):
    content = bytearray(encoded(form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    path.with_suffix(".txt").write_text("x")
    try:
        (found,) = find_photos(str(tmp_path))
        assert found.height > 0 and found.width > 0
        assert load_photo(path, 8, 8).isfinite().all()
    except (ConfigError, TrainingError) as error:
        assert "x.png can't be read" in str(error)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@given(
    content=st.one_of(
        st.binary(max_size=80),
        st.lists(st.sampled_from(["file_name", "text", "a.png", ",", "\n", '"', "{", "}", ":", "\0", "[" * 40])).map(
            lambda parts: "".join(parts).encode()
        ),
        st.dictionaries(
            st.sampled_from(["file_name", "text", "x"]), st.one_of(st.text(), st.none(), st.integers())
        ).map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")),
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_gives_captions_or_an_error_that_names_it(tmp_path, name, content):
    if not (tmp_path / "a.png").exists():
        picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    try:
        (found,) = find_photos(str(tmp_path))
        assert found.caption
    except ConfigError as error:
        assert name in str(error) or "have no caption" in str(error)


def test_a_name_that_no_file_can_have_and_lines_within_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x" * 5000 + ".png", "text": "x"}))
    with pytest.raises(ConfigError, match="which is no image there"):
        find_photos(str(tmp_path))
    row = json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert named(tmp_path) == {"a.png": "one two"}
