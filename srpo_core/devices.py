"""Which device a process computes on, and its place among those that a launcher started."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from srpo_core.config import ConfigError, ParallelConfig, RunConfig
from srpo_core.description import make_config
from srpo_core.parallel import World


def choose_device(name: str, setting: str = "parallel.device") -> torch.device:
    """The device that a setting names; auto is the first of cuda, mps and cpu that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}={name!r} can't be used here ({reason}); auto picks what is there") from error
    return device


def make_world(config: ParallelConfig, setting: str = "parallel.device") -> World:
    """The world of a single process, its device chosen by `setting`.

    ConfigError if it was started as one of several, or without its device.
    """
    size = _from_launcher("WORLD_SIZE", 1)
    if size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size}: only `srpo train`, `sample` and `encode` share their work among processes; start this"
            " command as a single one, without torchrun"
        )
    return World(rank=0, size=1, device=choose_device(config.device, setting))


def divided_world(config: ParallelConfig) -> World:
    """This process's place in work that divides, by torchrun's RANK, WORLD_SIZE and LOCAL_RANK; not yet `joined`.

    Each process takes the GPU of its LOCAL_RANK. ConfigError if there is none for it, or if the launcher's numbers or
    parallel.device don't fit.
    """
    size, rank = _from_launcher("WORLD_SIZE", 1), _from_launcher("RANK", 0)
    if size < 1 or not 0 <= rank < size:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={size}: a rank lies in 0 ... WORLD_SIZE - 1; torchrun sets both")
    if size > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
        return World(rank, size, _own_gpu(_from_launcher("LOCAL_RANK", rank)))
    device = choose_device(config.device)
    if size > 1 and device.index is not None:
        raise ConfigError(
            f"parallel.device={config.device!r} with {size} processes: write cuda, and each takes its own"
        )
    return World(rank, size, device)


def training_world(config: ParallelConfig) -> World:
    """`divided_world` for a run, whose processes may hold parts of a model or of a picture. ConfigError as there."""
    world = divided_world(config)
    if world.size % config.context:
        raise ConfigError(
            f"parallel.context={config.context} with {world.size} processes: groups of {config.context} need a multiple"
            f" of {config.context}"
        )
    one_model = config.strategy != "replicate" or config.context > 1
    return replace(world, context=config.context, keeps_step=world.size > 1 and one_model)


def as_launched(config: RunConfig) -> RunConfig:
    """The run with the processes and machines that a launcher has started, if this process is one of several.

    ConfigError if the launcher's numbers make no sense.
    """
    size = _from_launcher("WORLD_SIZE", 1)
    if size <= 1:
        return config
    local, rank = _from_launcher("LOCAL_WORLD_SIZE", size), _from_launcher("RANK", 0)
    if not 1 <= local <= size:
        raise ConfigError(f"LOCAL_WORLD_SIZE={local}, WORLD_SIZE={size}: a machine has 1 to all of the processes")
    there = {"processes": local, "nodes": size // local, "node_rank": _from_launcher("GROUP_RANK", rank // local)}
    meeting = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    if size > local and not config.parallel.rendezvous and all(meeting):
        there["rendezvous"] = ":".join(meeting)
    return make_config({**config.model_dump(), "parallel": config.parallel.model_dump() | there})


def _own_gpu(local_rank: int) -> torch.device:
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this machine shows {there} GPUs; start at most one process for each"
            f" (--nproc-per-node={there})"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def process_name() -> str:
    """What messages call this process: "srpo", or one of several "srpo, rank 1 of 4"."""
    size = os.environ.get("WORLD_SIZE", "1")
    return f"srpo, rank {os.environ.get('RANK', '0')} of {size}" if size != "1" else "srpo"


def _from_launcher(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} in the environment is no whole number; torchrun sets it") from None
