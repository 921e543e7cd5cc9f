"""Tests run on one thread: the toys are too small for more, and sums then come out the same in every process."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
