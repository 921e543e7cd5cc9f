"""Prompts in files: text, tables (CSV, JSON, JSON lines, Parquet, Arrow), dataset folders, images with captions.

A text file's blank lines are no prompts. A table's rows must all hold one: an empty or missing value is an error that
names file and row, as are a missing column, bytes that are no UTF-8 and a damaged file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srpo_core.config import ConfigError
from srpo_core.photos import SUFFIXES, find_photos

COLUMNS = ("prompt", "caption", "text")
"""Columns of prompts, where none is named: the first that is there."""
FORMS = (
    "a text file with a prompt per line, a .csv, .jsonl, .json, .parquet or .arrow file, a dataset's folder, or a"
    " folder of images with captions"
)
_DELIMITERS = (",", ";", "\t")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)[-_.]", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A file or folder, the setting (with its value) that names it, and the column of prompts if the user named it."""

    path: Path
    setting: str
    column: str | None = None

    def error(self, reason: str, line: int | None = None, unit: str = "line") -> ConfigError:
        """A ConfigError with the setting, the file (where it is one in a folder) and the place in it."""
        inside = "" if repr(str(self.path)) in self.setting else f"{self.path.name}: "
        place = f"{unit} {line}: " if line is not None else ""
        return ConfigError(f"{self.setting}: {inside}{place}{reason}")

    def text(self) -> str:
        """The whole file as text. ConfigError with the line where it is no UTF-8."""
        data = self.path.read_bytes()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(
                f"can't be read as UTF-8 text ({error.reason}); save the file as UTF-8",
                data.count(b"\n", 0, error.start) + 1,
            ) from error

    def choose(self, columns: Sequence[str], line: int | None = None) -> str:
        """The column of prompts among `columns`."""
        for name in (self.column,) if self.column is not None else COLUMNS:
            if name in columns:
                return name
        wanted = repr(self.column) if self.column is not None else f"called {' or '.join(COLUMNS)}"
        there = ", ".join(repr(name) for name in columns[:20]) or "none"
        raise self.error(f"has no column {wanted}; there are {there}; data.prompt_column names another", line)

    def clean(self, value: object, line: int, unit: str = "line") -> str:
        """A table's value as a prompt."""
        if not isinstance(value, str):
            raise self.error(f"a prompt must be text, not {_kind(value)}", line, unit)
        prompt = value.strip()
        if not prompt:
            raise self.error("the prompt is empty; fill it in or remove it", line, unit)
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise self.error("the prompt holds half a character (a lone surrogate); repair it", line, unit)
        return prompt


def _kind(value: object) -> str:
    names: list[tuple[type, str]] = [(bool, "true or false"), (int, "a number"), (float, "a number"), (list, "a list")]
    if value is None:
        return "nothing (null)"
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def read_prompt_files(value: str, setting: str, column: str | None = None) -> list[str]:
    """All prompts of a file or folder, in order. ConfigError names setting, file, line and reason."""
    source = Source(Path(value), f"{setting}={value!r}", column)
    try:
        if source.path.is_dir():
            prompts = _read_folder(source, setting)
        elif source.path.is_file():
            prompts = _read(source)
        else:
            raise source.error(f"no such file or folder; prompts are {FORMS}")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise source.error(f"can't be read: {error}") from error
    if not prompts:
        raise source.error("holds no prompts; write one per line")
    return prompts


def _read(source: Source) -> list[str]:
    return list(_READERS.get(source.path.suffix.lower(), _read_text)(source))


def _read_text(source: Source) -> Iterator[str]:
    return (line.strip() for line in source.text().splitlines() if line.strip())


def _read_csv(source: Source) -> Iterator[str]:
    text = source.text()
    line = 1
    try:
        headers = {mark: [name.strip() for name in next(_rows(text, mark), [])] for mark in _DELIMITERS}
        wanted = (source.column,) if source.column is not None else COLUMNS
        delimiter = next((mark for mark, names in headers.items() if set(wanted) & set(names)), ",")
        index = headers[delimiter].index(source.choose(headers[delimiter], 1))
        for number, row in enumerate(rows := _rows(text, delimiter)):
            line = rows.line_num
            if number and len(row) > index:
                yield source.clean(row[index], line)
            elif number and row:
                raise source.error(f"has {len(row)} columns, the header {len(headers[delimiter])}", line)
    except csv.Error as error:
        raise source.error(f"is no CSV: {error}", line + 1) from error


def _rows(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _parse(text: str, source: Source, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise source.error(f"is no JSON: {error.msg}", line + error.lineno - 1) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
        raise source.error(f"is no usable JSON: {error}", line) from error


def _parse_file(path: Path, source: Source) -> Any:
    inside = replace(source, path=path)
    return _parse(inside.text(), inside)


def _read_json(source: Source) -> Iterator[str]:
    data = _parse(source.text(), source)
    if not isinstance(data, list):
        raise source.error("must hold a list of prompts, or of objects with a prompt each")
    return _values(enumerate(data, 1), source, "item")


def _read_jsonl(source: Source) -> Iterator[str]:
    lines = enumerate(source.text().split("\n"), 1)  # other line breaks may stand inside of JSON text
    return _values(((number, _parse(line, source, number)) for number, line in lines if line.strip()), source, "line")


def _values(items: Iterable[tuple[int, Any]], source: Source, unit: str) -> Iterator[str]:
    """Prompts of numbered items: texts, or objects that hold one in the column of prompts."""
    column = None
    for number, item in items:
        if isinstance(item, Mapping):
            if column is None:
                column = source.choose(list(item), number)
            if column not in item:
                raise source.error(f"has no {column!r}", number, unit)
            item = item[column]
        yield source.clean(item, number, unit)


def _read_arrow(source: Source) -> Iterator[str]:
    """A Parquet or Arrow file's column of prompts; other columns, which may hold images, are not read from Parquet."""
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise source.error("needs the package pyarrow: pip install pyarrow (or save the table as .csv)") from error
    try:
        if source.path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(source.path) as file:
                values = file.read([source.choose(file.schema_arrow.names)])
        else:
            with arrow.memory_map(str(source.path)) as file:
                magic = file.read(6) == b"ARROW1"
                file.seek(0)
                table = (ipc.open_file if magic else ipc.open_stream)(file).read_all()
                values = table.select([source.choose(table.column_names)])
        found = values.column(0).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise source.error(f"is damaged, or no {source.path.suffix[1:]} file: {error}") from error
    return (source.clean(value, number, "row") for number, value in enumerate(found, 1))


_READERS: dict[str, Callable[[Source], Iterator[str]]] = {
    ".parquet": _read_arrow, ".arrow": _read_arrow, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json,
    ".csv": _read_csv, ".tsv": _read_csv,
}  # fmt: skip
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def _read_folder(source: Source, setting: str) -> list[str]:
    """A dataset that `datasets` saved or that a hub serves (its training split), or images with captions."""
    root = source.path
    files = _saved_dataset(source)
    if not files and not _has_images(root.iterdir()):
        files = _shards(root) or _shards(root / "data") or _shards(root / "train")
    if files:
        return [prompt for path in files for prompt in _read(replace(source, path=path))]
    if not _has_images(root.rglob("*")):
        raise source.error(f"this folder holds neither a table nor images; prompts are {FORMS}")
    return [photo.caption for photo in find_photos(str(root), setting, source.column)]


def _has_images(paths: Iterable[Path]) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in paths)


def _saved_dataset(source: Source) -> list[Path]:
    """The Arrow files of a folder by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; empty if it is none."""
    folder = source.path
    if (folder / "dataset_dict.json").is_file():
        listed = _parse_file(folder / "dataset_dict.json", source)
        splits = listed.get("splits") if isinstance(listed, dict) else None
        splits = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if "train" not in splits and len(splits) != 1:
            raise source.error(f"its splits are {', '.join(splits) or 'none'}; name the folder of one")
        folder = folder / ("train" if "train" in splits else splits[0])
    if not (folder / "state.json").is_file():
        return []
    state = _parse_file(folder / "state.json", source)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") for entry in entries or () if isinstance(entry, dict)]
    files = [folder / name for name in names if isinstance(name, str)]
    absent = [path.name for path in files if not path.is_file()]
    if absent or not files:
        raise source.error(f"the saved dataset lacks its data ({', '.join(absent) or 'state.json names no files'})")
    if state.get("_indices_data_files"):
        raise source.error("the saved dataset is a selection of rows; save it again after flatten_indices()")
    return files


def _shards(folder: Path) -> list[Path]:
    """A folder's tables of one kind, by name: those of the training split where the names tell splits apart."""
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for kind in _READERS:
        files = [path for path in paths if path.suffix.lower() == kind and path.name.lower() not in _NO_DATA]
        train = [path for path in files if _SPLIT.match(path.name) and path.name.lower().startswith("train")]
        if files:
            return train or files
    return []
