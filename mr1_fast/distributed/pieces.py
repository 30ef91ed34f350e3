"""Pieces of tensors, saved and loaded together by all processes (torch.distributed.checkpoint).

A piece is some rows of a larger tensor. A process reads the rows that it needs from every file that
has some of them, so that any number of processes can go on from a checkpoint.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .shard_files import ShardReader, ShardWriter
from .world import World


@dataclass(frozen=True)
class Piece:
    """Rows of a larger tensor, its `first` one and those after it."""

    tensor: Tensor
    """(n, …): the rows, detached from autograd, which are read or written in place."""
    first: int
    whole: torch.Size
    """The shape of the larger tensor."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where the rows lie in the larger tensor, as torch.distributed.checkpoint says it."""
        first = [self.first, *(0 for _ in self.whole)][: len(self.whole)]
        return ChunkStorageMetadata(torch.Size(first), self.tensor.shape)


def save_pieces(pieces: Mapping[str, Piece], path: Path, world: World) -> dict[str, dict]:
    """Write the pieces of all processes, a file for each process, and return all files' checksums.

    The file is `path` where a process is alone, and otherwise has its number in its name. What
    several processes have is written by one of them, so that all write equally much. Collective;
    an error of one process is raised in all.
    """
    if world.size > 1:
        number = f"{world.rank + 1:05d}-of-{world.size:05d}"
        path = path.with_name(f"{path.stem}-{number}{path.suffix}")
    writer = ShardWriter(path)
    with _own_errors():
        dcp.save(
            dict(pieces),
            storage_writer=writer,
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=world.control,
            no_dist=world.size == 1,
        )
    return {name: check for each in world.gather(writer.written) for name, check in each.items()}


def check_pieces(pieces: Mapping[str, Piece], reader: ShardReader) -> None:
    """Raise ValueError where the files do not have the tensors that the pieces belong to."""
    found = reader.read_metadata().state_dict_metadata
    for name, piece in pieces.items():
        if (saved := found.get(name)) is None:
            raise ValueError(f"{name} is missing")
        if saved.size != piece.whole or saved.properties.dtype != piece.tensor.dtype:
            raise ValueError(
                f"{name} is {tuple(saved.size)} in {saved.properties.dtype} instead of "
                f"{tuple(piece.whole)} in {piece.tensor.dtype}"
            )


def load_pieces(pieces: Mapping[str, Piece], reader: ShardReader, world: World) -> None:
    """Fill the pieces' tensors with what the files hold, which `check_pieces` has found there.

    Collective; an error of one process is raised in all.
    """
    with _own_errors():
        dcp.load(
            dict(pieces),
            storage_reader=reader,
            planner=_LoadPlanner(),
            process_group=world.control,
            no_dist=world.size == 1,
        )


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans to write pieces: torch's plan, in which each is a shard, also where it is whole."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, piece.chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=piece.chunk,
                        properties=TensorProperties(dtype=piece.tensor.dtype),
                        size=piece.whole,
                    ),
                )
                for name, piece in self.state_dict.items()
                if piece.tensor.numel()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _LoadPlanner(LoadPlanner):
    """Plans to read pieces from whichever saved pieces overlap with them."""

    def set_up_planner(
        self,
        state_dict: dict[str, Piece],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.pieces, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, piece in self.pieces.items():
            saved = self.metadata.state_dict_metadata[name]
            if piece.tensor.numel():
                items += create_read_items_for_chunk_list(name, saved, [piece.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("a checkpoint has tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.pieces[read_item.dest_index.fqn].tensor
        for dimension, first in enumerate(read_item.dest_offsets):
            tensor = tensor.narrow(dimension, first, read_item.lengths[dimension])
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what has gone wrong in a process itself, in place of torch's list of tracebacks."""
    try:
        with warnings.catch_warnings():  # torch warns of each save by a process alone
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        causes = [error.failures[rank][0] for rank in sorted(error.failures)]
        # A signal to stop counts more than what follows from it.
        raise min(causes, key=lambda cause: isinstance(cause, Exception)) from error
