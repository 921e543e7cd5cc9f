"""Tests run on one thread: the toys are too small for more, and sums then come out the same in every process.

Their trainings hold locks of their own, so that one that someone else runs on this machine is no hindrance; each of
several processes that share the tests (pytest-xdist) has its own too.
"""

from __future__ import annotations

import gc
import os
import tempfile

import torch

import srpo_core  # noqa: F401 (mends a torchvision built for another torch, before tests import what needs it)

torch.set_num_threads(1)
LOCKS = tempfile.TemporaryDirectory(prefix="srpo-locks-")
os.environ.setdefault("SRPO_LOCKS", LOCKS.name)


def pytest_configure(config: object) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, which has its parent's environment
        os.environ["SRPO_LOCKS"] = LOCKS.name


def pytest_collection_finish() -> None:
    keep_imports()


def keep_imports() -> None:
    """What imports have made stays to the end: a run collects garbage more than once, and needn't look there."""
    gc.collect()
    gc.freeze()
