"""What packed files of data unpack to, counted before `datasets` writes all of it to the disk.

A few hundred bytes of Parquet can name one long text a million times, and a small archive can hold
a terabyte of zeros. Files are unpacked in small steps in a child process of limited time and
memory, which keeps nothing and stops at a bound that honest data stay far below.
"""

import bz2
import gzip
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

from ...bounded import Refused, bounded
from ...errors import UserError, shortened
from .text_files import LONGEST_LINE, text_memory
from .text_files import MEMORY as LARGEST_TEXT

MOST = 2**30
"""The most bytes that files of any size may unpack to together."""
TIMES = 32
"""How many bytes more they may unpack to for each byte that they have."""
SECONDS = 40
"""The processor time for the count of small files."""
SPEED = 2**24
"""Bytes of larger files for which it has another second."""
MEMORY = 3 * 2**28
"""The memory for the count of small files; larger ones may have parts that are as large."""
STEP = 2**24
"""Bytes that are unpacked at a time."""
MOST_ROWS = 2**12
"""The most rows of a table that are unpacked at a time."""
VALUE = 8
"""The bytes that a value takes besides its characters."""
WAY_OUT = "if you trust it, unpack it, or save it without compression and dictionaries"
"""What helps where honest data are refused."""
DAMAGED = (
    *(OSError, ValueError, EOFError, struct.error, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, zipfile.BadZipFile),
)
"""What is raised for an archive that is damaged, with which `datasets` comes no further."""
PACKED = (
    *(".parquet", ".arrow", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".npz"),
)
"""The suffixes of files that are not looked for within an archive."""
TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
"""The suffixes of texts in an archive, each of which `datasets` may read as a whole."""
UNKNOWN = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
"""How archives begin that Python cannot unpack."""


class _Unreadable(Exception):
    """A file that is damaged, or cannot be counted; the message says why and names the way out."""


def check_unpacked(source: str, form: str, paths: Sequence[Path]) -> None:
    """Raise UserError where the files `paths` of the data `source` unpack to too much together.

    `form` is the name of what reads them: "Parquet", "Arrow", or another reader of `datasets`.
    """
    if not paths:
        return
    # They are imported before the fork: a child must not wait for an import in a thread.
    import pyarrow.compute
    import pyarrow.parquet

    pyarrow.allocate_buffer(1)  # its allocator begins with a gigabyte of addresses, for the parent
    size = sum(os.path.getsize(path) for path in paths)
    seconds, memory = SECONDS + size // SPEED, MEMORY + 4 * size
    try:
        fault = bounded(lambda: _fault(form, paths, MOST + TIMES * size), seconds, memory)
    except Refused as error:
        reason = shortened(error, 120)
        fault = f"{shortened(source, 200)} does not unpack within bounds ({reason}): {WAY_OUT}"
    if fault:
        raise UserError(f"{fault}.")


def _fault(form: str, paths: Sequence[Path], most: int) -> str | None:
    """Return a sentence about the file with which `paths` unpack to too much, or that is damaged.

    Returns None if there is no such file.
    """
    total = 0
    for path in paths:
        name = shortened(path, 200)
        try:
            for size in _sizes(form, path):
                total += size
                if total > most:
                    return f"{name} unpacks to more than {most / 2**30:.1f} GiB: {WAY_OUT}"
        except _Unreadable as error:
            return f"{name} {error}"
    return None


def _sizes(form: str, path: Path) -> Iterator[int]:
    """Yield how many bytes the parts of a file unpack to; nothing for one that is not packed."""
    if form not in ("Parquet", "Arrow"):  # of a folder of images, the list may be a table
        form = {".parquet": "Parquet", ".arrow": "Arrow"}.get(path.suffix.lower(), form)
    if form in ("Parquet", "Arrow"):
        try:
            yield from (_arrow_sizes if form == "Arrow" else _parquet_sizes)(path)
        except (OSError, ValueError, NotImplementedError, KeyError) as error:
            raise _unreadable(error) from error
    else:
        yield from _archive_sizes(path)


def _unreadable(error: Exception) -> _Unreadable:
    """Return the error for a file that could not be read.

    A library without memory may say that a file is damaged, so none of those passes.
    """
    reason = shortened(" ".join(str(error).split()), 120)
    return _Unreadable(f"could not be loaded ({type(error).__name__}: {reason}): check the data")


def _parquet_sizes(path: Path) -> Iterator[int]:
    """Yield what the rows of a Parquet file take, a few rows at a time."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, memory_map=True, pre_buffer=False)
    stored = file.metadata
    size = sum(stored.row_group(index).total_byte_size for index in range(stored.num_row_groups))
    rows = max(1, min(MOST_ROWS, STEP * stored.num_rows // max(1, size)))
    for batch in file.iter_batches(batch_size=rows, use_threads=False):
        yield _batch_size(batch)


def _arrow_sizes(path: Path) -> Iterator[int]:
    """Yield what the rows of an Arrow file take, a batch at a time."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            batches = pyarrow.ipc.open_stream(file)
        except (OSError, pyarrow.ArrowInvalid):
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in batches:
            batch.validate()  # or a broken file could end the process
            yield _batch_size(batch)


def _batch_size(batch: Any) -> int:
    """Return the bytes that some rows of a table take as `datasets` writes them."""
    return VALUE * batch.num_rows + sum(map(_array_size, batch.columns))


def _array_size(array: Any) -> int:
    """Return the bytes that an array takes with its dictionaries written out."""
    import numpy as np
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _array_size(array.storage)
    if types.is_struct(kind):
        return sum(map(_array_size, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return VALUE * len(array) + _array_size(array.flatten())
    if types.is_dictionary(kind):
        values = array.dictionary
        if not _is_text(kind.value_type):
            longest = values.nbytes if types.is_nested(kind.value_type) else VALUE
            return len(array) * longest
        lengths = compute.take(compute.binary_length(values), array.indices)
        return VALUE * len(array) + (compute.sum(lengths.cast("int64")).as_py() or 0)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        lengths = views[array.offset : array.offset + len(array), 0]
        return 2 * VALUE * len(array) + int(lengths.clip(0).sum(dtype=np.int64))
    if _is_text(kind):
        return VALUE * len(array) + (compute.sum(compute.binary_length(array)).as_py() or 0)
    return max(array.nbytes, len(array))


def _is_text(kind: Any) -> bool:
    """Return whether a type of Arrow is one of texts or bytes of any length."""
    from pyarrow import types

    return (
        types.is_string(kind)
        or types.is_binary(kind)
        or types.is_large_string(kind)
        or types.is_large_binary(kind)
    )


def _archive_sizes(path: Path) -> Iterator[int]:
    """Yield what a compressed file or an archive unpacks to; nothing for another file."""
    with open(path, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith(UNKNOWN):
        raise _Unreadable("is an archive whose contents cannot be counted: unpack it")
    for magic, open_stream in _COMPRESSED.items():
        if start.startswith(magic):
            try:
                with open_stream(path) as stream:
                    start = stream.read(tarfile.BLOCKSIZE)
            except DAMAGED as error:
                raise _unreadable(error) from error
            if not _is_tar(start):
                yield _text_size(partial(open_stream, path), Path(path.stem).suffix.lower())
                return
            break
    with suppress(*DAMAGED):  # an image may look like an archive
        if _is_tar(start):
            yield from _tar_sizes(path)
        elif zipfile.is_zipfile(path):
            yield from _zip_sizes(path)


def _text_size(open_text: Callable[[], IO[bytes]], suffix: str) -> int:
    """Return what a packed text takes; `datasets` may hold all of it in memory."""
    try:
        with open_text() as stream:
            size = text_memory(_Lines(stream), suffix, LARGEST_TEXT)
    except DAMAGED as error:
        raise _unreadable(error) from error
    if size > LARGEST_TEXT:
        most = LARGEST_TEXT / 2**30
        raise _Unreadable(f"would take more than {most:g} GiB of memory: save it as Parquet")
    return size


class _Lines:
    """An unpacked text for reading in blocks, which raises _Unreadable for a line too long."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.line = 0

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        block = self.stream.read(size)
        end = block.rfind(b"\n")
        self.line = self.line + len(block) if end < 0 else len(block) - end
        if self.line > LONGEST_LINE:
            raise _Unreadable(
                f"has a line of more than {LONGEST_LINE:,} characters: shorten it, or save the "
                "data as Parquet"
            )
        return block


def _with_pyarrow(compression: str) -> Callable[[Path], BinaryIO]:
    """Return a function that opens a compressed file which the standard library does not know."""

    def opened(path: Path) -> BinaryIO:
        import pyarrow

        return pyarrow.input_stream(str(path), compression=compression)

    return opened


_COMPRESSED: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _with_pyarrow("zstd"),
    b"\x04\x22\x4d\x18": _with_pyarrow("lz4"),
}
"""What opens a compressed file, by how it begins; `datasets` goes by that, too."""


def _is_tar(start: bytes) -> bool:
    """Return whether a file that starts so is a tar archive."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _tar_sizes(path: Path) -> Iterator[int]:
    """Yield the size of each file in a tar archive; a link counts as the largest before it."""
    largest = 0
    with tarfile.open(path) as archive:
        for member in archive:
            archive.members = []  # or every header would be kept
            _check_member(member.name)
            largest = max(largest, member.size)
            yield VALUE + (member.size if member.isreg() else largest)


def _zip_sizes(path: Path) -> Iterator[int]:
    """Yield the size of each file in a zip archive, of which no more is ever unpacked."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_member(member.filename)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _Unreadable("is compressed in an unusual way: unpack it")
            yield VALUE + member.file_size
            suffix = PurePath(member.filename).suffix.lower()
            if suffix in TEXTS:
                yield _text_size(partial(archive.open, member), suffix)


def _check_member(name: str) -> None:
    """Raise _Unreadable for a file in an archive that is packed once more."""
    if PurePath(name).suffix.lower() in PACKED:
        raise _Unreadable(f"holds {shortened(name)}, which is packed itself: unpack it")
