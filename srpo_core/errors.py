"""Errors of a run under way; wrong settings are `srpo_core.config.ConfigError`."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run can't go on. The message says what happened, at which step and in which phase, and what to try."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite."""
