"""Processes by what tells one from all others: numbers are given out again, and clocks are set."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

_PROC = Path("/proc")


def birth(pid: int | None = None) -> str:
    """When a process (default: this one) began, as text that stays the same however someone sets the clock.

    On Linux: which start of the machine, and how many ticks after it; elsewhere the time that the system noted then.
    psutil.NoSuchProcess if there is no such process.
    """
    process = psutil.Process(pid)
    try:
        after_name = (_PROC / str(process.pid) / "stat").read_bytes().rpartition(b")")[2]  # names may hold spaces
        return f"{_boot()}{int(after_name.split()[19])}"  # proc(5): starttime
    except (OSError, ValueError, IndexError):
        return f"{process.create_time():.2f}"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip() + "/"
    return ""


def is_running(pid: int, born: str) -> bool:
    """Whether the process of this pid that was born then is running."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and birth(pid) == born
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # or a number that is no pid
        return False


def lineage() -> set[int]:
    """The pids of this process and of those it comes from; on Windows a virtual environment's Python is two of them."""
    pids = {os.getpid(), os.getppid()}
    with contextlib.suppress(psutil.Error):
        pids |= {process.pid for process in psutil.Process().parents()}
    return pids
