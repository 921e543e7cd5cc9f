"""How torch.distributed.checkpoint writes and reads a checkpoint's parts (sharded_checkpoint.py): nothing pickled.

Imported when a sharded run saves or reads: it takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from srpo_core.files import sync, write_atomic
from srpo_core.sharded_checkpoint import INDEX, Saved, block_of
from srpo_core.weights.tensors import DTYPES


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, spread over processes or the same on all, into a folder that is there: every process its part.

    All processes call it; what fails on one, such as a full disk, is an OSError on all.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder), planner=planner)
    except CheckpointException as error:
        rank, failure = min(error.failures.items())
        raise OSError(f"process {rank}: {failure[0]}") from error


def read_parts(saved: Saved, targets: Mapping[str, Tensor]) -> None:
    """See Saved.read_into."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(targets), storage_reader=_Reader(saved), planner=planner, no_dist=True)


class _Writer(dcp.StorageWriter):
    """Files of a process's pieces, and the index of all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = torch.distributed.get_rank()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces; one without rows has none."""
        tensors, results, name = {}, [], f"part-{self.rank:04d}.safetensors"
        for item in plan.items:
            tensor = planner.resolve_data(item).detach()
            if tensor.numel():
                tensors[item.index.fqn] = tensor.cpu().contiguous()
                offsets = list(item.index.offset or (0,) * tensor.ndim)
                results.append(WriteResult(item.index, tensor.nbytes, (name, offsets)))
        if tensors:
            save_file(tensors, self.folder / name)
            sync(self.folder / name)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the main process."""
        told = {
            name: {"shape": list(one.size), "parts": {}}
            for name, one in metadata.state_dict_metadata.items()
            if isinstance(one, TensorStorageMetadata)
        }
        for result in (result for each in results for result in each):
            name, offsets = result.storage_data
            told[result.index.fqn]["parts"][name] = offsets
        write_atomic(self.folder / INDEX, json.dumps(told))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class _Reader(dcp.StorageReader):
    """A checkpoint's tensors as torch.distributed.checkpoint asks for them."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is, by headers."""
        found = {}
        for name, info in self.saved.info.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.file.info[name].shape))
                for piece in self.saved.pieces[name]
            ]
            properties = TensorProperties(dtype=DTYPES[info.dtype])
            found[name] = TensorStorageMetadata(properties, torch.Size(info.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Headers are all that is needed."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read rows into their place; of other sides, what is not asked for is read too."""
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            found = next(p for p in self.saved.pieces[index.fqn] if p.offsets == tuple(index.offset or p.offsets))
            offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
            if offsets:
                rows = found.file.read(index.fqn, (offsets[0], offsets[0] + lengths[0]))
                rows = block_of(rows, (0, *offsets[1:]), lengths)
            else:
                rows = found.file.read(index.fqn)
            target = planner.resolve_tensor(item).detach()
            target.copy_(rows)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False
