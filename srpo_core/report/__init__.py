"""One self-contained HTML page of a run, or of several: what changed, pictures, curves, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srpo_core.files import check_writable, write_atomic
from srpo_core.report.data import read_runs
from srpo_core.report.page import render


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one or more run folders; `out` is a file or a folder, by default the first run's. Its path.

    Works on a run that is unfinished or still being written. ConfigError for a folder that is no run.
    """
    runs = read_runs(folders)
    path = Path(out) if out is not None else runs[0].folder
    if path.is_dir():
        path /= "report.html"
    check_writable(path.parent, "--out")
    write_atomic(path, render(runs))
    return path
