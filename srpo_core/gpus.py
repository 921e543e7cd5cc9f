"""Which GPUs this machine has, and which of them a run takes: none that another run works on, unless told to."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from srpo_core.config import ConfigError, ParallelConfig, RunConfig
from srpo_core.device_locks import CPU, SHARE, Holder, holder

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine; `number` is nvidia-smi's, `key` names it for good, memory is in bytes where known."""

    number: int
    key: str
    name: str
    free: int | None = None
    total: int | None = None


def list_gpus() -> list[Gpu]:
    """The machine's GPUs by nvidia-smi, so that this process takes none of their memory; [] where there are none."""
    fields = "index,uuid,name,memory.free,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(told.stdout) if told.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's lines `index, uuid, name, free MiB, total MiB`; others are left out."""
    rows = [[part.strip() for part in row] for row in csv.reader(text.splitlines(), skipinitialspace=True)]
    return [Gpu(int(r[0]), r[1], r[2], _bytes(r[3]), _bytes(r[4])) for r in rows if len(r) == 5 and r[0].isdigit()]


def _bytes(mib: str) -> int | None:
    return int(mib) * MIB if mib.isdigit() else None


def visible(gpus: Sequence[Gpu], names: str | None) -> list[Gpu] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES=`names` leaves, in its order; None where it names what isn't in the list."""
    if names is None:
        return list(gpus)
    found: list[Gpu] = []
    for name in (part.strip() for part in names.split(",")):
        if name.startswith("MIG"):
            return None
        fits = [
            gpu for gpu in gpus if name == str(gpu.number) or (name.startswith("GPU-") and gpu.key.startswith(name))
        ]
        if len(fits) != 1:
            break  # as CUDA does: what comes behind a name that is none doesn't count
        found += fits
    return found


def choose(
    parallel: ParallelConfig, there: Sequence[Gpu], seen: Sequence[Gpu], held: Mapping[str, Holder]
) -> list[Gpu]:
    """The GPUs for a run's processes on this machine, one each, by number.

    `there` are the machine's, `seen` those that this program may use, `held` who works on which (by key). ConfigError
    if there are too few, or if one that parallel.gpus names isn't there or is taken.
    """
    taken = {} if parallel.share_gpu else held
    index = re.fullmatch(r"cuda:(\d+)", parallel.device)
    if index and parallel.gpus == "auto":
        chosen = list(seen[int(index[1]) : int(index[1]) + 1])  # of one that isn't there, make_world says so
    elif index:
        raise ConfigError(
            f"parallel.device={parallel.device!r} and parallel.gpus={parallel.gpus!r} both choose a GPU; leave one at"
            " auto"
        )
    elif parallel.gpus != "auto":
        chosen = _named(parallel, there)
    else:
        order = sorted(seen, key=lambda gpu: (gpu.key in held, -(gpu.free or 0), gpu.number))
        chosen = [gpu for gpu in order if gpu.key not in taken][: parallel.processes]
        if len(chosen) < parallel.processes:
            raise _too_few(parallel, seen, taken)
    busy = [f"GPU {gpu.number} ({gpu.name}): {taken[gpu.key]}; " for gpu in chosen if gpu.key in taken]
    if busy:
        way_out = f"wait for it, stop it (srpo stop RUN), name another GPU, {SHARE}"
        raise ConfigError(f"parallel.gpus={parallel.gpus!r}: {''.join(busy)}{way_out}")
    return sorted(chosen, key=lambda gpu: gpu.number)


def _named(parallel: ParallelConfig, there: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that parallel.gpus names."""
    words = [word.strip() for word in parallel.gpus.split(",")]
    by_number = {str(gpu.number): gpu for gpu in there}
    if any(word not in by_number for word in words) or len(set(words)) != len(words):
        known = ", ".join(f"{gpu.number} ({gpu.name})" for gpu in there)
        raise ConfigError(
            f"parallel.gpus={parallel.gpus!r}: write auto or numbers such as 0,1; this machine has {known}"
        )
    if len(words) != parallel.processes:
        raise ConfigError(
            f"parallel.gpus={parallel.gpus!r} names {len(words)} GPUs for parallel.processes={parallel.processes}: each"
            " process takes one"
        )
    return [by_number[word] for word in words]


def _too_few(parallel: ParallelConfig, seen: Sequence[Gpu], taken: Mapping[str, Holder]) -> ConfigError:
    free = sum(gpu.key not in taken for gpu in seen)
    lines = [f"\n  GPU {gpu.number} ({gpu.name}): {taken[gpu.key]}" for gpu in seen if gpu.key in taken]
    way_out = f"wait for it, stop it (srpo stop RUN), {SHARE}" if lines else f"set parallel.processes={max(1, free)}"
    return ConfigError(
        f"parallel.processes={parallel.processes}: {free} of {len(seen)} GPUs here {'is' if free == 1 else 'are'} free;"
        f" {way_out}{''.join(lines)}"
    )


def find(parallel: ParallelConfig) -> list[Gpu]:
    """The GPUs that a run would take on this machine: see choose. [] where it takes none, or which isn't known here."""
    if parallel.device.split(":")[0] not in ("auto", "cuda"):
        return []
    named = parallel.gpus != "auto"
    if not torch.version.cuda and not torch.version.hip:
        if named:
            raise ConfigError(f"parallel.gpus={parallel.gpus!r}: this PyTorch ({torch.__version__}) has no GPU support")
        return []
    there = list_gpus() or (_by_number(parallel.gpus) if named else [])
    seen = visible(there, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not named and not seen:  # none there, or none that nvidia-smi knows
        return []
    held = {gpu.key: one for gpu in there if (one := holder(gpu.key)) is not None}
    return choose(parallel, there, seen or [], held)


def _by_number(names: str) -> list[Gpu]:
    """GPUs where there is no nvidia-smi, known by their numbers alone."""
    return [Gpu(int(word), word.strip(), "GPU") for word in names.split(",") if word.strip().isdigit()]


def check_free(config: RunConfig) -> list[Gpu]:
    """The GPUs that a run in the background would take, [] for the CPU. ConfigError if another run works there."""
    gpus = find(config.parallel)
    key = shared_key(config.parallel, gpus)
    one = holder(key) if key is not None and not config.parallel.share_gpu else None
    if one is not None:
        raise ConfigError(
            f"the {str(key).upper()} is taken: {one}; two runs there slow each other down many times over; wait for it,"
            f" stop it (srpo stop RUN), {SHARE}"
        )
    return gpus


def shared_key(parallel: ParallelConfig, gpus: Sequence[Gpu]) -> str | None:
    """The key of the one device that a run without GPUs of its own takes: "cpu" or "mps"; None for others."""
    kind = parallel.device
    if kind == "auto" and not gpus and not torch.cuda.is_available():
        kind = "mps" if torch.backends.mps.is_available() else CPU
    return kind if kind in (CPU, "mps") else None


def environment(parallel: ParallelConfig, gpus: Sequence[Gpu]) -> dict[str, str]:
    """What makes a process see just these GPUs; {} where it sees no others, or where parallel.device has its number.

    Only names are certain: CUDA and nvidia-smi may count in another order.
    """
    seen = visible(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")) if gpus else []
    if not gpus or ":" in parallel.device or {gpu.key for gpu in seen or ()} == {gpu.key for gpu in gpus}:
        return {}
    names = ",".join(gpu.key for gpu in gpus)
    return {"CUDA_VISIBLE_DEVICES": names} | ({"HIP_VISIBLE_DEVICES": names} if torch.version.hip else {})
