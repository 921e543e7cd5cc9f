"""SRPO Train's more_settings: lines such as optim.lr=1e-4, and errors that say which of them they are about."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from srpo_core.config import ConfigError
from srpo_core.description import place_override

from .training_models import Missing

OWN = ("output.dir", "output.result")
"""Settings that follow from the name."""
MOST_LETTERS = 80
"""Of a line that an error repeats."""


def place(data: dict[str, Any], text: str) -> None:
    """Put the lines into a run's settings. ConfigError for those that are none, or not to be set here."""
    for number, name, line in said(text):
        where = f"more_settings, line {number}"
        if name in OWN:
            raise ConfigError(f"{where}: {line!r}: this follows from `name`")
        if isinstance(data.get(name), dict):
            raise ConfigError(f"{where}: {line!r}: write a setting of {name}, such as optim.lr=1e-5")
        try:
            place_override(data, line)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def said(text: str) -> list[tuple[int, str, str]]:
    """(its number from 1, its setting, the line) of each line that sets something."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(i, line.partition("=")[0].strip(), line) for i, line in lines if line and not line.startswith("#")]


@contextlib.contextmanager
def blamed(text: str) -> Iterator[None]:
    """A ConfigError that leaves the context says which of the lines it is about."""
    try:
        yield
    except Missing:
        raise
    except ConfigError as error:
        raise ConfigError(with_lines(str(error), text)) from error


def with_lines(message: str, text: str) -> str:
    """An error, with the lines of more_settings that set what it speaks of."""
    lines = {name: f"more_settings, line {number}: {line[:MOST_LETTERS]}" for number, name, line in said(text)}

    def told(part: str) -> str:
        about = [line for name, line in lines.items() if _speaks_of(part, name) and "more_settings, line" not in part]
        return f"{part} ({'; '.join(about)})" if about else part

    return "\n".join(map(told, message.splitlines()))


def _speaks_of(part: str, name: str) -> bool:
    """Whether a line of an error names a setting: "optim.lr=...", or "align: range_start ..." of several together."""
    section, _, field = name.rpartition(".")
    whole = rf"(?<![\w.]){re.escape(name)}(?![\w.])"
    if not section:
        return re.search(f"{whole}=|unknown setting '{whole}'", part) is not None
    together = rf"(?<![\w.]){re.escape(section)}: .*\b{re.escape(field)}\b"
    return re.search(f"{whole}|{together}", part) is not None
