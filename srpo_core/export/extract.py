"""A LoRA out of two whole transformers: the best change of a given rank from one to the other, layer by layer.

For a difference D = U S V^T the nearest matrix of rank r is the sum of its r largest singular triplets (Eckart and
Young). They are found by subspace iteration with a few directions more than asked for (Halko, Martinsson and Tropp,
2011, algorithm 4.4), repeated until what they hold of D stops growing; small matrices are decomposed whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.models.flux import FluxFlow
from srpo_core.models.flux_files import Part
from srpo_core.weights.flux_names import rename
from srpo_core.weights.fp8 import dequantised, weights_in
from srpo_core.weights.lora_names import Lora, LoraLayer

WHOLE = 512
"""Matrices with a side of at most this are decomposed whole."""
GROWTH = 1e-5
"""Iteration ends when what is held of D's energy grows by less than this part of what is missed."""
ROUNDING = 1e-7
"""The same as a part of D's whole energy: less is float32's own error."""
ITERATIONS = 50


@dataclass
class Errors:
    """Squared sizes of the differences and of what the LoRA misses of them, by group of layers."""

    change: dict[str, float] = field(default_factory=dict)
    missed: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, float] = field(default_factory=dict)
    """Relative size of the differences of tensors that are no matrices (biases, norms), which no LoRA can hold."""

    def add(self, group: str, change: float, missed: float) -> None:
        self.change[group] = self.change.get(group, 0.0) + change
        self.missed[group] = self.missed.get(group, 0.0) + missed

    def relative(self) -> dict[str, float]:
        """|difference - LoRA| / |difference| of each group and of all matrices ("total"); 0 where nothing differs."""
        sums = {group: (self.missed[group], self.change[group]) for group in sorted(self.change)}
        sums["total"] = (sum(self.missed.values()), sum(self.change.values()))
        return {group: math.sqrt(missed / change) if change else 0.0 for group, (missed, change) in sums.items()}

    def record(self) -> dict[str, dict[str, float]]:
        """For the file's metadata."""
        return {"relative_error": self.relative(), "left_out": self.beyond}


class Reader:
    """A transformer's tensors by diffusers' names, read when asked for."""

    def __init__(self, part: Part) -> None:
        self._view = part.file.prefix(part.contents.prefix)
        self._original = part.contents.layout == "original"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, str] = {}
        outline = self._view.outline()
        for stored in weights_in(self._view):
            for name, tensor in self._renamed(iter([(stored, outline.read(stored))])):
                self.shapes[name], self._stored[name] = tuple(tensor.shape), stored
        self._values = set(self._stored.values())
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised. A stacked one is kept until another is asked for."""
        stored = self._stored[name]
        if self._last[0] != stored:
            beside = f"{stored.rpartition('.')[0]}."
            aside = [other for other in self._view.info if other.startswith(beside) and other not in self._values]
            self._last = "", {}  # frees it before the next is read
            self._last = stored, dict(self._renamed(dequantised(self._view.only([stored, *aside]))))
        return self._last[1][name]

    def _renamed(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return rename(stream) if self._original else stream


@torch.no_grad()
def extract(
    tuned: Part,
    base: Part,
    rank: int,
    device: torch.device | str = "cpu",
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Lora, Errors]:
    """The LoRA of at most `rank` whose merge into `base` comes nearest to `tuned`, in `dtype`, and what it misses.

    One layer of both is in memory at a time. Layers that are alike get none. ConfigError if the two are not of the same
    shapes, or are the same.
    """
    new, old = Reader(tuned), Reader(base)
    _check_alike(tuned, base, new.shapes, old.shapes)
    layers: dict[str, LoraLayer] = {}
    errors = Errors()
    for done, (name, shape) in enumerate(new.shapes.items(), 1):
        difference = new.read(name).to(device).float() - old.read(name).to(device).float()
        size = float(difference.double().square().sum())
        if not math.isfinite(size):
            raise ConfigError(f"{name} of {tuned.file.path} or {base.file.path} holds infinite numbers or NaN")
        if len(shape) == 2 and name.endswith(".weight"):
            if size:
                up, down = (side.to(dtype) for side in low_rank(difference, rank))
                missed = difference - up.float() @ down.float()
                errors.add(_group(name), size, float(missed.double().square().sum()))
                layers[name.removesuffix(".weight")] = LoraLayer(down.cpu(), up.cpu(), float(len(down)))
        elif size:
            errors.beyond[name] = math.sqrt(size / max(float(old.read(name).double().square().sum()), 1e-300))
        on_layer(done, len(new.shapes))
    if not layers:
        raise ConfigError(f"{tuned.file.path} and {base.file.path} have the same matrices: there is nothing to extract")
    return Lora(layers, "the extracted LoRA"), errors


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [out, r], down [r, in]) with the nearest matrix of rank r = min(rank, out, in) as their product.

    Both hold a square root of the singular values, so neither is large where the other is small.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= WHOLE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _leading(matrix, rank)
    roots = values[:rank].clamp(min=0).sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least `rank` leading singular triplets of a large matrix; all of them if the iteration does not settle."""
    width = rank + max(8, rank // 4)
    if 4 * width > min(matrix.shape):
        return torch.linalg.svd(matrix, full_matrices=False)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    total, held = float(matrix.double().square().sum()), 0.0
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        now = float(values[:rank].double().square().sum()) / total
        if now - held < max(GROWTH * (1 - now), ROUNDING):
            return basis @ inner, values, right
        held = now
    return torch.linalg.svd(matrix, full_matrices=False)


def _check_alike(tuned: Part, base: Part, new: dict[str, tuple[int, ...]], old: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(new.keys() ^ old.keys()):
        has, lacks = (tuned, base) if name in new else (base, tuned)
        raise ConfigError(
            f"{tuned.file.path} and {base.file.path} are different models: {has.file.path} has {name},"
            f" {lacks.file.path} has not"
        )
    for name, shape in new.items():
        if shape != old[name]:
            raise ConfigError(
                f"{tuned.file.path} and {base.file.path} are different models: {name} is {list(shape)} in the one and"
                f" {list(old[name])} in the other"
            )


def _group(name: str) -> str:
    """Attention, mlp or the others, as lora.targets groups layers."""
    inside = "." in name.removesuffix(".weight")  # the last layer is called proj_out, as one in single blocks is
    for group in ("attention", "mlp"):
        ends = tuple(f".{target}.weight" for target in FluxFlow.lora_targets[group])
        if inside and name.endswith(ends):
            return group
    return "others"
