"""Activations that are kept for the backward pass, and those that are computed again in it.

Where nothing is kept but the inputs of a block, its backward pass computes its activations anew: least memory, a third
more time. `Keeping` keeps those of as many blocks as fit what a GPU has free. The numbers are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")
MARGIN = 0.04
"""Share of a device that is left alone: the allocator holds more than what is in use."""
BESIDE = 2**29
"""Bytes for the rewards' own activations."""


class Memory(Protocol):
    """What a device's memory is asked for, in bytes."""

    def allocated(self) -> int:
        """In use by tensors."""
        ...

    def peak(self) -> int:
        """The most that was so far."""
        ...

    def room(self) -> int:
        """What tensors can take beside those that are there."""
        ...

    def spent(self, work: Callable[[], Result]) -> tuple[Result, int]:
        """What some work gives, and the bytes that it takes at its peak beside what is in use."""
        ...


_most: dict[int, int] = {}
"""By CUDA device: the most that was in use before its peak was reset."""


class CudaMemory:
    """A CUDA device's memory, as this process may use it."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return max(_most.get(self.device.index, 0), torch.cuda.max_memory_allocated(self.device))

    def spent(self, work: Callable[[], Result]) -> tuple[Result, int]:
        _most[self.device.index] = self.peak()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = self.allocated()
        result = work()
        return result, torch.cuda.max_memory_allocated(self.device) - before

    def reach(self) -> int:
        """What tensors may take in all; a cap on the process (set_per_process_memory_fraction) counts."""
        free, total = torch.cuda.mem_get_info(self.device)
        reach = free + torch.cuda.memory_reserved(self.device)
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):
            reach = min(reach, round(total * torch.cuda.get_per_process_memory_fraction(self.device)))
        return reach

    def room(self) -> int:
        """What they may take beside those that are there, less a margin."""
        return round((1 - MARGIN) * self.reach()) - self.allocated()


def memory_of(device: torch.device) -> Memory | None:
    """A device's memory; None where it isn't told what is free."""
    return CudaMemory(device) if device.type == "cuda" else None


def recompute_blocks(block: nn.Module, *args: Any) -> Any:
    """Keep a block's input only, or those of its pieces where it has some (`pieces_of`)."""
    return _one_by_one(lambda piece, *inputs: checkpoint(piece, *inputs, **OPTIONS), block, *args)


OPTIONS = {"use_reentrant": False, "preserve_rng_state": False}
"""Of torch's checkpoint: nothing here draws random numbers in a forward pass."""


def _one_by_one(run: Callable[..., Any], block: nn.Module, *args: Any) -> Any:
    pieces = pieces_of(block, args[1:])
    if pieces is None:
        return run(block, *args)
    hidden = args[0]
    for piece, more in pieces:
        hidden = run(piece, hidden, *more)
    return hidden


def pieces_of(block: nn.Module, more: Sequence[Any]) -> list[tuple[nn.Module, Sequence[Any]]] | None:
    """(layer, what it takes beside the hidden states) of a block that is but a chain of layers; None for others.

    Those of a decoder at a picture's full size are what a training step's memory peaks in.
    """
    if isinstance(block, nn.Sequential):
        return [(layer, ()) for layer in block]
    if type(block).__name__ == "UpDecoderBlock2D":
        return [*((layer, more) for layer in block.resnets), *((layer, ()) for layer in block.upsamplers or ())]
    return None


class Keeping:
    """Decides, as each forward pass with gradient begins, which blocks of a model keep their activations.

    What they take is learned in the first pass, which recomputes everything. The decoder is kept first, as it costs
    least for the time it saves, then the model's last blocks: the backward pass is done with them before most gradients
    are there. What the decoder and the rewards take at their peak is left free.

    Where processes trade tokens inside a block, one that recomputes it waits for the others to do so too: `common`
    makes of each one's first block that fits the one that all keep from. `aside` tells how many bytes of the room a
    backward pass will take that gives none of it back: for tensors of another stream, which can't have the memory that
    activations leave.
    """

    def __init__(
        self,
        memory: Memory,
        blocks: Sequence[nn.Module],
        common: Callable[[int], int] = lambda first: first,
        aside: Callable[[], int] = lambda: 0,
    ) -> None:
        self.memory, self._common, self._aside = memory, common, aside
        self.index = {block: i for i, block in enumerate(blocks)}
        self.first_kept = len(blocks)
        """The blocks from this one on are kept."""
        self.decoder_kept = False
        self._least: dict[nn.Module, int] = {}
        self._most: dict[nn.Module, int] = {}
        self._decoder: dict[nn.Module, None] = {}
        self._size = self._learned_size = 0
        self._before_decoder = self._decoding = 0
        self._beyond: int | None = None
        """What a pass takes beyond what was in use as its decoder began, with everything recomputed."""
        self._compiled: bool | None = None

    def begin(self, compiled: bool) -> None:
        """A step begins, with blocks that are compiled or not: of the others nothing that was learned is true."""
        if compiled != self._compiled:
            self._compiled, self._beyond, self._decoding = compiled, None, 0
            self._least.clear()
            self._most.clear()

    def block(self, block: nn.Module, *args: Any) -> Any:
        """Run a block of the model."""
        place = self.index.get(block)
        if place == 0:
            self._size = args[0].numel()
            self._decide()
            self.first_kept = self._common(self.first_kept)
        if place is not None and place >= self.first_kept:
            return block(*args)
        out = checkpoint(self._measured, block, *args, **OPTIONS)
        self._before_decoder = self.memory.allocated()
        return out

    def decoder_block(self, block: nn.Module, *args: Any) -> Any:
        """Run a block of the decoder."""
        if not self._decoder or block is next(iter(self._decoder)):
            self._before_decoder = self.memory.allocated()
        self._decoder.setdefault(block)
        if self.decoder_kept:
            return block(*args)
        return _one_by_one(lambda piece, *inputs: checkpoint(self._measured, piece, *inputs, **OPTIONS), block, *args)

    def _measured(self, block: nn.Module, *args: Any) -> Any:
        """Run a block that is recomputed: what it leaves in use is its output the first time, its activations then."""
        before = self.memory.allocated()
        if self._beyond is None and block in self.index and block in self._least:  # the backward pass is there
            self._beyond, self._learned_size = self._learned_beyond(), self._size
        try:
            return block(*args)
        finally:  # checkpoint leaves by an error of its own, once it has all that it needs
            taken = self.memory.allocated() - before
            self._least[block] = min(taken, self._least.get(block, taken))
            self._most[block] = max(taken, self._most.get(block, taken))
            if block not in self.index:
                self._decoding = max(self._decoding, before + taken - self._before_decoder)

    def _learned_beyond(self) -> int:
        """By the peak so far; by the decoder's pieces, if that was reached in another phase, such as a rollout.

        Their gradients and the workspaces of convolutions take no more than their activations do.
        """
        peak = self.memory.peak() - self._before_decoder
        return min(peak, 2 * self._decoding + BESIDE) if self._decoding else peak

    def _decide(self) -> None:
        self.first_kept, self.decoder_kept = len(self.index), False
        if self._beyond is None:
            return
        scale = max(1.0, self._size / self._learned_size)
        room = (self.memory.room() - self._aside()) / scale - self._beyond
        room -= sum(self._least.get(block, 0) for block in self.index)
        of_decoder = sum(map(self._more, self._decoder_pieces()))
        self.decoder_kept = bool(self._decoder) and of_decoder <= room
        room -= of_decoder if self.decoder_kept else 0
        for block in reversed(self.index):
            room -= self._more(block)
            if room < 0:
                break
            self.first_kept = self.index[block]

    def _more(self, block: nn.Module) -> int:
        """What a block takes more if it is kept."""
        return self._most.get(block, 0) - self._least.get(block, 0)

    def _decoder_pieces(self) -> Iterator[nn.Module]:
        for block in self._decoder:
            pieces = pieces_of(block, ())
            yield from [block] if pieces is None else [piece for piece, _ in pieces]


def keep_what_fits(
    module: nn.Module,
    block_types: tuple[type[nn.Module], ...],
    decoder: nn.Module | None,
    memory: Memory,
    common: Callable[[int], int] = lambda first: first,
    aside: Callable[[], int] = lambda: 0,
) -> Keeping:
    """Have a model and an autoencoder of diffusers keep what fits; parts of other libraries stay as they are."""
    keeping = Keeping(memory, [part for part in module.modules() if isinstance(part, block_types)], common, aside)
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing(keeping.block)
    if hasattr(decoder, "enable_gradient_checkpointing"):
        decoder.enable_gradient_checkpointing(keeping.decoder_block)
    return keeping
