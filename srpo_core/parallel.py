"""Everything that knows which processes and devices a run has."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.last_words import is_lost, leave_together, tell_last, told_last, waits_no_more, watched
from srpo_core.stopping import StopRequested

Item = TypeVar("Item")
Error = TypeVar("Error", bound=BaseException)
PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, such as the first one while it writes a large checkpoint."""
FAREWELL = timedelta(minutes=1)
"""How long one that is done waits for the others to be."""
BUCKET = 2**25
"""Numbers that are averaged at once."""


class OthersError(TrainingError):
    """What ended another process of the run, and so this one too."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` of them, and its device."""

    rank: int
    size: int
    device: torch.device
    context: int = 1
    """Neighbours in rank that work on the same pictures, each on its part of the tokens."""
    keeps_step: bool = False
    """Whether a call of the model takes all processes, as where each holds a part of it."""

    @property
    def part(self) -> int:
        """Which of the run's pictures this process works on, of `parts`."""
        return self.rank // self.context

    @property
    def parts(self) -> int:
        """How many processes, or groups of them, have pictures of their own."""
        return self.size // self.context

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the terminal."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a list, in order: each parts-th item from `part` on. All parts make up the list."""
        return list(items[self.part :: self.parts])

    def in_order(self, parts: Sequence[Sequence[Item]]) -> list[Item]:
        """The list of which `parts` are every process's share, by rank."""
        parts = parts[:: self.context]
        return [parts[i % self.parts][i // self.parts] for i in range(sum(map(len, parts)))]

    def turns(self, count: int) -> int:
        """How many items of `count` the largest share has: how often all have to call a model that takes them all."""
        return math.ceil(count / self.parts)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Inside the context the processes that torchrun started can do what follows; one by itself can anyway.

        TrainingError if they don't find each other.
        """
        if self.size == 1:
            yield
            return
        if self.device.type == "mps":
            raise ConfigError(
                f"parallel.processes={self.size}: a Mac's GPU trains with one process; or set parallel.device=cpu"
            )
        nccl = self.device.type == "cuda" and dist.is_nccl_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TrainingError(
                f"the run's {self.size} processes didn't find each other at {where}: {error}; that address must be"
                " machine 0's, and no firewall between them"
            ) from error
        with watched(self.rank, self.size) if nccl else contextlib.nullcontext():
            yield
        leave_together(self.rank, self.size, FAREWELL)
        dist.destroy_process_group()  # not after an error: others may be gone, and this process ends too

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside the context each process works by itself; then all go on, or end with what ended one of them.

        One's StopRequested is raised in all; one's error is an OthersError elsewhere. What all know passes through
        outer contexts as it is: each process has then left the same exchange, so they agree on what comes next. One's
        end, which breaks its connections, is an OthersError wherever another one waited for it.
        """
        try:
            yield
        except StopRequested as stop:
            if self.size > 1 and not _is_known(stop):
                self._heed(self._round({"ended": ""}))
            raise
        except Exception as error:
            if self.size > 1 and not _is_known(error):
                if is_lost(error) or waits_no_more():  # what was broken off may look like any error
                    raise _lost(error) from error
                with contextlib.suppress(OthersError):  # one that is gone needs no telling
                    self._round({"ended": _words(error)})
                _make_known(error)
            raise
        self.exchange(None)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside the context the model is called, by all processes alike where that takes them all.

        There one's error leaves the others waiting inside the model: it can't be told as `together` does, and ends the
        run. What all know, as from an inner `together`, passes through.
        """
        if not self.keeps_step:
            yield
            return
        self.exchange(None)  # what has ended one is told before the others wait for it
        try:
            yield
        except Exception as error:
            if _is_known(error):
                raise
            if is_lost(error) or told_last() is not None:
                raise _ends_all(_lost(error)) from error
            tell_last(f"rank {self.rank} of {self.size}: {_words(error)}")
            _ends_all(error)
            raise

    def agreed(self, check: Callable[[], None]) -> Callable[[], None]:
        """`check`, which may raise; where processes keep step, it raises in all or none, and each has to call it."""
        if not self.keeps_step:
            return check

        def together() -> None:
            with self.together():
                check()

        return together

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, of JSON's types, by rank. Raises as `together` does if one can't go on."""
        if self.size == 1:
            return [value]
        told = self._round({"value": value})
        self._heed(told)
        return [one["value"] for one in told]

    def _heed(self, told: Sequence[dict[str, Any]]) -> None:
        ended = [(rank, one["ended"]) for rank, one in enumerate(told) if "ended" in one]
        if not ended:
            return
        failed = [f"rank {rank} of {self.size}: {words}" for rank, words in ended if words]
        raise _make_known(OthersError("; ".join(failed)) if failed else StopRequested())

    def _round(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's message, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        with _others_answer():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(text)]))
            longest = int(max(lengths))
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(one[: int(length)].tolist())) for one, length in zip(texts, lengths, strict=True)]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors, of the same shapes and type on every process, their mean over processes."""
        buckets = [(bucket, sum(map(Tensor.numel, bucket))) for bucket in _buckets(tensors)] if self.size > 1 else []
        with self.together():  # one that has no room for this ends all, instead of having them wait for it
            room = tensors[0].new_empty(max(count for _, count in buckets)) if buckets else None
        for bucket, count in buckets:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket], out=room[:count])
            with _others_answer():
                dist.all_reduce(flat)
            flat /= self.size
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def as_main(self, tensor: Tensor) -> Tensor:
        """The main process's tensor, into everyone's."""
        if self.size > 1:
            with _others_answer():
                dist.broadcast(tensor, 0)
        return tensor

    def collect(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The main process gets all of a list that was shared out, others keep their `parts`.

        It holds float32 tensors on the CPU, of the `shapes` that the main process knows.
        """
        with _others_answer():
            if not self.is_main:
                for part in parts if self.rank % self.context == 0 else ():
                    dist.send(part.contiguous(), 0)
                return list(parts)
            mine = iter(parts)
            whole = [torch.empty(*shape) if i % self.parts else next(mine) for i, shape in enumerate(shapes)]
            for i, tensor in enumerate(whole):
                if i % self.parts:
                    dist.recv(tensor, i % self.parts * self.context)
        return whole

    def check_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """TrainingError if tensors aren't the same on every process; their bits are summed up for that."""
        if self.size > 1:
            whole = {2: torch.int16, 4: torch.int32}
            bits = [tensor.detach().view(whole[tensor.element_size()]) for tensor in tensors.values()]
            sums = torch.stack([one.sum(dtype=torch.int64) for one in bits])
            told = self.exchange([int(one) for one in sums])
            differ = [name for name, *each in zip(tensors, *told, strict=True) if len(set(each)) > 1]
            if differ:
                raise TrainingError(
                    f"{what} are not the same on the run's processes ({len(differ)} tensors, such as {differ[0]});"
                    " do all machines have the same files and versions?"
                )

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


@contextlib.contextmanager
def _others_answer() -> Iterator[None]:
    """Inside the context others are waited for; OthersError if they don't answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and told_last() is None:  # else the group is gone, as waiting was broken off
            raise
        raise _lost(error) from error


def _lost(error: Exception) -> OthersError:
    """What another process that no longer answers said last, or in words that it doesn't."""
    first, _, _ = str(error).partition("\n")
    gone = (
        "another process of this run is gone (killed, or out of the host's memory) or hangs; train.log shows what each"
        f" one said last ({first})"
    )
    return _make_known(OthersError(told_last() or gone))


def ends_all(error: BaseException) -> bool:
    """Whether processes that keep step lost it by an error, so that the run can't survive it."""
    return getattr(error, "ends_all", False)


def _ends_all(error: Error) -> Error:
    error.ends_all = True
    return _make_known(error)


def _is_known(error: BaseException | None) -> bool:
    """Whether an error, or what it is about, was told to all processes."""
    while error is not None:
        if getattr(error, "known_to_all", False):
            return True
        error = error.__cause__
    return False


def _make_known(error: Error) -> Error:
    error.known_to_all = True
    return error


def _words(error: Exception) -> str:
    """What others are told of an error."""
    return str(error) if isinstance(error, ConfigError | TrainingError) else f"{type(error).__name__}: {error}"


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of together at most BUCKET numbers, or single larger ones."""
    bucket: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if bucket and count + tensor.numel() > BUCKET:
            yield bucket
            bucket, count = [], 0
        bucket.append(tensor)
        count += tensor.numel()
    if bucket:
        yield bucket
