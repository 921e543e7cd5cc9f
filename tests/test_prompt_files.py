"""Prompts from every kind of file and folder, and what is said of files that give none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from srpo_core.config import ConfigError
from srpo_core.prompts import read_prompts

ANY_FOLDER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROMPTS = ["a cat, asleep", 'a "quoted" dog', "eine Katze in Zürich", "two\nlines", "図書館の猫"]


def read(path: Path, column: str | None = None) -> list[str]:
    return read_prompts(str(path), "data.prompts", column=column)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_csv(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *rows])
    return path


# ---- tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [["id", "prompt"], ["prompt", "id"], ["caption", " text "], ["id", "caption"]])
def test_csv(tmp_path, delimiter, header):
    """Quoted commas, quotes and line breaks; the first of prompt, caption and text; Excel's other delimiters."""
    column = next(i for name in ("prompt", "caption", "text") for i, h in enumerate(header) if h.strip() == name)
    rows = [[prompt if i == column else "x" for i in range(2)] for prompt in PROMPTS]
    assert read(write_csv(tmp_path / "p.csv", header, rows, delimiter)) == PROMPTS


def test_a_named_column(tmp_path):
    path = write_csv(tmp_path / "p.csv", ["prompt", "long"], [["a", "b"], ["c", " d "]])
    assert read(path, "long") == ["b", "d"]
    path = write(tmp_path / "p.json", json.dumps([{"prompt": "a", "long": "b"}]))
    assert read(path, "long") == ["b"]


def test_json_lists_of_texts_and_of_objects(tmp_path):
    assert read(write(tmp_path / "anime.json", json.dumps(PROMPTS))) == PROMPTS
    hpd = [{"prompt": prompt, "image_path": ["a.jpg", "b.jpg"], "rank": [0, 1]} for prompt in PROMPTS]
    assert read(write(tmp_path / "test.json", json.dumps(hpd, indent=1))) == PROMPTS


def test_json_lines(tmp_path):
    """A line break of Unicode's own is text there, not the end of a line."""
    prompts = [*PROMPTS, "a\u2028b\x0bc\x85d"]
    text = "\n".join(json.dumps({"caption": prompt}, ensure_ascii=False) for prompt in prompts)
    assert read(write(tmp_path / "p.jsonl", text + "\n\n")) == prompts
    assert read(write(tmp_path / "p.ndjson", "\r\n".join(json.dumps(prompt) for prompt in PROMPTS))) == PROMPTS


BAD = [
    ("p.csv", "prompt,id\na,1\n,2\n", r"line 3: the prompt is empty"),
    ("p.csv", "title,id\na,1\n", r"line 1: has no column called prompt or caption or text; there are 'title', 'id'"),
    ("p.csv", "id,prompt\n1,a\n2\n", r"line 3: has 1 columns, the header 2"),
    ("p.csv", "prompt\n" + "a" * 200_000, r"line 2: is no CSV: field larger"),
    ("p.csv", b"prompt\na\nb\xff\n", r"line 3: can't be read as UTF-8"),
    ("p.csv", "prompt,id\n", r"holds no prompts"),
    ("p.json", '{"prompt": "a"}', r"must hold a list of prompts"),
    ("p.json", '["a",\n "b"', r"line 2: is no JSON"),
    ("p.json", '["a", ""]', r"item 2: the prompt is empty"),
    ("p.json", '["a", null]', r"item 2: a prompt must be text, not nothing"),
    ("p.json", '["a", ["b"]]', r"item 2: a prompt must be text, not a list"),
    ("p.json", '["a", "\\ud800"]', r"item 2: the prompt holds half a character"),
    ("p.json", "[" * 200_000, r"is no usable JSON"),
    ("p.json", "[" + "1" * 10_000 + "]", r"p\.json'"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"line 2: a prompt must be text, not a number"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', r"line 3: has no 'prompt'"),
    ("p.jsonl", '{"prompt": "a"}\n{oh}\n', r"line 2: is no JSON"),
    ("p.jsonl", '\n{"title": "a"}\n', r"line 2: has no column called prompt or caption or text; there are 'title'"),
    ("p.txt", b"a cat\n\n\xe4\n", r"line 3: can't be read as UTF-8 text"),
    ("p.parquet", b"PAR1 but no more", r"is damaged, or no parquet file"),
    ("p.arrow", b"ARROW1 but no more", r"is damaged, or no arrow file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, content, message):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"data.prompts={str(path)!r}: ")


def test_a_missing_column_that_was_named(tmp_path):
    path = write_csv(tmp_path / "p.csv", ["prompt", "id"], [["a", "1"]])
    with pytest.raises(ConfigError, match=r"has no column 'long'; there are 'prompt', 'id'; data\.prompt_column"):
        read(path, "long")


# ---- folders


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path)
    return path


def arrow_stream(path: Path, columns: dict[str, list[object]]) -> Path:
    arrow = pytest.importorskip("pyarrow")

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table(columns)
    with arrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def saved(folder: Path, shards: list[list[str]]) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` leaves it."""
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, prompts in zip(names, shards, strict=True):
        arrow_stream(folder / name, {"image": [b""] * len(prompts), "prompt": prompts})
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_indices_data_files": None}
    write(folder / "state.json", json.dumps(state))
    write(folder / "dataset_info.json", json.dumps({"features": {}}))
    return folder


def test_a_saved_dataset_and_its_training_split(tmp_path):
    assert read(saved(tmp_path / "one", [["a", "b"], ["c"]])) == ["a", "b", "c"]
    saved(tmp_path / "many" / "train", [["d"]])
    saved(tmp_path / "many" / "test", [["e"]])
    write(tmp_path / "many" / "dataset_dict.json", json.dumps({"splits": ["test", "train"]}))
    assert read(tmp_path / "many") == ["d"]
    assert read(tmp_path / "many" / "test") == ["e"]
    write(tmp_path / "many" / "dataset_dict.json", json.dumps({"splits": ["test", "dev"]}))
    with pytest.raises(ConfigError, match=r"its splits are test, dev; name the folder of one"):
        read(tmp_path / "many")
    write(tmp_path / "many" / "dataset_dict.json", '{"splits"')
    with pytest.raises(ConfigError, match=r"dataset_dict\.json: line 1: is no JSON"):
        read(tmp_path / "many")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"lacks its data \(data-00001-of-00002\.arrow\)"):
        read(tmp_path / "one")


def test_parquet_shards_as_a_hub_serves_them(tmp_path):
    """Dictionary-encoded text too; the training split where names tell splits apart; the error names shard and row."""
    arrow = pytest.importorskip("pyarrow")
    write(tmp_path / "README.md", "# a data set")
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", {"caption": ["a", "b"], "n": [1, 2]})
    coded = arrow.array(["c", "c"]).dictionary_encode()
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"caption": coded, "n": [1, 2]})
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"caption": ["held out"], "n": [1]})
    assert read(tmp_path) == ["a", "b", "c", "c"]
    assert read(tmp_path / "data" / "test-00000-of-00001.parquet") == ["held out"]
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"caption": ["c", None]})
    with pytest.raises(ConfigError, match=r"train-00001-of-00002\.parquet: row 2: a prompt must be text, not nothing"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"has no column 'prompt'; there are 'caption', 'n'"):
        read(tmp_path, "prompt")


def test_tables_of_text_in_a_folder(tmp_path):
    write(tmp_path / "a" / "train-00001.jsonl", '{"prompt": "b"}')
    write(tmp_path / "a" / "train-00000.jsonl", '{"prompt": "a"}')
    write(tmp_path / "a" / "dataset_info.json", "{}")
    assert read(tmp_path / "a") == ["a", "b"]
    write(tmp_path / "b" / "anime.json", '["a"]')
    write(tmp_path / "b" / "photo.json", '["b"]')
    assert read(tmp_path / "b") == ["a", "b"]


def test_images_with_captions(tmp_path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    write(tmp_path / "a.txt", "a\ncat")
    with pytest.raises(ConfigError, match=r"data\.prompts=.* 1 of 2 images have no caption \(b\.png\)"):
        read(tmp_path)
    write(tmp_path / "b.txt", "a dog")
    assert read(tmp_path) == ["a cat", "a dog"]


def test_a_folder_of_neither(tmp_path):
    write(tmp_path / "notes.md", "x")
    with pytest.raises(ConfigError, match=r"this folder holds neither a table nor images; prompts are a text file"):
        read(tmp_path)


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    write(tmp_path / "p.parquet", b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow: pip install pyarrow"):
        read(tmp_path / "p.parquet")


def test_hundreds_of_thousands_of_prompts(tmp_path):
    prompts = [f"a thing, number {i}" for i in range(200_000)]
    rows = "\n".join(f'"{prompt}",{i}' for i, prompt in enumerate(prompts))
    assert read(write(tmp_path / "p.csv", f"prompt,id\n{rows}\n")) == prompts
    assert read(write(tmp_path / "p.jsonl", "\n".join(json.dumps({"prompt": p}) for p in prompts))) == prompts


# ---- any bytes


def outcome(path: Path) -> list[str] | None:
    """The prompts, or None where a ConfigError says why not; anything else fails the test."""
    try:
        prompts = read(path)
    except ConfigError as error:
        assert str(path) in str(error)
        return None
    assert prompts and all(prompt == prompt.strip() and prompt.encode() for prompt in prompts)
    return prompts


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl"])
@ANY_FOLDER
@given(data=st.binary(max_size=200))
@example(data=b"prompt\n\x00")
@example(data=b'prompt\n"a')
@example(data=b"\xef\xbb\xbfprompt\r\ra\r")
@example(data=b'[{"prompt": "a"}, {}]')
@example(data=b"NaN")
def test_any_bytes_are_prompts_or_an_error(tmp_path, suffix, data):
    outcome(write(tmp_path / f"any{suffix}", data))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@ANY_FOLDER
@given(rows=st.lists(st.tuples(cells, cells), max_size=5))
def test_any_table_comes_back_as_it_was_written(tmp_path, rows):
    """Through Python's own CSV and JSON writers."""
    wanted = [prompt.strip() for _, prompt in rows]
    expected = wanted if rows and all(wanted) else None
    assert outcome(write_csv(tmp_path / "p.csv", ["id", "prompt"], [list(row) for row in rows])) == expected
    lines = "\n".join(json.dumps({"id": a, "prompt": b}, ensure_ascii=False) for a, b in rows)
    assert outcome(write(tmp_path / "p.jsonl", lines)) == expected
    assert outcome(write(tmp_path / "p.json", json.dumps([{"id": a, "prompt": b} for a, b in rows]))) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "text", "x"]), inner),
    max_leaves=8,
)


@ANY_FOLDER
@given(value=json_values)
def test_any_json_is_prompts_or_an_error(tmp_path, value):
    outcome(write(tmp_path / "p.json", json.dumps(value)))
    write(tmp_path / "folder" / "dataset_dict.json", json.dumps(value))
    assert outcome(tmp_path / "folder") is None
    (tmp_path / "folder" / "dataset_dict.json").unlink()
    write(tmp_path / "folder" / "state.json", json.dumps(value))
    assert outcome(tmp_path / "folder") is None
    (tmp_path / "folder" / "state.json").unlink()
