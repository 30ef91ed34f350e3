"""Text files of rows: regular ones alone, within bounds of memory, and bad text by its line."""

import os
import socket
import time

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples
from mr1_fast.tasks.data import text_files as module
from mr1_fast.tasks.data.text_files import check_memory, text_lines, whole_text

SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")


def load(path, split="train"):
    return load_examples("free", str(path), split, 0)


def put(kind, path):
    """Put something at a path that is no file of rows."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as open_socket:
            open_socket.bind(os.path.relpath(path))  # longer names are refused
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "link to itself", "/dev/zero", "/dev/stdin", "/dev/tty", "folder"]
)
def test_what_is_no_regular_file_is_refused_at_once(kind, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"d.{suffix}"
    put(kind, path)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"neither a regular file nor a folder|is empty") as raised:
        load(path)
    assert time.monotonic() - start < 20 and len(str(raised.value)) < 500
    # A reader that gets the path itself, as of a file that is replaced meanwhile, does not wait.
    for read in (
        whole_text,
        lambda path: list(text_lines(path, "\n")),
        lambda p: check_memory([p]),
    ):
        with pytest.raises(UserError, match=r"not a regular file|cannot be read"):
            read(path)


@pytest.mark.parametrize("suffix", SUFFIXES[:4])
def test_a_file_with_a_hole_is_refused_before_it_is_read(suffix, tmp_path):
    with open(tmp_path / f"d.{suffix}", "wb") as file:
        file.truncate(3 * 2**30)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"would take more than 1.5 GiB .*: save it as Parquet"):
        load(tmp_path / f"d.{suffix}")
    assert time.monotonic() - start < 5


def test_files_of_a_split_keep_the_bound_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", 1000)
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        (tmp_path / name).write_text('{"problem": "p", "solution": "' + "3" * 400 + '"}')
    assert load(tmp_path / name).all(1)
    with pytest.raises(UserError, match=r"train-00001.* would take more than .* of memory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("d.json", "[" + "[]," * 60_000 + "1]"),
        ("d.jsonl", "[" + "{}," * 60_000 + "1]"),
        ("d.csv", "," * 120_000),
        ("d.tsv", "\n" * 120_000),
        ("d.json", '["' + "a" * 9_000_000 + '"]'),
        ("d.jsonl", '["' + "a" * 3_900_000 + '😀"]'),  # with which each character takes 4 bytes
        ("d.jsonl", '["' + "a" * 7_900_000 + 'é"]'),
    ],
)
def test_memory_is_estimated_by_values_and_by_the_width_of_characters(
    name, content, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "MEMORY", 10_000_000)
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match="of memory: save it as Parquet"):
        check_memory([path])
    path.write_text(content[: len(content) // 5])
    check_memory([path])


@pytest.mark.parametrize("name, newline", [("d.jsonl", "\n"), ("d.csv", "")])
def test_a_line_without_an_end_is_named(name, newline, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    (tmp_path / name).write_text("a\n" + "b" * 1000 + "\n" + "c" * 1001)
    lines = text_lines(tmp_path / name, newline)
    assert next(lines) == "a\n"
    with pytest.raises(UserError, match=r"line 2 of .* has more than 1,000 characters"):
        list(lines)


@pytest.mark.parametrize("suffix", SUFFIXES[:4])
@pytest.mark.parametrize(
    "content, line",
    [
        (b'{"a": 1}\n{"a": "\0"}', 2),
        (b"\n" * 70_000 + b"a\xff", 70_001),
        ('{"a": "é"}'.encode("utf-16"), 1),
        (
            b'{"a":"' + b"a" * (2**20 - 7) + 'é"}\n\n'.encode() + b"\xc3",
            3,
        ),  # a block ends inside of a letter
        (bytes(5000), 1),
        (b"\x1f\x8b\x08\x00", 1),  # gzip
        (b"PK\x03\x04\x14\x00", 1),  # zip, and what torch.save writes
        (b"\x80\x04\x95\x1f", 1),  # a pickle
    ],
)
def test_what_is_no_text_is_named_with_its_line(content, line, suffix, tmp_path):
    (tmp_path / f"d.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"line {line} of .* is not UTF-8 text: save"):
        load(tmp_path / f"d.{suffix}")


def test_a_table_of_an_old_mac(tmp_path):
    (tmp_path / "d.csv").write_bytes("\ufeffproblem,solution\rp,3\r".encode())
    assert load(tmp_path / "d.csv").all(1)[0].problem == "p"
