"""The supervised start in the cache: checked before it is used, and never trained for nothing."""

import random
import shutil
from pathlib import Path

import pytest

from mr1_fast import start
from mr1_fast.config import TaskConfig
from mr1_fast.errors import UserError
from mr1_fast.integrity import CHECKSUMS, checksums, folder_finding
from mr1_fast.start import supervised_start


def make():
    """The start that a cache of the tests holds, without its training of seconds."""
    return supervised_start("tiny", [TaskConfig()], 0, enough=0.0)


def test_a_damaged_start_is_made_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MR1_FAST_CACHE", str(tmp_path / "cache"))
    trained = []
    monkeypatch.setattr(start, "_train_start", lambda *arguments: trained.append(1))
    folder = make()
    whole = checksums(folder)
    assert folder_finding(folder) == "" and "model.safetensors" in whole
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }

    for path in folder.iterdir():  # each of its files is looked at
        data = path.read_bytes()
        at = random.Random(0).randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert folder_finding(folder)
        path.write_bytes(data)
    assert make() == folder and trained == [1]

    capsys.readouterr()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-7] ^= 64
    (folder / "model.safetensors").write_bytes(data)
    assert make() == folder and checksums(folder) == whole and trained == [1, 1]
    said = f"supervised start {folder} is damaged (model.safetensors is not what was written): it"
    assert f"{said} is made again.\n" in capsys.readouterr().out
    shutil.copytree(folder, kept := tmp_path / "kept")  # as an experiment keeps it
    assert folder_finding(kept) == "" and (kept / CHECKSUMS).exists()
    assert not list(folder.parent.glob(".*.partial"))


@pytest.mark.parametrize("where", ["under a file", "a file", "read-only", "no home"])
def test_a_cache_that_cannot_be_written_is_told_before_training(where, monkeypatch, tmp_path):
    def trained(*arguments):
        raise AssertionError("the training was for nothing")

    (tmp_path / "file").write_text("")
    places = {"under a file": tmp_path / "file" / "cache", "a file": tmp_path / "file"}
    places["read-only"] = "/proc/self/mr1_fast"
    monkeypatch.setattr(start, "_train_start", trained)
    if where == "no home":
        for name in ("MR1_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # whom the system does not know
        with pytest.raises(RuntimeError):
            Path.home()
    else:
        monkeypatch.setenv("MR1_FAST_CACHE", str(places[where]))
    with pytest.raises(UserError, match="set MR1_FAST_CACHE to a folder") as told:
        make()
    assert "\n" not in str(told.value)
