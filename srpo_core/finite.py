"""Whether a step's numbers are finite: found out where they are, and asked for once, so that nobody waits meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_core.errors import NotFiniteError


class FiniteChecks:
    """Tensors of a step that have to be finite, in the order in which they came up.

    `early`: what is on the CPU is checked as soon as it is added.
    """

    def __init__(self, early: bool = True) -> None:
        self._early = early
        self._flags: list[Tensor] = []
        self._names: list[str] = []

    def add(self, value: Tensor, what: str) -> None:
        """Have a tensor checked; it is called `what` in the error."""
        self._flags.append(torch.isfinite(value).all())
        self._names.append(what)
        if self._early and value.device.type == "cpu":
            self.require()

    def require(self) -> None:
        """NotFiniteError names the first of all so far that isn't finite. Waits for the device."""
        if not self._flags:
            return
        flags = torch.stack([flag.to(self._flags[0].device) for flag in self._flags]).tolist()
        if not all(flags):
            raise NotFiniteError(
                f"{self._names[flags.index(False)]} is not finite (NaN or infinite), so the run stops before the"
                " weights take it in; try a lower optim.lr, optim.warmup_steps, or model.dtype=float32"
            )
