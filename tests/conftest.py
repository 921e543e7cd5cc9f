"""Tests run on one thread: the toys are too small for more, and sums then come out the same in every process."""

from __future__ import annotations

import torch

import srpo_core  # noqa: F401 (mends a torchvision built for another torch, before tests import what needs it)

torch.set_num_threads(1)
