"""Files and folders are written whole or not at all, and a kill at any moment loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mr1_fast import files
from mr1_fast.errors import Stopped, UserError
from mr1_fast.file_kinds import is_no_folder
from mr1_fast.files import (
    append_line,
    atomic_folder,
    discard_folder,
    restore_folder,
    sweep,
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

WRITES_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from mr1_fast.files import atomic_folder

for turn in range(int(sys.argv[3])):
    with atomic_folder(Path(sys.argv[1]), first_wins=sys.argv[4] == "first wins") as folder:
        for name in range(5):
            (folder / str(name)).write_text(f"{sys.argv[2]} {turn}")
    print("ok", flush=True)
"""
WAITS_BETWEEN_THE_RENAMES = """
import sys
from pathlib import Path
from mr1_fast.files import atomic_folder

rename, calls = Path.rename, []

def rename_when_told(self, target):
    calls.append(target)
    if len(calls) == 2:
        print("between", flush=True)
        sys.stdin.readline()
    return rename(self, target)

Path.rename = rename_when_told
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


def started(code, *arguments):
    """A process that runs `code`, with pipes of text."""
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


def look(folder):
    """What the files of a folder hold, as it is at one moment; nothing if it is replaced then."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return set()
    try:
        return {
            open(name, opener=lambda name, flags: os.open(name, flags, dir_fd=opened)).read()
            for name in "01234"
        }
    except FileNotFoundError:
        return set()
    finally:
        os.close(opened)


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


def test_a_line_is_appended_or_its_file_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_line(path, {"step": step})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
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
    def crash(path):
        raise Crash

    with (
        monkeypatch.context() as patch,
        pytest.raises(Crash),
        atomic_folder(folder) as temporary,
    ):
        (temporary / "a").write_text("new")
        patch.setattr(files, "remove_folder", crash)
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


def test_a_device_or_a_pipe_stays_what_it_is_and_gets_the_content(tmp_path):
    write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert os.read(reader, 100) == b'{\n "a": 1\n}' and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")  # a link is replaced: nothing is written through it
    assert (tmp_path / "file").read_text() == "old" and not (tmp_path / "link").is_symlink()
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        write_text(Path("/dev/full"), "new")


@pytest.mark.parametrize("how", ["> file", ">> file", "| cat > file"])
def test_what_is_written_to_standard_output_stands_between_what_is_printed(how, tmp_path):
    code = (
        "from pathlib import Path; from mr1_fast.files import write_text\n"
        "print('before'); write_text(Path('/dev/stdout'), 'content\\n'); print('after')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    command = f'"{sys.executable}" -c "$CODE" {how}'
    shell = {"cwd": tmp_path, "env": {**environment, "CODE": code}, "timeout": 60}
    subprocess.run(command, shell=True, check=True, **shell)
    assert (tmp_path / "file").read_text() == "before\ncontent\nafter\n"
    assert Path("/dev/stdout").is_symlink()


# --- two at once --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("who", ["last wins", "first wins"])
def test_writers_of_one_folder_do_not_mix(who, tmp_path):
    path, turns = tmp_path / "folder", 30
    writers = [started(WRITES_AGAIN_AND_AGAIN, path, name, turns, who) for name in "ab"]
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(look(path))
    assert all(len(each) <= 1 for each in seen)
    kinds = set().union(*seen, look(path))
    assert len(kinds) == 1 if who == "first wins" else len(kinds) > 1
    assert [writer.communicate()[0].split() for writer in writers] == [["ok"] * turns] * 2
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_moved_aside_at_a_look_is_no_other_thing(folder, monkeypatch):
    stat = Path.stat

    def moved_after_the_look(path, **options):
        found = stat(path, **options)
        if path == folder:
            os.rename(folder, folder.with_name("aside"))
        return found

    monkeypatch.setattr(Path, "stat", moved_after_the_look)
    assert not is_no_folder(folder) and not os.path.lexists(folder)


@pytest.mark.thorough
def test_none_of_many_writers_is_taken_aback_by_what_another_does(tmp_path):
    """A folder is without its name for a moment, which a writer hits once in a thousand times."""
    writers = [
        started(WRITES_AGAIN_AND_AGAIN, tmp_path / "folder", name, 500, "last wins")
        for name in "abc"
    ]
    assert [writer.communicate()[0].split() for writer in writers] == [["ok"] * 500] * 3
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_a_process_that_is_alive_has_moved_aside_is_left_to_it(folder):
    """The folder is without its name for a moment, in which a reader comes."""
    writer = started(WAITS_BETWEEN_THE_RENAMES, folder)
    assert writer.stdout.readline() == "between\n" and not folder.exists()
    reader = threading.Thread(target=restore_folder, args=(folder,))
    reader.start()
    reader.join(timeout=0.3)
    assert reader.is_alive() and not folder.exists()
    writer.communicate("go on\n", timeout=60)
    reader.join(timeout=60)
    assert writer.returncode == 0 and content(folder.parent) == {"folder/a": b"new"}


def test_what_a_killed_writer_has_left_is_swept_and_what_a_living_one_fills_is_not(tmp_path):
    path, other = tmp_path / "folder", tmp_path / ".folder.of-somebody.partial"
    other.mkdir()
    living = atomic_folder(path)
    with living as temporary:
        (temporary / "a").write_text("mine")
        code = WRITES_AGAIN_AND_AGAIN.replace("write_text", "no_such_function")
        code = code.replace("with atomic", "import os\n    with atomic").replace(
            "        for name", "        os.kill(os.getpid(), 9)\n        for name"
        )
        killed = started(code, path, "a", 1, "last wins")
        assert killed.wait(timeout=60) == -signal.SIGKILL
        killed.communicate()
        assert len(list(tmp_path.glob(".folder.*.partial"))) == 3
        (tmp_path / ".folder.partial").mkdir()  # as earlier versions named it
        with pytest.raises(ZeroDivisionError), atomic_folder(path):
            raise ZeroDivisionError
        assert set(tmp_path.iterdir()) == {temporary, other}
    assert content(tmp_path) == {"folder/a": b"mine"} and other.exists()


def test_what_a_killed_writer_of_a_file_has_left_is_swept_by_the_next_one(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / ".a.json.partial"
    other.write_text("of somebody")
    hangs = (
        "import sys, time\nfrom pathlib import Path\nfrom mr1_fast import files\n"
        "files._sync = lambda path: (print('writing', flush=True), time.sleep(60))\n"
        "files.write_text(Path(sys.argv[1]), 'killed')\n"
    )
    writer = started(hangs, path)
    assert writer.stdout.readline() == "writing\n"
    write_text(path, "mine")
    (of_the_living,) = set(tmp_path.iterdir()) - {path, other}
    writer.kill()
    writer.communicate()
    assert of_the_living.read_text() == "killed"
    write_text(path, "mine, too")
    assert content(tmp_path) == {"a.json": b"mine, too", other.name: b"of somebody"}


def test_without_locks_nothing_is_swept_and_folders_are_written(folder, monkeypatch):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    left = folder.parent / ".folder.0123456789ab.partial"
    left.mkdir()
    monkeypatch.setattr("fcntl.flock", no_locks)
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("new")
    assert left.exists() and content(folder.parent) == {"folder/a": b"new"}
    monkeypatch.undo()
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("newer")
    assert content(folder.parent) == {"folder/a": b"newer"} and not left.exists()


def test_a_folder_that_is_removed_is_never_half_there(folder, monkeypatch):
    (folder / "b").write_text("old")

    def crash(path):
        (path / "a").unlink()
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(files, "remove_folder", crash)
        discard_folder(folder)
    assert not folder.exists() and len(list(folder.parent.iterdir())) == 1
    sweep(folder.parent)
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_of_a_folder_obey_the_umask(umask, tmp_path):
    """The writer of safetensors makes files that their owner alone can read."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
            (folder / "adapter").mkdir()
            save_file({"weight": torch.zeros(3)}, folder / "adapter" / "model.safetensors")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*.*")}
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "model" / "adapter").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_is_no_folder_to_be_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with (
        pytest.raises(UserError, match="there is something else of this name"),
        atomic_folder(tmp_path / "mine"),
    ):
        pass
    assert content(tmp_path) == {"mine": b"mine"}


def test_all_is_forced_to_the_disk_before_the_name_and_the_name_before_the_old_goes(
    tmp_path, monkeypatch
):
    done, fsync, rename, rmtree = [], os.fsync, Path.rename, files.shutil.rmtree

    def note(what, call):
        def noted(*arguments, **options):
            if what == "sync":
                done.append(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            else:
                done.append((what, Path(arguments[0]).name.split(".")[-1]))
            return call(*arguments, **options)

        return noted

    path = tmp_path / "deep" / "folder"
    for turn in range(2):
        done.clear()
        with monkeypatch.context() as patch, atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "a").write_text("a")
            patch.setattr(os, "fsync", note("sync", fsync))
            patch.setattr(Path, "rename", note("rename", rename))
            patch.setattr(files.shutil, "rmtree", note("remove", rmtree))
        before = done[: done.index(("rename", "partial"))]
        parts = (temporary, temporary / "inner", temporary / "inner" / "a", path.parent)
        assert {str(each) for each in parts} <= set(before)
        after = done[len(before) :]
        assert after[1] == str(path.parent)
        if turn:
            assert before[-1] == ("rename", "folder")
            assert after.index(("rename", "replaced")) < after.index(("remove", "partial"))


def test_a_stop_while_a_folder_is_removed_is_raised_as_it_is(tmp_path, monkeypatch):
    """shutil.rmtree, interrupted where it closes a folder, closes it twice and raises OSError."""
    for name in range(200):
        (tmp_path / "folder" / str(name) / "inner").mkdir(parents=True)
    rmtree = shutil.rmtree

    def stop(number, frame):
        raise Stopped(number)

    def remove(*arguments, **options):
        os.kill(os.getpid(), signal.SIGALRM)
        rmtree(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stopped):
            files.remove_folder(tmp_path / "folder")
            time.sleep(10)
    finally:
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 60
    while (tmp_path / "folder").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the thread has gone on
