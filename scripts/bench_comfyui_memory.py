"""What a program takes of the GPU's memory and of the machine's, and a GPU that seems smaller than it is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PERIOD = 0.05
"""Seconds between two looks at the memory."""
GIB = 2**30
BALLAST = """
import sys, torch
held, target = [], int(sys.argv[1])
torch.zeros(1, device="cuda")
while (excess := torch.cuda.mem_get_info()[0] - target) > 64 << 20:
    held.append(torch.empty(min(excess, 4 << 30), dtype=torch.uint8, device="cuda"))
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


class DeviceMemory:
    """What NVIDIA's driver says is taken of a GPU, by all programs; `used()` is None without one.

    The GPU is the first one, or the first that CUDA_VISIBLE_DEVICES has by number.
    """

    class _Info(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    def __init__(self) -> None:
        self.handle = None
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        self.index = int(first) if first.isdigit() else 0
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        handle = ctypes.c_void_p()
        if not self.library.nvmlInit_v2() and not self.library.nvmlDeviceGetHandleByIndex_v2(
            self.index, ctypes.byref(handle)
        ):
            self.handle = handle

    def used(self) -> float | None:
        """GiB."""
        if self.handle is None:
            return self._asked() if shutil.which("nvidia-smi") else None
        info = self._Info()
        self.library.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(info))
        return round(info.used / GIB, 2)

    def _asked(self) -> float:
        command = ["nvidia-smi", f"--id={self.index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return round(int(subprocess.check_output(command, text=True)) / 1024, 2)

    def by_process(self) -> dict[int, float]:
        """GiB of the GPU that each process takes, as far as nvidia-smi tells; {} without a GPU."""
        if self.handle is None and not shutil.which("nvidia-smi"):
            return {}
        fields = "--query-compute-apps=pid,used_memory"
        command = ["nvidia-smi", f"--id={self.index}", fields, "--format=csv,noheader,nounits"]
        told = subprocess.run(command, capture_output=True, text=True).stdout
        rows = re.findall(r"^\s*(\d+)\s*,\s*(\d+)\s*$", told, re.MULTILINE)
        return {int(pid): round(int(mib) / 1024, 2) for pid, mib in rows}


def process_memory(pid: int) -> float:
    """GiB of a process's own memory (files that it maps are not counted); 0 where the system doesn't tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)
    return round(sum(int(kib) for kib in found) / 2**20, 2)


def process_seconds(pid: int) -> float:
    """Seconds of processor time that a process has used; 0 where the system doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


class Watch:
    """Looks at the memory in a thread of its own and keeps the highest it saw."""

    def __init__(self, device: DeviceMemory, pid: int) -> None:
        self.device, self.pid = device, pid
        self.device_peak, self.host_peak = device.used(), process_memory(pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(PERIOD):
            if self.device_peak is not None:
                self.device_peak = max(self.device_peak, self.device.used() or 0.0)
            self.host_peak = max(self.host_peak, process_memory(self.pid))

    def stop(self) -> dict[str, float | None]:
        """The peaks, and what is taken now."""
        self._end.set()
        self._thread.join()
        row: dict[str, float | None] = {"server_peak_gib": self.host_peak}
        if self.device_peak is not None:
            row |= {"device_peak_gib": self.device_peak, "device_after_gib": self.device.used()}
        return row


@contextlib.contextmanager
def smaller_card(free_gib: float) -> Iterator[float]:
    """Another program holds the GPU's memory but for `free_gib`, as on a smaller card; yields what is free."""
    command = [sys.executable, "-c", BALLAST, str(int(free_gib * GIB))]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield round(int(holder.stdout.readline()) / GIB, 2)
    finally:
        holder.stdin.close()
        holder.wait()
