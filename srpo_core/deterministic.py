"""The same bits in every run on one kind of GPU, where kernels would add up numbers in whatever order they come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from srpo_core.errors import TrainingError

WORKSPACE = ":4096:8"
"""CUBLAS_WORKSPACE_CONFIG with which products of matrices are the same each time, says PyTorch's page on randomness."""


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the context, if it is wanted, PyTorch only takes kernels that give the same bits each time.

    TrainingError for a computation that has none. To be entered before the GPU's first product of matrices.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with _steady_compiler():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
        try:
            yield
        except RuntimeError as error:
            if "deterministic implementation" not in str(error) or isinstance(error, TrainingError):
                raise
            raise TrainingError(
                f"parallel.deterministic=true: {str(error).splitlines()[0]} Set parallel.deterministic=false"
            ) from error
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def _steady_compiler() -> Iterator[None]:
    """Inside the context compiled code isn't chosen by time measured, as far as that changes its numbers."""
    import torch._inductor.config as settings  # importing it takes seconds

    if not hasattr(settings, "deterministic"):
        yield
        return
    with settings.patch(deterministic=True):
        yield
