"""What a SOURCE argument of a command means: a preset, a description or a run's folder; and commands to type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import DIGEST, load_run, preset_names


def run_folder(source: str) -> Path | None:
    """The run folder that a SOURCE argument names; None for a preset or a file."""
    return Path(source) if source not in preset_names() and Path(source).is_dir() else None


def run_source(source: str) -> str:
    """What load_run reads for a SOURCE argument: a run's folder stands for its run.json."""
    folder = run_folder(source)
    if folder is None:
        return source
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{source} is no run folder: it holds no run.json")
    return str(folder / "run.json")


def train_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `train SOURCE` means: a run's folder is also its output.dir, wherever it was moved or copied to."""
    if run_folder(source) is None:
        return load_run(source, overrides, os.environ.pop(DIGEST, None))
    from srpo_core.run_folder import load_folder

    return load_folder(source, overrides)


def typed(words: Sequence[str]) -> str:
    """A command for the user to type, quoted for this system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command_line(*words: str | Path) -> str:
    """A command for the user to type, started the way this process was."""
    started = Path(sys.argv[0])
    program = [sys.executable or "python", str(started)] if started.name == "__main__.py" else ["srpo"]
    return typed([*program, *map(str, words)])
