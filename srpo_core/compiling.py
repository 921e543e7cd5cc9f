"""Compiled blocks of a model (torch.compile), and what happens where the compiler gives up.

Blocks of one kind share their compiled code, so a model of many costs the compilation of one of each kind, for each
shape, with and without gradient. Code is kept on disk between runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo_core.config import RunConfig

CACHE = "~/.cache/srpo/compiled"
"""Where compiled code is kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""
VARIANTS, ALL_VARIANTS = 64, 1024
"""Shapes, kinds of gradient and kinds of layers that one kind of block, and all, may be compiled for."""
WARNING = (
    "compiling the transformer's blocks: the first step takes about a minute longer (what is compiled is kept for the"
    " next run)"
)


class Compiler:
    """Compiles blocks; `report` is told, once for each reason, what it could not compile."""

    def __init__(self, report: Callable[[str], None], one_shape: bool = True) -> None:
        """With `one_shape` each shape has code of its own, which is faster; else many shapes share some."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # seconds to import

        self.report, self.dynamic, self.backend = report, False if one_shape else None, "inductor"
        self._too_many, self._failure = FailOnRecompileLimitHit, TorchDynamoException
        self.stopped = False
        self._told: set[str] = set()
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
        settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, ALL_VARIANTS)
        # its key leaves out the attention kernel, which the code was traced with
        torch._functorch.config.enable_autograd_cache = False
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(CACHE).expanduser()))

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled; itself, each time the compiler can't do it."""
        compiled = torch.compile(function, fullgraph=True, dynamic=self.dynamic, backend=self.backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.stopped:
                return function(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except self._too_many:  # other shapes still have theirs
                self._tell("there are too many shapes to compile for: some steps run without compilation")
            except self._failure as error:  # while it compiles: nothing has been computed yet
                self.gives_up(error)
            return function(*args, **kwargs)

        return call

    def blocks(self, module: nn.Module, types: tuple[type[nn.Module], ...]) -> None:
        """Compile every block of these types in the module; hooks on a block stay outside."""
        for block in module.modules():
            if isinstance(block, types):
                block.forward = self.function(block.forward)

    def failed(self, error: BaseException) -> bool:
        """Whether an error says that something can't be compiled."""
        return isinstance(error, self._failure)

    def gives_up(self, error: BaseException) -> bool:
        """Whether an error is the compiler's: then nothing is compiled any more, and what led to it can be tried again.

        Backward passes are compiled when the first one runs, so theirs come out of it.
        """
        if self.stopped or not self.failed(error):
            return False
        self.stopped = True
        self._tell(f"model.compile=true can't be done here, the run goes on without: {reason_of(error)}")
        return True

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self.report(reason)


def compiles(config: RunConfig) -> bool:
    """Whether a run has its blocks compiled: the compiler can't take those that share a picture's tokens."""
    return config.model.compile and config.parallel.context == 1


def make_compiler(device: torch.device, report: Callable[[str], None], one_shape: bool = True) -> Compiler | None:
    """A compiler for a device; None, and a report, where torch.compile does not work at all."""
    try:
        if device.type not in ("cuda", "cpu"):
            raise RuntimeError(f"it works on NVIDIA GPUs and the CPU, not on {device.type}")
        compiler = Compiler(report, one_shape)
        torch.compile(_nothing)  # refuses versions of Python that it doesn't know
    except (RuntimeError, ImportError, AttributeError) as error:
        report(f"model.compile=true can't be done here, the run goes on without: {reason_of(error)}")
        return None
    return compiler


def _nothing() -> None:
    return None


def reason_of(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
