"""Everything that knows which processes and devices a run has."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from srpo_core.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class World:
    """This process's place among `size` of them, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the terminal."""
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_device(name: str) -> torch.device:
    """The device that `parallel.device` names; auto is the first of cuda, mps and cpu that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"parallel.device={name!r} can't be used here ({reason}); auto picks what is there"
        ) from error
    return device


def make_world(config: ParallelConfig) -> World:
    """The world of a single process. ConfigError if it was started as one of several, or without its device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ConfigError(f"WORLD_SIZE={size}: training with several processes is not there yet; start a single one")
    return World(rank=0, size=1, device=choose_device(config.device))
