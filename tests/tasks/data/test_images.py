"""Cells of data that hold images in every form, and cells that hold none."""

import base64
import datetime
import io
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import LoadedExamples, images, load_examples
from mr1_fast.tasks.data.images import ImageReader, as_list, image_path

from ...data.pictures import ROW, colour, encoded, in_format, noise, picture, write_lines

PNG = encoded(picture(1))
TEXT = base64.b64encode(PNG).decode()
# Its base64 has the letters in which the two alphabets differ.
SNOW = encoded(noise())
LONG = base64.b64encode(SNOW).decode()


def reader(root, **settings):
    return ImageReader(root, **settings)


@pytest.fixture
def root(tmp_path):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "img").mkdir()
    picture(1).save(tmp_path / "img" / "a.png")
    return tmp_path


def test_a_list_of_images():
    assert as_list(None) == [] and as_list([]) == []
    assert as_list("a.png") == ["a.png"] and as_list(["a.png", "b.png"]) == ["a.png", "b.png"]
    assert as_list({"path": "a.png"}) == [{"path": "a.png"}] and as_list(("a",)) == ("a",)
    assert as_list('["a.png"]') == ['["a.png"]']


CELLS = {
    "path": "a.png",
    "Windows path": "img\\a.png",
    "file address": "file://{root}/a.png",
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "base64": TEXT,
    "base64 in lines": "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\r\n",
    "base64 without padding": TEXT.rstrip("="),
    "data address": "data:image/png;base64," + TEXT,
    "data address with a parameter": "DATA:image/png;name=a.png;base64, " + TEXT,
    "data address, quoted": "data:image/png;base64," + TEXT.replace("+", "%2B").replace("=", "%3D"),
    "data address in percents": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    "dictionary of bytes": {"bytes": PNG, "path": None},
    "dictionary of bytes with a name": {"bytes": PNG, "path": "not-here.png"},
    "dictionary of base64": {"bytes": TEXT, "path": None},
    "dictionary of a data address": {"bytes": "data:image/png;base64," + TEXT},
    "dictionary of a path": {"path": "a.png"},
    "dictionary of a path without bytes": {"bytes": None, "path": "a.png"},
    "dictionary of a path with empty bytes": {"bytes": b"", "path": "a.png"},
    "part of a chat": {"type": "image", "image": "a.png"},
    "part of a chat with bytes": {"type": "image", "image": {"bytes": PNG, "path": None}},
    "part with a url": {"type": "image", "url": "file://{root}/a.png"},
    "OpenAI's part": {"type": "image_url", "image_url": {"url": "data:image/png;base64," + TEXT}},
    "OpenAI's part, flat": {"type": "image_url", "image_url": "data:image/png;base64," + TEXT},
    "PIL": picture(1),
    "PIL in a dictionary": {"image": picture(1)},
    "array": np.asarray(picture(1)),
}


def filled(cell, root):
    """The cell with the name of the folder."""
    if isinstance(cell, dict):
        return {key: filled(value, root) for key, value in cell.items()}
    return cell.replace("{root}", str(root)) if isinstance(cell, str) else cell


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_form_of_a_cell(cell, fenced, root):
    cell = filled(cell, root)
    image = reader(root, fenced=fenced).read(cell, "row 1 of d")
    assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (28, 28), colour(1))
    assert reader(root, fenced=fenced).header(cell, "row 1 of d") == (28, 28)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        LONG.rstrip("="),
        LONG.replace("+", "-").replace("/", "_"),
        " \n".join(LONG[i : i + 60] for i in range(0, len(LONG), 60)),
        base64.b64encode(in_format(noise(), "JPEG")).decode(),  # begins with /, as a path does
        base64.b64encode(in_format(noise(), "BMP")).decode(),
    ],
    ids=["whole", "unpadded", "urlsafe", "spaced", "JPEG", "BMP"],
)
@pytest.mark.parametrize("fenced", [False, True])
def test_long_base64_is_no_path(text, fenced, root):
    assert reader(root, fenced=fenced).read(text, "row 1 of d").size == (80, 80)
    assert reader(root, fenced=fenced).read({"bytes": text}, "row 1 of d").size == (80, 80)
    assert len(SNOW) > 4096 and {"+", "/"} < set(LONG)


def test_a_file_comes_before_base64(root):
    """A name may have the letters of base64 alone."""
    picture(2).save(root / "abcd", "PNG")
    assert reader(root).read("abcd", "row 1").getpixel((0, 0)) == colour(2)
    with pytest.raises(UserError, match=r"image file .*/abce \(row 1\) is missing"):
        reader(root).read("abce", "row 1")


def deep(cell, times):
    for _ in range(times):
        cell = {"image": cell}
    return cell


HOSTILE = {
    "number": (7, "neither a path nor encoded bytes .*int"),
    "fraction": (float("nan"), "neither a path nor encoded bytes .*float"),
    "true": (True, "neither a path nor encoded bytes .*bool"),
    "date": (datetime.date(2026, 1, 1), "neither a path nor encoded bytes .*date"),
    "nothing": (None, "neither a path nor encoded bytes"),
    "list": ([["a.png"]], "neither a path nor encoded bytes .*list"),
    "pixels": ([[0, 1], [2, 3]], "neither a path nor encoded bytes .*list"),
    "empty dictionary": ({}, "neither a path nor encoded bytes"),
    "other keys": ({"height": 3, "k" * 999: 1}, "dictionary with the keys height, kkk"),
    "dictionary of nothing": ({"bytes": None, "path": None}, "dictionary with the keys bytes"),
    "list in a dictionary": ({"bytes": [1, 2, 3]}, "neither a path nor encoded bytes"),
    "deep": (deep("a.png", 100_000), "neither a path nor encoded bytes"),
    "empty text": ("", "an empty text"),
    "blank": (" \n", "an empty text"),
    "empty bytes": (b"", "cannot be decoded .*not an image"),
    "bytes of text": (b"hello", "cannot be decoded .*not an image"),
    "10 MB of text": ("word, " * 2_000_000, "neither the path of a file nor base64"),
    "10 MB in one word": ("a" * 10_000_000, "cannot be decoded .*not an image"),
    "10 MB of folders": ("a/" * 5_000_000, "cannot be decoded .*not an image"),
    "10 MB of padding": ("=" * 10_000_000, "cannot be decoded .*not an image"),
    "NUL": ("a\0.png", r"a\\x00.png"),
    "NULs": ("\0" * 10_000, "neither the path of a file nor base64"),
    "half a surrogate": ("\ud800.png", "neither the path of a file nor base64"),
    "half a surrogate in data": ("data:,\ud800", "cannot be decoded .*not an image"),
    "data alone": ("data:", "data: address without readable content"),
    "data without content": ("data:image/png;base64,", "data: address without readable content"),
    "data of another kind": ("data:image/png;base64,ä", "data: address without readable content"),
    "data of text": ("data:text/plain,hello", "cannot be decoded .*not an image"),
    "10 MB of data": ("data:" + "%" * 10_000_000, "data: address without readable content"),
    "a picture in words": ("data:image/svg+xml,<svg/>", "cannot be decoded .*not an image"),
    "bytes that are a path": ({"bytes": "a.png"}, "neither bytes nor base64 .*call it 'path'"),
    "bytes that are an address": ({"bytes": "http://127.0.0.1/a.png"}, "neither bytes nor base64"),
    "a file that is no image": ("file:///etc/passwd", r"/etc/passwd \(row 3 of d\) cannot be dec"),
    "zeros": ("/dev/zero", "is not a regular file"),
    "zeros by address": ("file:///dev/zero", "is not a regular file"),
    "folder": ("img", "is not a regular file"),
    "pipe": ("pipe.png", "is not a regular file"),
    "address": ("http://127.0.0.1:9/a.png", "nothing is downloaded without --allow-urls"),
    "address in capitals": ({"url": " HTTPS://x/a.png"}, "without --allow-urls"),
    "ftp": ("ftp://127.0.0.1/a.png", "is missing"),
    "Windows drive": ("C:\\data\\a.png", "is missing"),
    "long name": ("x" * 300 + ".png", "neither the path of a file nor base64"),
    "prose": ("the image shows a cat. " * 100, "neither the path of a file nor base64|is missing"),
    "array of text": (np.array(["a"]), "cannot be decoded"),
    "array of objects": (np.array([None]), "cannot be decoded"),
}


@pytest.mark.parametrize("cell, message", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("what", ["read", "header"])
def test_a_cell_that_holds_no_image_is_one_short_sentence(cell, message, what, root):
    os.mkfifo(root / "pipe.png")
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as raised:
        getattr(reader(root), what)(cell, "row 3 of d")
    text = str(raised.value)
    assert "row 3 of d" in text and text.isprintable() and text.endswith(".")
    assert len(text) < 400 + 2 * len(str(root)) and time.monotonic() - start < 5


def test_nothing_outside_the_image_root_is_read(root):
    outside = root.parent / "secret.png"
    picture(3).save(outside)
    within = reader(root, fenced=True)
    for cell in (str(outside), "../secret.png", {"path": "..\\secret.png"}, f"file://{outside}"):
        assert reader(root).read(cell, "row 1").size == (28, 28)
        with pytest.raises(UserError, match=r"\(row 1\) is outside .*--image-root"):
            within.read(cell, "row 1")


def test_image_root_of_the_user_is_a_fence(root):
    outside = root.parent / "secret.png"
    picture(3).save(outside)
    data = write_lines(root / "d.jsonl", [ROW | {"image": str(outside)}])
    assert load_examples("free", data, "train", 0).all(1)[0].images[0].getpixel((0, 0)) == colour(3)
    with pytest.raises(UserError, match="which no path may leave"):
        load_examples("free", data, "train", 0, image_root=str(root)).all(1)


def test_header_sees_no_pixels_but_read_does(root):
    (root / "cut.png").write_bytes(SNOW[:3000])
    assert reader(root).header("cut.png", "row 1") == (80, 80)
    with pytest.raises(UserError, match=r"image file .*cut.png \(row 1\) cannot be decoded"):
        reader(root).read("cut.png", "row 1")


def test_a_file_is_closed_and_an_image_of_the_user_stays_open(root):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        reader(root).read("a.png", "row 1")
        reader(root).header("a.png", "row 1")
    assert len(os.listdir("/proc/self/fd")) == before
    image = Image.open(root / "a.png")
    assert reader(root).header(image, "row 1") == (28, 28)
    assert reader(root).read(image, "row 1").size == image.copy().size


def test_only_the_path_of_an_image_is_its_key(root):
    assert image_path("a.png") == "a.png" and image_path({"path": "a.png"}) == "a.png"
    assert image_path({"bytes": PNG, "path": "a.png"}) == "a.png"
    assert image_path({"type": "image_url", "image_url": {"url": "http://x/a"}}) == "http://x/a"
    for cell in (None, 3, PNG, LONG, "data:,a", {"bytes": LONG}, {"bytes": TEXT}, picture(1), {}):
        assert image_path(cell) is None
    rows = [ROW | {"image": cell} for cell in (LONG, ["a.png", PNG])]
    examples = LoadedExamples(rows, "rows", 0, image_root=root).all(2)
    assert [item.key for item in examples] == ["row 1", "a.png"]


@pytest.fixture
def case(tmp_path):
    """The folder, the row and the function of the cases that users met."""
    Image.new("RGB", (56, 56), (200, 30, 40)).save(tmp_path / "a.png")

    def load(name, content, split="train"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return load_examples("geometry", str(tmp_path / name), split, 0).all(9)

    return tmp_path, {"image": "a.png", "problem": "How many?", "solution": "3"}, load


def test_case_12_base64_and_uris(case):
    folder, row, load = case
    text = LONG
    for cell in (
        text,
        "data:image/png;base64," + text,
        {"bytes": text, "path": None},
        f"file://{folder}/a.png",
        {"image": "a.png"},
    ):
        assert len(load("d.jsonl", json.dumps(row | {"image": cell}))[0].images) == 1


def test_case_13_sixteen_bit_images():
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1)))
    file = io.BytesIO()
    ramp.save(file, "PNG")
    rows = [{"image": file.getvalue(), "problem": "?", "solution": "1"}]
    image = LoadedExamples(rows, "rows", 0).all(1)[0].images[0]
    levels = [image.getpixel((x, 0))[0] for x in (0, 16, 32, 63)]
    assert max(abs(a - b) for a, b in zip(levels, (0, 65, 130, 255), strict=True)) <= 2


def test_case_25_windows_paths(case):
    folder, row, load = case
    (folder / "img").mkdir()
    Image.new("RGB", (56, 56)).save(folder / "img" / "a.png")
    assert load("d.jsonl", json.dumps(row | {"image": "img\\a.png"}))[0].images


def test_the_images_of_a_row_have_a_bound_together(root, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 3 * 28 * 14)
    assert len(reader(root).read_all(["a.png", PNG, TEXT], "row 1 of d")) == 3
    with pytest.raises(
        UserError, match=r"row 1 of d cannot be decoded \(the images of a row have at most"
    ):
        reader(root).read_all(["a.png", PNG, TEXT, PNG], "row 1 of d")


@pytest.mark.parametrize("form", ["file", "bytes", "base64", "data"])
def test_an_eps_of_any_form_starts_no_program(form, root, monkeypatch):
    program = root / "gs"
    program.write_text(f"#!/bin/sh\ntouch {root}/started\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(root), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n"
    (root / "eps.png").write_bytes(eps)
    in_base64 = base64.b64encode(eps * 20).decode()
    cell = {"file": "eps.png", "bytes": eps, "base64": in_base64, "data": "data:," + eps.decode()}
    with pytest.raises(UserError, match="not an image in one of the formats"):
        reader(root).read(cell[form], "row 1 of d")
    assert not (root / "started").exists()
