"""Images whose reading would not come to an end, each in a small file."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from mr1_fast.tasks.data.bounded_file import MOST_SCANS, BoundedFile
from mr1_fast.tasks.data.pixels import FORMATS, open_image, to_rgb

from ...data.pictures import in_format, noise
from .test_pixels import chunk, png_of

SCAN = b"\xff\xda"


def read(content):
    return to_rgb(open_image(io.BytesIO(content)))


def png_with(*chunks):
    content = png_of(10, 10)
    place = content.index(b"IDAT") - 4
    return content[:place] + b"".join(chunks) + content[place:]


def tiff_of_many_tags():
    """A TIFF whose 5,000 tags all have the same 900,000 bytes."""
    entry = struct.pack("<HII", 2, 900_000, 8)
    tags = b"".join(struct.pack("<H", number) + entry for number in range(5_000))
    return b"II*\0" + struct.pack("<IH", 8, 5_000) + tags + bytes(1_000_000)


def jpeg_of_many_scans(before=b""):
    content = in_format(Image.new("RGB", (40, 40)), "JPEG", progressive=True)
    last = content.rindex(SCAN)
    return content[:-2] + before + content[last:-2] * 5000 + b"\xff\xd9"


def jpeg_of_many_comments():
    content = in_format(Image.new("RGB", (40, 40)), "JPEG", progressive=True)
    return content[:-2] + b"\xff\xfe\0\2" * 400_000 + b"\xff\xd9"


def gif_of_many_comments():
    content = in_format(noise().quantize(), "GIF")
    place = content.index(b",\0\0\0\0")
    return content[:place] + b"!\xfe\x01x\0" * 300_000 + content[place:]


BOMBS = {
    "PNG of empty chunks": (png_with(chunk(b"abCd", b"") * 300_000), "too many pieces"),
    "PNG of text": (png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))), "too large"),
    "PNG with a profile": (
        png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8)))),
        "too large",
    ),
    "PNG of many texts": (
        png_with(
            *(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(9 * 10**5))) for i in range(99))
        ),
        "Too much memory",
    ),
    "GIF of comments": (gif_of_many_comments(), "too many pieces"),
    "TIFF of tags": (tiff_of_many_tags(), "too many pieces|not an image"),
    "JPEG of scans": (jpeg_of_many_scans(), "more than 100 scans"),
    "JPEG of hidden scans": (jpeg_of_many_scans(b"\xff\x02\xff\xff"), "more than 100 scans"),
    "JPEG of comments": (jpeg_of_many_comments(), "or 10,000 parts"),
}


@pytest.mark.parametrize("content, message", BOMBS.values(), ids=BOMBS)
def test_reading_ends(content, message):
    start = time.monotonic()
    with pytest.raises((ValueError, OSError), match=message):
        read(content)
    assert len(content) < 4_000_000 and time.monotonic() - start < 30


def test_usual_images_are_far_from_the_bounds():
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        content = in_format(noise().resize((900, 900)), name)
        file = BoundedFile(io.BytesIO(content))
        calls, size = file.calls, file.bytes
        Image.open(file, formats=FORMATS).load()
        assert calls - file.calls < 2000 and size - file.bytes < 3 * len(content)
    content = in_format(noise(), "JPEG", progressive=True)
    assert 5 < content.count(SCAN) < MOST_SCANS // 5 and read(content).size == (80, 80)


def test_what_looks_like_scans_in_a_preview_or_behind_the_image_is_none():
    """Phones put a video behind a photo, whose bytes are as good as random."""
    content = in_format(noise(), "JPEG", progressive=True)
    preview = b"\xff\xe1\xff\xff" + (SCAN + b"\xff\xd9") * 2**14
    assert read(content[:2] + preview[: 2**16 + 1] + content[2:] + SCAN * 200).size == (80, 80)


def test_every_compression_of_tiff_is_read():
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        content = in_format(noise(), "TIFF", compression=compression)
        assert read(content).size == (80, 80)
