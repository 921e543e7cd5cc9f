"""Tests run on one thread: the toys are too small for more, and sums then come out the same in every process.

Their trainings hold locks of their own, so that one that someone else runs on this machine is no hindrance.
"""

from __future__ import annotations

import os
import tempfile

import torch

import srpo_core  # noqa: F401 (mends a torchvision built for another torch, before tests import what needs it)

torch.set_num_threads(1)
LOCKS = tempfile.TemporaryDirectory(prefix="srpo-locks-")
os.environ.setdefault("SRPO_LOCKS", LOCKS.name)
