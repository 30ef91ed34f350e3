"""Text files of rows, opened without harm and read within bounds of memory.

Rows of text are held in memory, and hostile text becomes many times its size there. What a file
would take is estimated before it is read; larger data belong into Parquet, which stays on the disk.
"""

import codecs
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError

MEMORY = 3 * 2**29
"""The most bytes of memory that the rows of text files may take together."""
LONGEST_LINE = 2**27
"""The most characters of a line, and of a cell of a table; images in base64 are long ones."""
BLOCK = 2**20
VALUE = 100
"""Bytes of memory that a value takes in Python beside its characters."""
_WIDE = re.compile(rb"[\xf0-\xff]")
"""What begins a character such as 😀, with which each one of its text takes 4 bytes in memory."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; raises UserError for anything else, and where reading it fails.

    A pipe without a writer would be waited for, and a device may never end.
    """
    irregular = UserError(f"{path} is not a regular file: put one there, or give another path.")
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise irregular
            yield file
    except IsADirectoryError as error:
        raise irregular from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check that it is there, and its "
            "permissions."
        ) from error


def check_memory(paths: Sequence[Path]) -> None:
    """Raise UserError for text files whose rows would take too much memory together."""
    needed = 0
    for path in paths:
        needed += _memory(path, MEMORY - needed)
        if needed > MEMORY:
            raise UserError(
                f"{path} would take more than {MEMORY / 2**30:g} GiB of memory: save it as "
                "Parquet, which stays on the disk, or as several data sets."
            )


def whole_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark; raises UserError if it is none."""
    with opened(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_text(path) from error


def text_lines(path: Path, newline: str) -> Iterator[str]:
    r"""Yield the lines of a file with their ends; `newline` says what ends one, as for `open`.

    Raises UserError for one that is too long and for a file that is no text.
    """
    with opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline=newline)
        number = 0
        try:
            while line := text.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"line {number} of {path} has more than {LONGEST_LINE:,} characters: "
                        "shorten it, or save the data as Parquet."
                    )
                yield line
        except UnicodeDecodeError as error:
            raise _not_text(path) from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without waiting for one who writes into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _memory(path: Path, most: int) -> int:
    """Return an estimate of the memory that a file's rows take; it may stop at more than `most`.

    Raises UserError for a file that is no text.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            return size
        try:
            return text_memory(file, path.suffix.lower(), most)
        except ValueError as error:
            raise _not_text(path) from error


def text_memory(file: BinaryIO, suffix: str, most: int) -> int:
    """Return an estimate of the memory that the rows of an open text file take.

    It may stop at more than `most`. Raises ValueError for what is no text.
    """
    signs = {".csv": b",\n", ".tsv": b"\t\n"}.get(suffix, b",[{")
    copies = 2 if suffix == ".json" else 1  # the whole text of a JSON file is there, too
    needed = 0
    width, length = 1, 0  # of the text that goes on from one block into the next
    while needed <= most and (block := file.read(BLOCK)):
        if b"\0" in block:
            raise ValueError("a text has no zeros")
        needed += copies * len(block) + VALUE * sum(block.count(sign) for sign in signs)
        wider = max(width, _width(block))
        needed += (wider - width) * length + (wider - 1) * len(block)
        width, length = wider, length + len(block)
        if suffix == ".jsonl" and b"\n" in block:
            last = block[block.rindex(b"\n") :]
            width, length = _width(last), len(last)
    return needed


def _width(part: bytes) -> int:
    """Return the bytes that each character of a text takes in memory."""
    return 1 if part.isascii() else 4 if _WIDE.search(part) else 2


def _not_text(path: Path) -> UserError:
    """Return the error for a file that is no text, which names its first bad line."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    with opened(path) as file, suppress(UnicodeDecodeError):
        while (line := file.readline(BLOCK)) and b"\0" not in line:
            decoder.decode(line)
            number += line.endswith(b"\n")
    return UserError(f"line {number} of {path} is not UTF-8 text: save the file as UTF-8.")
