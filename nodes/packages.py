"""Python packages that are missing or too old, told in ComfyUI's log at its start and by the node that needs one."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

if TYPE_CHECKING:
    from srpo_core.doctor import Part

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def advice() -> str:
    """How to get them, for the Python that runs ComfyUI."""
    return f'Install what SRPO needs: "{sys.executable}" -m pip install -r "{REQUIREMENTS}", then start ComfyUI again'


def _required() -> list[Part]:
    """What this pack needs, as far as it is here. Nothing is imported to try."""
    from srpo_core.doctor import examine_part, requirements

    return [examine_part(text, True, {}) for text, required in requirements() if required]


def tell_missing() -> None:
    """One warning about all that is missing or too old; nodes that need none of it work."""
    problems = [f"{part.name}: {part.problem}" for part in _required() if part.problem is not None]
    if problems:
        logging.warning("SRPO: some nodes won't run. %s. %s", "; ".join(problems), advice())


def check() -> None:
    """ConfigError if a package is missing: a process of its own would find that out much later."""
    from srpo_core.config import ConfigError

    missing = [part.name for part in _required() if part.installed is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}. {advice()}")


def with_advice(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, which tells of a package that it can't import and how to get it."""
    execute = node.execute.__func__

    @functools.wraps(execute)
    def explained(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> io.NodeOutput:
        try:
            return execute(cls, *inputs, **named)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package in ("", "srpo_core"):
                raise
            from srpo_core.config import ConfigError

            raise ConfigError(f"the package {package} is not installed. {advice()}") from error

    node.execute = classmethod(explained)
    return node
