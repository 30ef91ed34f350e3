"""Damaged folders of `save_to_disk`: a sentence about each, and nothing outside is opened."""

import json
import os

import datasets
import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples

ROWS = datasets.Dataset.from_list([{"problem": "p", "solution": "1"}] * 9)
FILES = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")


def load(path):
    return load_examples("free", str(path), "train", 0).all(9)


@pytest.fixture
def saved(tmp_path):
    ROWS.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "zeros", "list", "deep", "number", "missing", "pipe", "device", "folder"],
)
def test_every_damage_is_one_sentence(name, damage, saved):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    written = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "list": b"[1, 2]",
        "deep": b"[" * 100_000,
        "number": b'{"_data_files": ' + b"9" * 5000 + b"}",
    }
    if damage in written:
        path.write_bytes(written[damage])
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "folder":
        path.mkdir()
    if name == "state.json" and damage == "missing":  # its tables are read by themselves
        assert len(load(saved)) == 9
        return
    with pytest.raises(UserError) as raised:
        load(saved)
    assert str(saved) in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "name",
    ["../other.arrow", "/etc/passwd", "x/../../other.arrow", "~/x.arrow", "a\0b", 7, None, ["a"]],
)
def test_a_folder_names_no_file_outside(name, saved):
    (saved.parent / "other.arrow").write_bytes((saved / FILES[2]).read_bytes())
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        UserError, match=r"state.json is damaged .*outside its folder|without a file"
    ):
        load(saved)


def test_a_million_files_are_not_opened(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{}] * 10_001}))
    with pytest.raises(UserError, match="no list of at most 10,000 entries"):
        load(saved)


@pytest.mark.parametrize("splits", [["train", "../other"], ["."], [7], "train", {"a": 1}, None])
def test_splits_are_folders_inside(splits, tmp_path):
    datasets.DatasetDict({"train": ROWS}).save_to_disk(str(tmp_path / "all"))
    assert len(load(tmp_path / "all")) == 9
    (tmp_path / "all" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match=r"dataset_dict.json is damaged"):
        load(tmp_path / "all")


def test_files_may_be_links_as_in_the_cache_of_the_hub(saved):
    os.rename(saved / FILES[2], saved.parent / "blob")
    (saved / FILES[2]).symlink_to("../blob")
    assert len(load(saved)) == 9
