"""Files that hold an encoded image, of which only so much is read as an honest image explains."""

import re
from typing import BinaryIO

CALLS = 200_000
"""How often any image may be read from; each piece that it consists of takes one to three calls."""
SHORTEST = 1024
"""Bytes that an image's pieces have on average, if there are more of them."""
MOST_SCANS = 100
"""The most scans of a JPEG, each of which goes over all pixels; about ten are usual."""
_SCAN = re.compile(b"\xff\xda")
"""What begins a scan, and never stands within one."""


class BoundedFile:
    """An image for Pillow, which raises ValueError where reading it would not come to an end.

    Formats can have millions of empty pieces, name the same megabyte in each of 65,000 places, or
    ask for the same work again and again.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        size = file.seek(0, 2)
        file.seek(0)
        self.calls = CALLS + size // SHORTEST
        self.bytes = 4 * size + 2**24
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, or all that are left."""
        content = self.file.read(size)
        self.calls -= 1
        self.bytes -= len(content)
        if self.calls < 0 or self.bytes < 0:
            raise ValueError("it consists of too many pieces")
        return content

    def count_scans(self) -> None:
        """Raise ValueError for a JPEG of too many scans; it may be anywhere, and stays there."""
        place = self.tell()
        self.seek(0)
        scans, end = 0, b""
        while block := self.file.read(2**20):
            scans += len(_SCAN.findall(end + block))  # bytes.count takes three times as long
            end = block[-1:]
        self.seek(place)
        if scans > MOST_SCANS:
            raise ValueError(f"it has {scans} scans, and more than {MOST_SCANS} are refused")
