"""The files of a checkpoint: safetensors, of which each process writes its own.

torch.distributed.checkpoint plans who writes and reads which pieces of which tensors, and this is
its storage. The header of a file says at which row of the whole tensor each piece begins, in the
form of torch's `HuggingFaceStorageWriter`, whose reader reads these files, too. That writer holds
a process's file twice in host memory; here 64 MiB at a time go to the disk and into the checksum.
"""

import json
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import shortened

OFFSETS = "DCP_SHARDING_INFO"
"""Under this name the header has {tensor: {"saved_offsets": [first row, 0, …]}}."""
BLOCK = 2**26
"""Bytes that are copied to the host, written and read at a time."""
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""The dtypes of safetensors that weights and states have."""
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


Plan = TypeVar("Plan", SavePlan, LoadPlan)


class _FixedFiles:
    """What torch asks of a storage whose files are chosen already, and whose plans need no word."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Take no other place."""

    def prepare_local_plan(self, plan: Plan) -> Plan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[Plan]) -> list[Plan]:
        """Return the plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Say that torch cannot choose this storage by a path."""
        return False


class ShardWriter(_FixedFiles, StorageWriter):
    """Writes what the plan gives this process to the file at `path`, and forces it to the disk.

    `written` then has its name and `{"bytes": …, "crc32": …}`; a process that has nothing to write
    makes no file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.written: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pieces of the plan, those of the widest dtypes first, which aligns them."""
        items = sorted(plan.items, key=lambda item: (-_dtype(item).itemsize, item.index.fqn))
        if items:
            self._write(_header(items), (planner.resolve_data(item) for item in items))
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, _size(item), self.path.name) for item in items])
        return future

    def _write(self, header: bytes, tensors: Iterator[Tensor]) -> None:
        with self.path.open("wb") as file:
            file.write(header)
            crc, size = zlib.crc32(header), len(header)
            for tensor in tensors:
                for block in tensor.detach().reshape(-1).view(torch.uint8).split(BLOCK):
                    content = block.cpu().numpy()
                    file.write(content)
                    crc, size = zlib.crc32(content, crc), size + len(content)
            file.flush()
            os.fsync(file.fileno())
        self.written[self.path.name] = {"bytes": size, "crc32": f"{crc:08x}"}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write nothing more: the headers of the files say all."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepare nothing."""


def _dtype(item: WriteItem) -> torch.dtype:
    return item.tensor_data.properties.dtype


def _size(item: WriteItem) -> int:
    """Return the bytes of a piece."""
    return item.tensor_data.chunk.sizes.numel() * _dtype(item).itemsize


def _header(items: Sequence[WriteItem]) -> bytes:
    """Return what a file of these pieces, in this order, begins with."""
    offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset)} for item in items}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", OFFSETS: json.dumps(offsets)}}
    first = 0
    for item in items:
        last = first + _size(item)
        header[item.index.fqn] = {
            "dtype": TYPE_NAMES[_dtype(item)],
            "shape": list(item.tensor_data.chunk.sizes),
            "data_offsets": [first, last],
        }
        first = last
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardReader(_FixedFiles, StorageReader):
    """Reads pieces of tensors from the files at `paths`, whichever process has written them.

    The single file of the optimizer that earlier versions wrote has other names, and tensors in
    the shapes of their parameters: `rename` turns such a name into today's, and its tensor counts
    as flat.
    """

    def __init__(self, paths: Sequence[Path], rename: Callable[[str], str] | None = None):
        self.paths, self.rename = paths, rename
        self._places: dict[MetadataIndex, tuple[Path, str]] = {}
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors that the files hold, and which pieces of them there are.

        Raises ValueError where the pieces are not whole tensors together.
        """
        if self._metadata is None:
            metadata = Metadata({})
            for path in self.paths:
                self._read_header(path, metadata.state_dict_metadata)
            for name, tensor in metadata.state_dict_metadata.items():
                _require_all_rows(name, tensor)
            self._metadata = metadata
        return self._metadata

    def _read_header(self, path: Path, tensors: dict[str, Any]) -> None:
        with safe_open(path, "pt") as file, _named(path):
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for key in file.keys():  # noqa: SIM118 - safetensors' files are no mappings
                piece = file.get_slice(key)
                shape = torch.Size(piece.get_shape())
                name = self.rename(key) if self.rename else key
                shape = torch.Size([shape.numel()]) if self.rename else shape
                begin = {"saved_offsets": [0] * len(shape)}
                first = torch.Size(offsets.get(key, begin)["saved_offsets"])
                properties = TensorProperties(dtype=TYPES[piece.get_dtype()])
                tensor = tensors.setdefault(name, TensorStorageMetadata(properties, shape, []))
                if tensor.properties.dtype != properties.dtype:
                    raise ValueError(f"{name} has another dtype in another file")
                ends = (at + size for at, size in zip(first, shape, strict=True))
                tensor.size = torch.Size(map(max, tensor.size, ends))
                tensor.chunks.append(ChunkStorageMetadata(first, shape))
                self._places[MetadataIndex(name, first)] = path, key

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the pieces of the plan into the tensors that the planner has for them."""
        by_file = defaultdict(list)
        for item in plan.items:
            path, key = self._places[item.storage_index]
            by_file[path].append((key, item))
        for path, items in by_file.items():
            with safe_open(path, "pt") as file:
                for key, item in items:
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    rows = tuple(slice(first, first + length) for first, length in ends)
                    if self.rename:
                        content = file.get_tensor(key).reshape(-1)[rows]
                    else:
                        content = file.get_slice(key)[rows] if rows else file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    target.copy_(content)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Prepare nothing."""


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what comes of a header with other entries than ours into one ValueError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"the header of {path.name}: {shortened(error)}") from error
    except RecursionError as error:
        raise ValueError(f"the header of {path.name} is too deep") from error


def _require_all_rows(name: str, tensor: TensorStorageMetadata) -> None:
    """Raise ValueError unless the pieces are all rows of a tensor, each of them once."""
    at = 0
    for piece in sorted(tensor.chunks, key=lambda piece: tuple(piece.offsets)):
        first, size = tuple(piece.offsets), tuple(piece.sizes)
        if first != (at, *[0] * len(tensor.size))[: len(size)] or size[1:] != tensor.size[1:]:
            raise ValueError(f"rows of {shortened(name)} are missing, or there twice")
        at += size[0] if size else 0
    if not tensor.size and len(tensor.chunks) != 1:
        raise ValueError(f"{shortened(name)} is there twice")
