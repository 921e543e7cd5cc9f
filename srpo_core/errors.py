"""Errors of a run under way; wrong settings are `srpo_core.config.ConfigError`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator

from srpo_core.config import ConfigError


class TrainingError(RuntimeError):
    """A run can't go on. The message says what happened, at which step and in which phase, and what to try."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error is of a device or of the host that has no memory left."""
    import torch

    told = "out of memory" in str(error) or "can't allocate memory" in str(error)  # MPS and the CPU have no own class
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and told)


@contextlib.contextmanager
def enough_memory(phase: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Inside the context, running out of memory is a TrainingError that names the phase and what to try.

    An `advice` that takes work is a function, called when it is needed.
    """
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        told = advice if isinstance(advice, str) else advice()
        raise TrainingError(f"{phase}: out of memory; {told}" + (f". {lines[0]}" if lines else "")) from error


@contextlib.contextmanager
def blamed_on(part: str) -> Iterator[None]:
    """Inside the context, an unexpected error is a TrainingError that says whose it is and where it was raised."""
    try:
        yield
    except (TrainingError, ConfigError):
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise TrainingError(f"{part} failed: {with_place(error)}") from error


def with_place(error: Exception) -> str:
    """An unexpected error in words: its kind, its message, and the line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
