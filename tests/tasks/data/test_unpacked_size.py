"""Files that unpack to far more than they hold: refused before `datasets` unpacks them."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples, unpacked_size

from ...data.pictures import encoded

MEBI = 2**20
ROW = {"problem": "p", "solution": "1"}
OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


def load(path):
    return load_examples("free", str(path), "train", 0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A bound of 8 MiB, so that bombs are made within milliseconds."""
    monkeypatch.setattr(unpacked_size, "MOST", 8 * MEBI)


@pytest.fixture(autouse=True)
def never_read(request, monkeypatch):
    """For a test of a bomb, let `datasets` fail with another error if it is asked."""
    if "bomb" in request.node.name:

        def fail(*_args, **_kwargs):
            raise AssertionError("read by datasets")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        monkeypatch.setattr(datasets, "load_from_disk", fail)


def assert_refused(path, match="unpacks to more than"):
    with pytest.raises(UserError, match=match) as raised:
        load(path)
    message = str(raised.value)
    assert str(path) in message and len(message) <= 500 and "\n" not in message


def text_table(text, count):
    return pyarrow.table({"problem": [text] * count, "solution": ["1"] * count})


def nested_table(text, count):
    return pyarrow.table({"problem": ["p"], "solution": ["1"], "more": [[[text] * count]]})


def struct_table(text, count):
    return pyarrow.table({"problem": ["p"] * count, "meta": [{"text": text}] * count})


def null_table(_text, count):
    return pyarrow.table({"problem": pyarrow.nulls(10_000 * count, pyarrow.string())})


@pytest.mark.parametrize("table", [text_table, nested_table, struct_table, null_table])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_parquet_bomb(table, in_folder, tmp_path):
    path = tmp_path / "train.parquet"
    parquet.write_table(table("x" * 100_000, 200), path, compression="zstd")
    assert path.stat().st_size < 50_000
    assert_refused(tmp_path if in_folder else path)


def test_a_parquet_bomb_of_shared_prefixes(tmp_path):
    path = tmp_path / "rows.parquet"
    encoding = {"problem": "DELTA_BYTE_ARRAY", "solution": "PLAIN"}
    parquet.write_table(
        text_table("x" * 100_000, 200), path, use_dictionary=False, column_encoding=encoding
    )
    assert path.stat().st_size < 200_000
    assert_refused(path)


def test_a_bomb_that_ends_the_count(monkeypatch, tmp_path):
    monkeypatch.setattr(unpacked_size, "_fault", lambda *_: os.abort())
    path = tmp_path / "rows.parquet"
    parquet.write_table(text_table("x", 1), path)
    assert_refused(path, "does not unpack within bounds .*or crashes")


def write_arrow(path, table, as_file=False):
    new = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("as_file", [False, True])
def test_an_arrow_bomb(as_file, tmp_path):
    path = tmp_path / "rows.arrow"
    write_arrow(path, text_table("x" * 100_000, 200), as_file)
    assert_refused(path)


def test_an_arrow_bomb_of_views(tmp_path):
    path = tmp_path / "rows.arrow"
    view = pyarrow.array(["x" * 100_000], pyarrow.string_view())
    buffers = [None, pyarrow.py_buffer(view.buffers()[1].to_pybytes() * 200), view.buffers()[2]]
    views = pyarrow.Array.from_buffers(pyarrow.string_view(), 200, buffers)
    write_arrow(path, pyarrow.table({"problem": views}))
    assert_refused(path)


def test_a_bomb_that_save_to_disk_could_have_written(tmp_path):
    datasets.Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", "rows.json"))
    write_arrow(tmp_path / "saved" / "rows.json", text_table("x" * 100_000, 200))
    with pytest.raises(UserError, match="unpacks to more than"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("kind", OPENERS)
def test_a_compressed_bomb(kind, tmp_path):
    with OPENERS[kind](tmp_path / f"train.jsonl.{kind}", "wb") as file:
        file.write((json.dumps({**ROW, "more": "x" * 99_000}) + "\n").encode() * 200)
    with pytest.raises(UserError, match=r"train.jsonl.* unpacks to more than"):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_bomb_for_memory(zipped, monkeypatch, tmp_path):
    monkeypatch.setattr(unpacked_size, "MOST", 2**40)
    text = b"[" + b"{}," * (8 * MEBI) + b"{}]"
    if zipped:
        write_zip(tmp_path / "train.zip", {"rows.json": text})
    else:
        (tmp_path / "train.json.gz").write_bytes(gzip.compress(text, 1))
    with pytest.raises(UserError, match=r"more than 1\.5 GiB of memory"):
        load(tmp_path)


def test_a_bomb_of_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(unpacked_size, "LONGEST_LINE", 2 * MEBI)
    with gzip.open(tmp_path / "train.jsonl.gz", "wb") as file:
        file.write(json.dumps({**ROW, "more": "x" * (4 * MEBI)}).encode())
    with pytest.raises(UserError, match="has a line of more than"):
        load(tmp_path)


def write_zip(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_zip_bomb(tmp_path):
    write_zip(tmp_path / "train.zip", {"rows.jsonl": b"x" * (16 * MEBI)})
    with pytest.raises(UserError, match=r"train.zip unpacks to more than"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name, kind, match",
    [
        ("metadata.parquet", zipfile.ZIP_DEFLATED, "holds metadata.parquet, which is packed"),
        ("a.jsonl.gz", zipfile.ZIP_DEFLATED, "holds a.jsonl.gz, which is packed"),
        ("rows.jsonl", zipfile.ZIP_LZMA, "unusual way"),
    ],
)
def test_a_zip_that_could_hide_a_bomb(name, kind, match, tmp_path):
    write_zip(tmp_path / "train.zip", {"rows.jsonl": json.dumps(ROW), name: b"{}"}, kind)
    with pytest.raises(UserError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_tar_bomb(mode, tmp_path):
    with tarfile.open(tmp_path / f"train.tar.{mode[2:]}", mode) as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 16 * MEBI
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(UserError, match="unpacks to more than"):
        load(tmp_path)


def test_an_archive_that_cannot_be_counted_may_be_a_bomb(tmp_path):
    (tmp_path / "train.jsonl.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99))
    with pytest.raises(UserError, match="contents cannot be counted: unpack it"):
        load(tmp_path)


def test_a_sparse_tar_bomb(tmp_path):
    member = tarfile.TarInfo("a.json")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 2**32  # the size with its holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "train.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UserError, match="unpacks to more than"):
        load(tmp_path)


def test_honest_tables_pass(tmp_path):
    images = [{"bytes": os.urandom(200_000), "path": "a.png"} for _ in range(100)]
    table = pyarrow.table(
        {
            "problem": [f"How many? {index}" for index in range(100)],
            "system": ["Think." * 500] * 100,
            "images": [[each] for each in images],
            "solution": ["1"] * 100,
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert len(load(tmp_path / "rows.parquet")) == 100
    write_arrow(tmp_path / "rows.arrow", table.select(["problem", "system", "solution"]))
    assert len(load(tmp_path / "rows.arrow")) == 100


def test_what_is_in_the_cache_is_not_counted_again(monkeypatch, tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(text_table("q", 9), path)
    assert len(load(path)) == 9
    monkeypatch.setattr(unpacked_size, "MOST", 0)
    monkeypatch.setattr(unpacked_size, "TIMES", 0)
    assert len(load(path)) == 9


@pytest.mark.parametrize("kind", OPENERS)
def test_honest_compressed_lines_pass(kind, tmp_path):
    with OPENERS[kind](tmp_path / f"train.jsonl.{kind}", "wb") as file:
        file.write((json.dumps(ROW) + "\n").encode() * 9)
    assert len(load(tmp_path)) == 9


def test_honest_images_in_an_archive_pass(tmp_path):
    lines = json.dumps({"file_name": "a.png", **ROW})
    write_zip(
        tmp_path / "train.zip",
        {"a.png": encoded(Image.new("RGB", (8, 8))), "metadata.jsonl": lines},
    )
    assert len(load(tmp_path)) == 1
