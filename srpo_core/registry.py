"""Tables of "module:function" entries, imported when chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from srpo_core.config import ConfigError, nearest


def resolve(table: Mapping[str, str], kind: str, name: str) -> Callable[..., Any]:
    """The function that `name` stands for: an entry of `table`, or itself a "module:function" of the user's own.

    `kind` ("reward") is for messages. ConfigError if there is no such name, module or function.
    """
    if name not in table and ":" not in name:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, list(table))}; your own is written module:function")
    target = table.get(name, name)
    module_name, _, function_name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty module name
        raise ConfigError(f"{kind} {name!r} can't be imported: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"{kind} {name!r}: {module_name} has no {function_name!r}") from error
    return function
