"""Files that hold an encoded image, of which only so much is read as an honest image explains."""

import re
from collections.abc import Iterator
from typing import BinaryIO

CALLS = 200_000
"""How often any image may be read from; each piece that it consists of takes one to three calls."""
SHORTEST = 1024
"""Bytes that an image's pieces have on average, if there are more of them."""
MOST_SCANS = 100
"""The most scans of a JPEG, each of which goes over all pixels; about ten are usual."""
MOST_PARTS = 10_000
"""The most parts of a JPEG, which are its scans, tables and texts; texts have up to 64 KiB."""
BLOCK = 2**16
_PART = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""What begins a part, and never stands within the data of a scan; libjpeg looks for the same."""
_SCAN, _END = b"\xff\xda", b"\xff\xd9"


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
        scans = 0
        for number, part in enumerate(self._parts()):
            scans += part == _SCAN
            if scans > MOST_SCANS or number > MOST_PARTS:
                raise ValueError(f"it has more than {MOST_SCANS} scans or {MOST_PARTS:,} parts")
        self.seek(place)

    def _parts(self) -> Iterator[bytes]:
        """Yield what begins each part of a JPEG, up to the end of its first image.

        What a part holds is skipped, such as a preview, and so is what follows the image: phones
        put a video there. In either, anything may look like a scan.
        """
        place = 0
        while len(block := self._at(place, BLOCK)) > 1:
            found = _PART.search(block)
            if found is None:
                place += len(block) - 1  # the last byte may begin a part
                continue
            if found[0] == _END:
                return
            yield found[0]
            place += found.end()
            place += max(2, int.from_bytes(self._at(place, 2)))

    def _at(self, place: int, size: int) -> bytes:
        """Return up to `size` bytes from a place of the file, which do not count."""
        self.seek(place)
        return self.file.read(size)
