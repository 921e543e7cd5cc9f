"""A rollout's model calls recorded as CUDA graphs and played again: the host queues one thing instead of thousands.

A call of FLUX.1-dev starts about a thousand kernels. On a fast GPU they can take less time than a busy host takes to
queue them, and of several processes each waits for the slowest. What is played are the same kernels with the same
numbers: the results are the same to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srpo_core.compiling import reason_of
from srpo_core.config import RunConfig
from srpo_core.errors import ran_out_of_memory
from srpo_core.interfaces import FlowModel, PromptBatch, TrainableFlow
from srpo_core.keeping import CudaMemory, Memory
from srpo_core.sharding import is_part, is_sharded, leave_streams_alone

Addresses = tuple[int, ...]


class Recording(Protocol):
    """Work that was recorded, and where it puts its result when it is played."""

    out: Tensor

    def play(self) -> None: ...


class Recorder(Protocol):
    """What records work on a device; what it holds beside what is in use by tensors, in bytes."""

    taken: int

    def record(self, work: Callable[[], Tensor], again: bool) -> Recording:
        """The work, which is not done by this: `again` where it takes the place of another one, which is still there.

        RuntimeError if it can't be recorded, or if there is no memory.
        """
        ...

    def forget(self) -> None:
        """Give back the memory of recordings, none of which is played any more."""
        ...


@dataclass(frozen=True)
class CudaGraph:
    """A CUDA graph of some work."""

    graph: torch.cuda.CUDAGraph
    out: Tensor

    def play(self) -> None:
        self.graph.replay()


class CudaGraphs:
    """Records on a CUDA device. All graphs work in the same memory, so results have to be fetched before the next."""

    def __init__(self, device: torch.device) -> None:
        self.taken, self._device = 0, device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def record(self, work: Callable[[], Tensor], again: bool) -> CudaGraph:
        if not again:
            torch.cuda.empty_cache()  # what the allocator holds of other memory, graphs can't have
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads may do as they please
            try:
                out = work()
                graph.capture_end()
            except RuntimeError:
                self._break_off(graph)
                raise
        self.taken += torch.cuda.memory_reserved(self._device) - before
        return CudaGraph(graph, out)

    def _break_off(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed, after which some versions of torch leave their allocator recording."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)

    def forget(self) -> None:
        self.taken, self._pool = 0, None
        torch.cuda.synchronize(self._device)  # one may be played just now
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Call:
    """A recorded call of a flow: it reads its arguments and the weights where they were when it was recorded."""

    recording: Recording
    arguments: list[Tensor]
    addresses: Addresses

    def play(self, given: list[Tensor]) -> Tensor:
        """The velocity of arguments like those."""
        for mine, tensor in zip(self.arguments, given, strict=True):
            mine.copy_(tensor)
        self.recording.play()
        return self.recording.out.clone()


class Replay:
    """Records a flow's calls, one for each shape, once its weights are where they were in the rollout before.

    Recording takes the host longer than making a call does, while the device waits. So where weights move in each step
    (codes in fp8, gathered parts) calls are made as ever.

    Nothing is recorded before the first step is done, which compiles and shows how much memory a step takes, and before
    a call has shown what it takes; nor where that would leave too little for such a step. `report` is told if recording
    fails: calls are made as ever then.
    """

    def __init__(self, recorder: Recorder, memory: Memory, report: Callable[[str], None]) -> None:
        self.ready = False
        """Set once a step is done."""
        self._recorder, self._memory, self._report = recorder, memory, report
        self._calls: dict[object, _Call] = {}
        self._takes: dict[object, int] = {}
        self._last: Addresses | None = None
        self._stopped = False

    @property
    def taken(self) -> int:
        """Bytes that recordings hold."""
        return self._recorder.taken

    def of(self, flow: TrainableFlow) -> FlowModel:
        """The flow for rollouts without gradient, as long as nothing moves or gathers its weights but its own calls."""
        return _Replayed(flow, self) if self.ready and not self._stopped else flow

    def stop(self) -> bool:
        """Record and play nothing any more, and give back the memory that it took; whether it took any."""
        held = bool(self.taken)
        self._stopped = True
        self._calls.clear()
        self._recorder.forget()
        return held

    def make(self, key: object, work: Callable[[], Tensor], measured: bool) -> Tensor:
        """A call, and what it takes if that is to be `measured`."""
        if not measured or key in self._takes:
            return work()
        made, self._takes[key] = self._memory.spent(work)
        return made

    def _spare(self) -> int:
        """Bytes that no step has taken so far, nor a recording."""
        return self._memory.room() + self._memory.allocated() - self._memory.peak() - self.taken

    def fits(self, key: object) -> bool:
        """Whether there is room to record a call, as far as is known: that of an earlier recording is there."""
        return key in self._calls or (key in self._takes and self._takes[key] <= self._spare())

    def stayed(self, addresses: Addresses) -> bool:
        """Whether the weights of a rollout are where those of the one before were; to be asked once in each."""
        before, self._last = self._last, addresses
        return before == addresses

    def find(self, key: object, addresses: Callable[[], Addresses | None]) -> _Call | None:
        """A recorded call that reads weights where they are now."""
        call = self._calls.get(key)
        return call if call is not None and call.addresses == addresses() else None

    def record(
        self,
        flow: TrainableFlow,
        key: object,
        addresses: Addresses,
        latents: Tensor,
        sigma: Tensor,
        prompts: PromptBatch,
        guidance: float,
    ) -> _Call | None:
        """A call with arguments like these; None if that can't be done, now and ever after."""
        if self._stopped:
            return None
        latents, sigma = latents.clone(), sigma.clone(memory_format=torch.contiguous_format)
        prompts = PromptBatch(prompts.prompts, {name: one.clone() for name, one in prompts.embeds.items()})
        leave_streams_alone(flow.module)
        try:
            recording = self._recorder.record(
                lambda: flow.velocity(latents, sigma, prompts, guidance), again=key in self._calls
            )
        except RuntimeError as error:
            self.stop()
            if not ran_out_of_memory(error):
                reason = reason_of(error)
                self._report(f"rollout.cuda_graph=true can't be done here, the run goes on without: {reason}")
            return None
        if self._spare() < 0:
            del recording
            self.stop()
            return None
        self._calls[key] = call = _Call(recording, _tensors(latents, sigma, prompts), addresses)
        return call


def _tensors(latents: Tensor, sigma: Tensor, prompts: PromptBatch) -> list[Tensor]:
    """All that a call is given, beside numbers."""
    return [latents, sigma, *prompts.embeds.values()]


class _Replayed:
    """A flow whose calls are played where they are recorded: see Replay.of."""

    def __init__(self, flow: TrainableFlow, replay: Replay) -> None:
        self._flow, self._replay = flow, replay
        self._where: Addresses | None = None
        self._stayed = False
        self._made: set[object] = set()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._flow.latent_shape(height, width)

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, guidance: float) -> Tensor:
        given = _tensors(latents, sigma, prompts)
        key = (tuple((one.shape, one.dtype) for one in given), tuple(prompts.embeds), guidance)
        call, made = self._replay.find(key, self._addresses), key in self._made
        # by the time that one was made weights are gathered, and code is compiled
        where = self._addresses() if call is None and made else None
        if where is not None and self._stayed and self._replay.fits(key):
            call = self._replay.record(self._flow, key, where, latents, sigma, prompts, guidance)
        if call is not None:
            return call.play(given)
        self._made.add(key)
        return self._replay.make(key, lambda: self._flow.velocity(latents, sigma, prompts, guidance), made)

    def _addresses(self) -> Addresses | None:
        """Where the weights are; they stay there once they are gathered."""
        if self._where is None:
            self._where = addresses_of(self._flow.module)
            self._stayed = self._where is not None and self._replay.stayed(self._where)
        return self._where


def addresses_of(module: nn.Module) -> Addresses | None:
    """Where all of a module's tensors are; None if some are in parts, to be gathered by its next call."""
    found = []
    for one in module.modules():
        for tensor in (*one._parameters.values(), *one._buffers.values(), *vars(one).values()):
            if isinstance(tensor, Tensor):
                if is_part(tensor):
                    return None
                found.append(tensor.data_ptr())
    return tuple(found)


def can_record(config: RunConfig, flow: TrainableFlow, device: torch.device) -> bool:
    """Whether a run's rollouts can be recorded, as far as its settings tell.

    Its flow has to say that it is `recordable`. Messages to other processes are not recorded: where some share a
    picture, or gather blocks call by call, each call is made.
    """
    sends = config.parallel.context > 1 or (is_sharded(config.parallel) and config.parallel.gathered == "layer")
    wanted = config.rollout.cuda_graph and device.type == "cuda"
    return wanted and not sends and getattr(flow, "recordable", False)


def make_replay(device: torch.device, report: Callable[[str], None]) -> Replay:
    """Of CUDA graphs on a device."""
    return Replay(CudaGraphs(device), CudaMemory(device), report)
