"""What a training step sends and holds on 2 to 256 GPUs, counted without any: the step's own code with shapes only.

    PYTHONPATH=. python scripts/scale_counted.py --out scale_counted.json [--rows NAME ...] [--sizes N ...]

One process plays rank 0 of so many, with FLUX.1-dev's shapes and the published recipe, a picture for each. Its tensors
have shapes and no memory (torch's FakeTensorMode), its messages go nowhere (torch's "fake" process group); model,
FSDP, gradient step and optimizer are those of a run. Counted are each message, the bytes that a process receives with
it, and the bytes of all tensors that are alive, whose peaks stand beside what srpo_core.estimate predicts. Nothing is
timed. It is the CPU's code: what CUDA and its libraries take beside tensors isn't there, and parallel.offload, which
moves tensors to where they are here anyway, can't be counted. `--tiny` shrinks the models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from bench_load import machine
from bench_step import build, describe
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srpo_core.devices import as_launched, training_world
from srpo_core.estimate import WORKSPACE, estimate, shapes_of
from srpo_core.learner import Learner
from srpo_core.metrics import Clock
from srpo_core.models import flux_context
from srpo_core.parallel import World
from srpo_core.sharding import is_part

MACHINE = 8
"""GPUs of a machine."""
WHOLE = "model.trained_memory=float32 optim.states=float32"
SHARD, HYBRID = (f"{WHOLE} parallel.strategy={name}" for name in ("shard", "hybrid"))
ROLLOUT, STEP = "parallel.gathered=rollout", "parallel.gathered=step"
LORA, LARGE, WIDE = "lora.rank=32", "data.height=1024 data.width=1024", "data.width=704"
PAIR = "parallel.context=2"
ROWS: dict[str, tuple[str, tuple[int, ...]]] = {
    "alone": (WHOLE, (1,)),
    "shard, layer": (SHARD, (2, 8, 32, 256)),
    "shard, rollout": (f"{SHARD} {ROLLOUT}", (8, 32, 256)),
    "shard, step": (f"{SHARD} {STEP}", (2, 8, 32, 256)),
    "shard, step, gradients in bfloat16": (f"{SHARD} {STEP} parallel.gradients=bfloat16", (8,)),
    "shard, step, both branches in one pass": (f"{SHARD} {STEP} align.at_once=2", (8,)),
    "hybrid, layer": (HYBRID, (32,)),
    "hybrid, step": (f"{HYBRID} {STEP}", (8, 32, 256)),
    "shard, step, accumulation 2": (f"{SHARD} {STEP} optim.accumulation=2", (8,)),
    "hybrid, step, accumulation 2": (f"{HYBRID} {STEP} optim.accumulation=2", (32,)),
    "shard, layer, 704 wide": (f"{SHARD} {WIDE}", (8,)),
    "shard, layer, 704 wide, two share a picture": (f"{SHARD} {PAIR} {WIDE}", (8,)),
    "LoRA, alone": (LORA, (1,)),
    "LoRA, replicate": (LORA, (8,)),
    "LoRA, shard, layer": (f"{LORA} parallel.strategy=shard", (8,)),
    "LoRA, shard, step": (f"{LORA} parallel.strategy=shard {STEP}", (8,)),
    "LoRA, replicate, 1024": (f"{LORA} {LARGE}", (2,)),
    "LoRA, replicate, 1024, two share a picture": (f"{LORA} {PAIR} {LARGE}", (2,)),
}
"""By name: settings on top of the recipe, and the numbers of processes."""
BYTES = ("received", "received_in_all", "held_before_the_first_step", "peak", "predicted")
PHASES = {"rollout": ("rollout",), "gradient step": ("gradient", "optimizer")}
"""The estimate's phases by those of a step's clock."""


class Counted(TorchDispatchMode):
    """Messages and the bytes of living tensors, as long as the mode is on; numbers that are asked for are 1.

    Messages and the bytes received with them are by kind and by whom they went around: processes of a machine, one of
    each machine, or all. Received is what a ring brings: of a gathering or a sum, all parts but one's own; of a sum
    for everyone, twice that.
    """

    def __init__(self, machine: int) -> None:
        super().__init__()
        self._machine = machine
        self.messages: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Counted:
        counted = self

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP's way to free what it has gathered, which no operation tells of."""
            done = counted._resize(storage, size)
            if id(storage) in counted._sizes:
                counted._hold(storage)
            return done

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*args)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self._message(function.overloadpacket.__name__, args)
        result = function(*args, **(kwargs or {}))
        # a part is seen a second time as what it is a part of, which has no memory
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and not is_part(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._sizes:
                    self._hold(storage)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._let_go(key))
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _let_go(self, key: int) -> None:
        del self._alive[key]
        self.live -= self._sizes.pop(key)

    def _message(self, name: str, args: Sequence[Any]) -> None:
        tensors = [one for one in tree_leaves(args[:2]) if isinstance(one, Tensor)]
        group = next(one for one in map(_group, args) if one is not None)
        sizes, count = [one.nbytes for one in tensors], group.size()
        around = sum(sizes) * (count - 1) // count
        kind, received = {
            "_allgather_base_": ("all-gather", max(sizes) - min(sizes)),
            "all_gather_into_tensor": ("all-gather", sum(sizes) * (count - 1)),
            "_reduce_scatter_base_": ("reduce-scatter", max(sizes) - min(sizes)),
            "allreduce_": ("all-reduce", 2 * around),
            "broadcast_": ("broadcast", sum(sizes)),
            "all_to_all_single": ("all-to-all", around),
        }[name]
        name = f"{kind}, {self._among(group)}"
        self.messages[name] += 1
        self.received[name] += received

    def _among(self, group: dist.ProcessGroup) -> str:
        ranks = dist.get_process_group_ranks(group)
        machines = {rank // self._machine for rank in ranks}
        return "a machine" if len(machines) == 1 else "machines" if len(machines) == len(ranks) else "all"


def _group(argument: Any) -> dist.ProcessGroup | None:
    """The process group that an argument of a collective stands for, if it does."""
    if isinstance(argument, str):
        return dist.distributed_c10d._resolve_process_group(argument)
    return dist.ProcessGroup.unbox(argument) if isinstance(argument, torch.ScriptObject) else None


class Phases(Clock):
    """The most bytes alive in each phase."""

    def __init__(self, counted: Counted) -> None:
        super().__init__(lambda: None)
        self._counted = counted
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the context's peak."""
        self._counted.peak = self._counted.live
        with super().phase(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0), self._counted.peak)


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors have numbers, such as one that makes a mesh of processes."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


def swap(old: Tensor, new: Tensor, swapped: Callable[[Tensor, Tensor], None] = torch.utils.swap_tensors) -> None:
    """What Module.to does with its parameters, also those that are only shapes, which torch doesn't swap."""
    try:
        swapped(old, new)
    except RuntimeError:
        old.data = new.data


@contextlib.contextmanager
def playing(size: int) -> Iterator[Counted]:
    """Inside the context this process is rank 0 of `size` that do as it does, and tensors are only shapes.

    What processes tell each other as text (World.exchange) isn't counted: some hundred bytes a step.
    """
    from torch.distributed import device_mesh

    local = min(size, MACHINE)
    places = {"RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local, "LOCAL_RANK": 0, "GROUP_RANK": 0}
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with (
            mock.patch.dict(os.environ, {name: str(value) for name, value in places.items()}),
            mock.patch.object(World, "_round", lambda world, message: [message] * world.size),
            mock.patch.object(device_mesh, "init_device_mesh", really(device_mesh.init_device_mesh)),
            mock.patch.object(flux_context, "share_tokens", really(flux_context.share_tokens)),
            mock.patch("torch.accelerator.device_count", return_value=1),  # tokens are shared among GPUs only
            mock.patch("torch.utils.swap_tensors", swap),
            FakeTensorMode(allow_non_fake_inputs=True),
            Counted(local) as counted,
        ):
            yield counted
    finally:
        if size > 1:
            dist.destroy_process_group()


def second_step(learner: Learner, counted: Counted) -> dict[str, int]:
    """Peaks by phase of a step that finds the moments of the optimizer there; its messages are in `counted`."""
    config, one_call = learner.config, learner.config.rollout.model_copy(update={"num_steps": 1})
    learner.config = config.model_copy(update={"rollout": one_call})
    learner.step(1, Clock(lambda: None))
    learner.config = config
    counted.messages.clear()
    counted.received.clear()
    phases = Phases(counted)
    learner.step(2, phases)
    return {name: max(phases.peaks[one] for one in ours) for name, ours in PHASES.items()}


def count(settings: str, size: int, tiny: bool) -> dict[str, object]:
    """A row: messages and bytes received by kind and by whom they went around, memory counted and predicted."""
    start = time.perf_counter()
    with playing(size) as counted:
        config = as_launched(describe(f"parallel.device=cpu {settings}", tiny))
        components, _, learner = build(config, tiny, training_world(config.parallel))
        held = counted.live
        peaks = second_step(learner, counted)
        guess = estimate(config, shapes_of(config, components)).phases
    return {
        "settings": settings,
        "messages": dict(counted.messages),
        "received": dict(counted.received),
        "received_in_all": counted.received.total(),
        "held_before_the_first_step": held,
        "peak": peaks,
        "predicted": {name: guess[name] - WORKSPACE for name in peaks},  # which libraries keep, beside tensors
        "seconds_of_counting": round(time.perf_counter() - start),
    }


def told(row: dict[str, object]) -> dict[str, object]:
    """A row whose bytes are in GB."""

    def gb(value: Any) -> Any:
        return {name: gb(one) for name, one in value.items()} if isinstance(value, dict) else round(value / 1e9, 3)

    return {f"{name}_gb" if name in BYTES else name: gb(one) if name in BYTES else one for name, one in row.items()}


def main() -> None:
    """Count the rows, one by one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sizes", nargs="*", type=int, help="only these numbers of processes")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    there = args.out is not None and args.out.is_file()
    rows: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if there else {}
    about = machine("PYTHONPATH=. python scripts/scale_counted.py --out scale_counted.json")
    about |= {"device": "none", "diffusers": diffusers.__version__}
    for name in args.rows:
        settings, sizes = ROWS[name]
        for size in sizes:
            if args.sizes and size not in args.sizes:
                continue
            row = rows.setdefault(name, {})[str(size)] = told(count(settings, size, args.tiny))
            print(f"{size} x {name}: {json.dumps(row)}", flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
