"""A model in parts, one on each process: FSDP2 gathers a block when it is used and sums up its gradients afterwards.

Everything else sees the parts as plain tensors (`parts_of`): optimizer, average, norm and clipping need no other form.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from srpo_core.config import ParallelConfig, RunConfig
from srpo_core.interfaces import TrainableFlow
from srpo_core.parallel import World

Parameters = Mapping[str, nn.Parameter]


def is_sharded(parallel: ParallelConfig) -> bool:
    """Whether a run's processes hold parts of the model: one alone holds it whole, whatever the strategy."""
    return parallel.strategy != "replicate" and parallel.processes * parallel.nodes > 1


def shards(parallel: ParallelConfig) -> int:
    """How many parts the model is in."""
    if not is_sharded(parallel):
        return 1
    return parallel.processes * (parallel.nodes if parallel.strategy == "shard" else 1)


def shard(flow: TrainableFlow, world: World, config: RunConfig) -> None:
    """Leave this process its part of each parameter of the flow's module; what it held of the others is freed.

    Blocks and what is outside of them are gathered one at a time, in model.dtype; gradients are averaged over processes
    in parallel.gradients, and added up in float32. Parameters may be on meta: `fill_parts` gives them values.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    parallel, dtype = config.parallel, getattr(torch, config.model.dtype)
    narrow = None if dtype == torch.float32 else dtype
    options = {
        "mesh": _mesh(world, parallel.strategy),
        # levels, position tables and the picture itself stay as exact as the family hands them over
        "mp_policy": MixedPrecisionPolicy(narrow, getattr(torch, parallel.gradients), cast_forward_inputs=False),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")} if parallel.offload else {}),
    }
    for module in [one for one in flow.module.modules() if isinstance(one, flow.block_types)]:
        fully_shard(module, **options)
    if not isinstance(flow.module, flow.block_types):
        fully_shard(flow.module, **options)
    if shares_memory(config):
        for one in _gathering(flow.module):
            one.set_custom_reduce_scatter(_Reduce(world.device))


def shares_memory(config: RunConfig) -> bool:
    """Whether gradients of parts have the memory that activations leave.

    FSDP makes them on a stream of its own, whose memory is its own too. They are what `_Reduce` has made where nothing
    else is done to them: no sum over machines on a third stream, no cast, no move to the host. And only in a step's
    only pass: what is added to gradients of an earlier one is given back at once, which another stream's memory isn't.
    """
    from torch.distributed.fsdp import FSDPModule

    parallel = config.parallel
    plain = parallel.strategy == "shard" and parallel.gradients == "float32" and not parallel.offload
    return plain and config.backward_passes() == 1 and hasattr(FSDPModule, "set_custom_reduce_scatter")


class _Reduce:
    """How FSDP sums up gradients over processes (its ReduceScatter), in memory of the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._computing = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # by version of torch

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is sent, asked for on the stream that computes, or on FSDP's, for what comes of it.

        That one waits for the other beforehand, so that whatever left the room is done with it.
        """
        if self._computing is None or (using := torch.cuda.current_stream(device)) == self._computing:
            return torch.empty(*size, dtype=dtype, device=device)
        with torch.cuda.stream(self._computing):
            room = torch.empty(*size, dtype=dtype, device=device)
        room.record_stream(using)  # given back, it is taken again once that stream is done with it
        return room

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._sum(output_tensor, input_tensor, op, group, async_op)


def _mesh(world: World, strategy: str) -> dist.DeviceMesh:
    """Processes in one row, or for `hybrid` in a row for each machine."""
    from torch.distributed.device_mesh import init_device_mesh

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if strategy == "shard" or local == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=("replicate", "shard"))


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "device_mesh")


def part_of(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory, without gradient; the tensor itself where it is whole."""
    return tensor.detach().to_local() if is_part(tensor) else tensor


def parts_of(parameters: Parameters) -> Parameters:
    """Plain parameters for an optimizer, in the memory of this process's parts; the same mapping where all are whole.

    A part may be empty: a parameter has fewer rows than there are processes.
    """
    if not any(map(is_part, parameters.values())):
        return parameters
    return {
        name: nn.Parameter(part_of(parameter)) if is_part(parameter) else parameter
        for name, parameter in parameters.items()
    }


def hand_over_gradients(parameters: Parameters, parts: Parameters) -> None:
    """Move gradients from parameters to their parts, and from there nowhere: parameters have none afterwards."""
    for name, parameter in parameters.items():
        if is_part(parameter):
            parts[name].grad = None if parameter.grad is None else part_of(parameter.grad)
            parameter.grad = None


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A process's part of something of a parameter's shape, as a tensor spread as the parameter is.

    In the same memory, be it the host's where parameters are gathered on a GPU: DTensor.from_local would move it there.
    """
    if not is_part(parameter) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(parameter.shape, parameter.stride(), tensor.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    return DTensor(tensor.detach(), spec, requires_grad=False)


def whole_norm(norm: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients by that of this process's: of `parameters` in parts, over all parts.

    On the device that computes.
    """
    for mesh in {parameter.device_mesh for parameter in parameters if is_part(parameter)}:  # one, if any
        device = torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
        squared = norm.to(device) ** 2
        dist.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
        norm = squared.sqrt()
    return norm


def put_whole(parameter: Tensor, tensor: Tensor) -> None:
    """Give a parameter a value: of one in parts, this process's part of it."""
    if not is_part(parameter):
        parameter.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    spread = distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
    part_of(parameter).copy_(spread.to_local())


@torch.no_grad()
def fill_parts(module: nn.Module, stream: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give a sharded module on meta its values, one whole tensor after the other; each process keeps its part.

    `device` is where its parts are held.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.device.type != "meta"}
    module.to_empty(device=device)
    parameters = dict(module.named_parameters())
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    for name, tensor in stream:
        put_whole(parameters[name], tensor)


@contextlib.contextmanager
def looks_whole(module: nn.Module) -> Iterator[None]:
    """Inside the context parameters in parts look like whole ones on the host, which take no memory.

    For peft, which asks for shapes, and takes parts for those of layers that compute in parts.
    """
    there = [(owner, name, p) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]
    kept = [(owner, name, parameter) for owner, name, parameter in there if is_part(parameter)]
    for owner, name, parameter in kept:
        shape = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
        owner._parameters[name] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter


def move_whole(module: nn.Module, device: torch.device) -> None:
    """Put what is trained and not in parts, such as a LoRA that was added on the host, on a device."""
    for parameter in module.parameters():
        if parameter.requires_grad and not is_part(parameter):
            parameter.data = parameter.data.to(device)


def sum_over_machines(module: nn.Module, now: bool) -> None:
    """Of a hybrid model: sum gradients over machines too with the next backward pass, or leave that to a later one."""
    if hasattr(module, "set_requires_all_reduce"):
        module.set_requires_all_reduce(now)


def settle(module: nn.Module) -> None:
    """Free what is gathered of a module: from here on it may be changed, and is gathered anew when it is used."""
    for one in _gathering(module):
        one.reshard()


def leave_streams_alone(module: nn.Module) -> None:
    """Before a call of a module that is gathered: it waits for no other streams, and has none of them wait for it."""
    if hasattr(module, "set_post_optim_event"):
        now = torch.cuda.Event()
        now.record()
        module.set_post_optim_event(now)


@contextlib.contextmanager
def gathered(module: nn.Module, stay: bool) -> Iterator[None]:
    """Inside the context blocks stay gathered once they are, if they are to `stay`; afterwards none is."""
    blocks = [one for one in _gathering(module) if one is not module] if stay else []
    _reshard(blocks, False)
    try:
        yield
    finally:
        _reshard(blocks, True)
        if stay:
            settle(module)


def _reshard(blocks: Sequence[nn.Module], after_use: bool) -> None:
    for block in blocks:
        block.set_reshard_after_forward(after_use, recurse=False)
        block.set_reshard_after_backward(after_use, recurse=False)


def _gathering(module: nn.Module) -> list[nn.Module]:
    """The module's own modules that FSDP gathers; none of one that is whole."""
    return [one for one in module.modules() if hasattr(one, "set_reshard_after_forward")]
