"""Tables of "module:function" entries, imported when chosen, and functions of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from srpo_core.config import ConfigError, nearest
from srpo_core.errors import with_place


def resolve(table: Mapping[str, str], kind: str, name: str) -> Callable[..., Any]:
    """The function that `name` stands for: an entry of `table`, or "module:function" or "file.py:function".

    `kind` ("reward") is for messages. ConfigError if there is no such name, module or function, or its code fails.
    """
    if name not in table and ":" not in name:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, list(table))}; your own is file.py:function")
    module_name, _, function_name = table.get(name, name).rpartition(":")
    try:
        module = _from_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError, ValueError, SyntaxError) as error:  # ValueError: an empty module name
        raise ConfigError(f"{kind} {name!r} can't be imported: {error}") from error
    except Exception as error:  # a user's own code has them all
        raise ConfigError(f"{kind} {name!r} can't be imported: {with_place(error)}") from error
    if not callable(function := getattr(module, function_name, None)):
        raise ConfigError(f"{kind} {name!r}: {module_name} has no {function_name!r}")
    return function


def _from_file(name: str) -> ModuleType:
    """The module in a file, run once in a process. OSError if it can't be read; what its own code raises."""
    path = Path(name).expanduser().resolve()
    key = f"{path.stem} of {path.parent}"  # no name that an import statement could mean
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = sys.modules[key] = importlib.util.module_from_spec(spec)  # where dataclasses look for their own
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]
