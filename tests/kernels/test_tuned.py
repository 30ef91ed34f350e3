"""The table of launch settings: its entries, and what stands where there is none."""

import json
from typing import NamedTuple

import pytest
import torch

from mr1_fast.kernels import tuned as module
from mr1_fast.kernels.tuned import tuned

CUDA = torch.device("cuda")


class Tile(NamedTuple):
    columns: int
    warps: int


DEFAULT = Tile(4096, 8)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a function that makes its argument the table, on a GPU of sm_90."""

    def write(entries: dict) -> None:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(module, "TABLE", path)
        module.read_table.cache_clear()

    monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    yield write
    module.read_table.cache_clear()


def test_an_entry_replaces_the_default(table):
    table({"sm_90": {"loss": {"columns": 8192, "warps": 4}}})
    assert tuned("loss", CUDA, DEFAULT) == Tile(8192, 4)


@pytest.mark.parametrize("entries", [{}, {"sm_86": {"loss": {"columns": 1, "warps": 1}}}])
def test_the_default_stands_where_there_is_no_entry(table, entries):
    table(entries)
    assert tuned("loss", CUDA, DEFAULT) == DEFAULT


def test_an_entry_of_another_form_names_itself_and_the_way_out(table):
    table({"sm_90": {"loss": {"columns": 8192}}})
    with pytest.raises(ValueError, match=r"tuned.json: loss on sm_90 has .*run benchmarks/sweep"):
        tuned("loss", CUDA, DEFAULT)


def test_a_cpu_has_no_architecture():
    assert module.architecture(torch.device("cpu")) is None
    assert module.architecture(torch.device("meta")) is None


def test_the_table_that_is_installed_can_be_read():
    assert isinstance(module.read_table(), dict)
