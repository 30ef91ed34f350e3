"""Pixels of every mode and depth become upright 8-bit RGB; other formats and bombs are refused."""

import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from mr1_fast.tasks.data import pixels
from mr1_fast.tasks.data.pixels import MOST_PIXELS, TURNS, open_image, to_rgb, upright_size

from ...data.pictures import in_format, noise

RAMP = np.linspace(0, 65535, 64)


def gray(array):
    """The first row of an array's levels after they have been read."""
    return np.asarray(to_rgb(Image.fromarray(array)))[0, :, 0].tolist()


def opened(content):
    return open_image(io.BytesIO(content))


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_in_every_format(name):
    ramp = Image.fromarray(np.tile(RAMP.astype(np.uint16), (64, 1)))
    image = to_rgb(opened(in_format(ramp, name)))
    levels = np.asarray(image)[0]
    assert np.abs(levels - (RAMP / 257)[:, None]).max() <= 1 and image.mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_of_every_byte_order(mode):
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (64, 1), RAMP.astype(f"{order}u2").tobytes())
    levels = [to_rgb(image).getpixel((x, 0))[0] for x in (0, 16, 32, 63)]
    assert np.abs(np.array(levels) - [0, 65, 130, 255]).max() <= 1


def test_a_dark_sixteen_bit_image_is_not_stretched():
    assert gray(np.full((1, 2), 257 * 3, np.uint16)) == [3, 3]


@pytest.mark.parametrize(
    "levels, expected",
    [
        ([0, 1, 100, 255], [0, 1, 100, 255]),  # already 8 bits
        ([0, 0, 1, 1], [0, 0, 255, 255]),  # a mask
        ([0, 500, 1000, 500], [0, 128, 255, 128]),
        ([-1000, 0, 1000, 3000], [0, 64, 128, 255]),  # Hounsfield units
        ([7000, 7000, 7000, 7000], [0, 0, 0, 0]),
        ([-(2**31), 0, 0, 2**31 - 1], [0, 128, 128, 255]),
    ],
)
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_other_integers_and_fractions_by_their_range(levels, expected, kind):
    array = np.array([levels]).astype(kind)
    image = to_rgb(opened(in_format(Image.fromarray(array), "TIFF")))
    assert np.abs(np.asarray(image)[0, :, 0].astype(int) - expected).max() <= 1


def test_fractions_that_are_no_numbers():
    inf, nan = np.inf, np.nan
    assert gray(np.array([[0, 0.5, 1, nan]], np.float32)) == [0, 128, 255, 0]
    assert gray(np.array([[10, 20, 310, nan, inf, -inf]], np.float32)) == [0, 8, 255, 0, 255, 0]
    assert gray(np.array([[nan, nan]], np.float32)) == [0, 0]
    assert gray(np.array([[-3e38, 0, 3e38]], np.float32)) == [0, 128, 255]


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("1", (9, 9), 1), (255, 255, 255)),
        (Image.new("L", (9, 9), 90), (90, 90, 90)),
        (Image.new("LA", (9, 9), (10, 0)), (255, 255, 255)),
        (Image.new("LA", (9, 9), (10, 255)), (10, 10, 10)),
        (Image.new("RGB", (9, 9), (1, 2, 3)).quantize(), (1, 2, 3)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (9, 9), (100, 128, 128)), (100, 100, 100)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode(image, expected):
    assert to_rgb(image).getpixel((4, 4)) == expected


@pytest.mark.parametrize(
    "content",
    [
        in_format(Image.new("P", (9, 9)), "PNG", transparency=0),
        in_format(Image.new("P", (9, 9)), "GIF", transparency=0),
        in_format(Image.new("RGB", (9, 9)), "PNG", transparency=(0, 0, 0)),
        in_format(Image.new("I;16", (9, 9), 500), "PNG", transparency=500),
    ],
    ids=["palette", "GIF", "colour", "16 bits"],
)
def test_a_transparent_colour_turns_white(content):
    assert to_rgb(opened(content)).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_with_and_without_decoding(name, orientation):
    image, exif = Image.new("RGB", (48, 24), "blue"), Image.Exif()
    image.paste("red", (0, 0, 24, 8))
    exif[0x0112] = orientation
    content = in_format(image, name, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    read = to_rgb(opened(content))
    assert read.tobytes() == expected.tobytes() and read.size == expected.size
    assert upright_size(opened(content)) == expected.size
    assert (read.size == (24, 48)) == (5 <= orientation <= 8 and orientation in TURNS)


def test_an_orientation_behind_the_pixels():
    """Programs that add one to a PNG file may write it there; only decoding finds it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = in_format(Image.new("RGB", (48, 24)), "PNG")
    end = content.index(b"IEND") - 4
    content = content[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + content[end:]
    assert to_rgb(opened(content)).size == (24, 48) and upright_size(opened(content)) == (48, 24)


def test_deep_levels_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    image = to_rgb(opened(in_format(deep, "PNG", exif=exif)))
    assert image.size == (1, 2) and image.getpixel((0, 1)) == (255, 255, 255)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense" * 9])
def test_broken_exif_data_spoils_no_image(exif):
    content = in_format(noise(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the broken data
        assert to_rgb(opened(content)).size == upright_size(opened(content)) == (80, 80)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_every_format(name):
    content = in_format(Image.new("RGB", (40, 40), (200, 0, 0)), name)
    red, green, blue = to_rgb(opened(content)).getpixel((20, 20))
    assert red > 190 and green < 10 and blue < 10


def test_the_first_frame_of_a_moving_image():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    content = in_format(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(opened(content)).getpixel((4, 4)) == (255, 0, 0)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n"


def test_no_format_starts_a_program(tmp_path, monkeypatch):
    """With Ghostscript on the PATH, Pillow would run it for a file of any name."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="not an image in one of the formats PNG, JPEG"):
        to_rgb(opened(EPS))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"<svg/>", b"<html>404</html>", b"%PDF-1.7", bytes(4096)]
)
def test_what_is_no_image(content):
    with pytest.raises(ValueError, match="not an image"):
        opened(content)


def chunk(kind, data):
    """A part of a PNG file."""
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png_of(width, height):
    """A PNG that says it has this size and holds next to nothing."""

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9_500, 9_500), (20_000, 20_000), (2**30, 2**30)])
def test_too_many_pixels_are_refused_without_a_warning(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
            opened(png_of(*size))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_file_has_a_size_but_no_pixels(name):
    content = in_format(noise(), name)
    half = content[: len(content) // 2]
    if name not in ("TIFF", "WEBP"):  # these have their header at the end, or need all for it
        assert upright_size(opened(half)) == (80, 80)
    with pytest.raises((OSError, ValueError)):
        to_rgb(opened(half))


@pytest.mark.parametrize("name", ["PPM", "JPEG2000", "AVIF", "ICO", "PCX", "TGA", "SGI", "DDS"])
def test_formats_that_are_not_needed_are_not_read(name):
    """Each is a decoder more that hostile data could choose, whatever the file is called."""
    try:
        content = in_format(noise(), name)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {name}")
    with pytest.raises(ValueError, match="not an image in one of the formats PNG, JPEG"):
        opened(content)


def test_deep_levels_are_scaled_in_bands_as_at_once(monkeypatch):
    levels = np.random.default_rng(0).normal(0, 1e6, (70, 50)).astype(np.float32)
    levels[3, 4], levels[60, 1], levels[0, 0] = np.nan, np.inf, -np.inf
    whole = to_rgb(Image.fromarray(levels))
    monkeypatch.setattr(pixels, "BAND", 333)
    assert to_rgb(Image.fromarray(levels)).tobytes() == whole.tobytes()


def test_threads_decode_only_what_fits_into_memory_together():
    turns, running, most = pixels._Turns(), [], []

    def decode(pixels_):
        with turns.of(pixels_):
            running.append(min(pixels_, MOST_PIXELS))
            most.append(sum(running))
            time.sleep(0.002)
            running.remove(min(pixels_, MOST_PIXELS))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [MOST_PIXELS // 3, 10 * MOST_PIXELS, MOST_PIXELS // 2, 1] * 10))
    assert MOST_PIXELS // 2 < max(most) <= MOST_PIXELS and turns.left == MOST_PIXELS
