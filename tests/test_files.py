"""Files and folders are written whole or not at all, and a kill at any moment loses nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mr1_fast import files
from mr1_fast.errors import UserError
from mr1_fast.files import (
    append_line,
    atomic_folder,
    keep_lines_before,
    restore_folder,
    write_json,
    write_text,
)

KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from mr1_fast.files import atomic_folder

rename, calls = Path.rename, []

def rename_once(self, target):
    if calls:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(target)
    return rename(self, target)

Path.rename = rename_once
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
"""


class Crash(BaseException):
    """What no code handles, as it cannot handle a kill."""


def content(folder):
    """Every file below the folder, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path):
    """A folder with a file `a` of the text `old`."""
    with atomic_folder(tmp_path / "deep" / "folder") as temporary:
        (temporary / "a").write_text("old")
    return tmp_path / "deep" / "folder"


def crash_at_rename(monkeypatch, number):
    """Let Path.rename crash from its `number`-th call on, counted from 1."""
    rename, calls = Path.rename, []

    def broken(self, target):
        calls.append(target)
        if len(calls) >= number:
            raise Crash
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "text"
    write_text(path, "β\n")
    assert path.read_bytes() == "β\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair \ud800")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "text", tmp_path / "deep"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\): call a plumber\.$") as told:
            write_text(wrong, "new", way_out="call a plumber")
        assert str(wrong) in str(told.value) and "\n" not in str(told.value)
    assert content(tmp_path) == {"deep/text": "β\n".encode(), "file": b""}


def test_a_text_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    write_text(tmp_path / "text", "old")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"text cannot be written \(No space left on device\)"):
        write_text(tmp_path / "text", "new")
    assert content(tmp_path) == {"text": b"old"}


def test_json_says_what_to_do(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"text": "β"})
    assert (tmp_path / "deep" / "a.json").read_text() == '{\n "text": "\\u03b2"\n}'
    with pytest.raises(UserError, match=r"deep cannot be written .*: choose another with --output"):
        write_json(tmp_path / "deep", [])


def test_lines_are_appended_and_those_of_later_steps_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_lines_before(path, 2)
    assert not path.exists()
    for step in range(4):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    keep_lines_before(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
    ]
    with pytest.raises(UserError, match=r"cannot be written .*: make room there, then go on with"):
        append_line(tmp_path, {})
    with pytest.raises(UserError, match=r"cannot be written .*: try again\.$"):
        append_line(tmp_path, {}, way_out="try again")


def test_a_folder_is_filled_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert content(tmp_path / "deep") == {"folder/a": b"old"}
    with (
        pytest.raises(UserError, match=r"folder could not be saved \(no room\)"),
        atomic_folder(path) as folder,
    ):
        (folder / "a").write_text("new")
        raise OSError("no room")
    assert content(tmp_path / "deep") == {"folder/a": b"old"}
    with atomic_folder(path) as folder:
        (folder / "b").write_text("new")
    assert content(tmp_path / "deep") == {"folder/b": b"new"}
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="could not be saved"),
        atomic_folder(tmp_path / "file" / "folder"),
    ):
        pass


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(number, folder, monkeypatch):
    rename = Path.rename

    def refused(self, target):
        if self.name.endswith(".partial") or number == 1:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with (
        pytest.raises(UserError, match=r"could not be saved \(no rename\)"),
        atomic_folder(folder) as temporary,
    ):
        (temporary / "a").write_text("new")
    assert content(folder.parent) == {"folder/a": b"old"}


@pytest.mark.parametrize("number", [1, 2])
def test_after_a_crash_at_a_rename_the_old_folder_comes_back(number, folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at_rename(patch, number)
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_text("new")
    assert folder.exists() == (number == 1)
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        assert (folder / "a").read_text() == "old"
        raise ZeroDivisionError
    assert content(folder.parent) == {"folder/a": b"old"}
    with atomic_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    assert content(folder.parent) == {"folder/b": b"new"}


def test_after_a_crash_that_kept_the_old_folder_too_the_new_one_stays(folder, monkeypatch):
    def crash(*paths, **options):
        raise Crash

    with (
        monkeypatch.context() as patch,
        pytest.raises(Crash),
        atomic_folder(folder) as temporary,
    ):
        (temporary / "a").write_text("new")
        patch.setattr(files.shutil, "rmtree", crash)
    (old,) = folder.parent.glob(".folder.*.partial")
    assert content(folder.parent) == {"folder/a": b"new", f"{old.name}/a": b"old"}
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        raise ZeroDivisionError
    assert content(folder.parent) == {"folder/a": b"new"}


def test_a_process_killed_between_the_renames_loses_nothing(folder):
    command = [sys.executable, "-c", KILLED_BETWEEN_THE_RENAMES, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    killed = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (half,) = folder.parent.glob(".folder.*.partial")
    assert content(folder.parent) == {".folder.replaced/a": b"old", f"{half.name}/a": b"new"}
    restore_folder(folder)
    assert content(folder) == {"a": b"old"}
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        raise ZeroDivisionError
    assert content(folder.parent) == {"folder/a": b"old"}
