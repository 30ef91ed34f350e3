"""The digest of what a benchmark depends on: files by content, settings by architecture."""

import json

import pytest
from gpu_items import BACKGROUND, ITEMS
from sources import ROOT, SOURCES, Sources, digest


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository of two files, of which the benchmark `toy` depends on one and on a setting."""
    monkeypatch.setitem(SOURCES, "toy", Sources(("kernels/*.py",), ("grpo",)))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    (tmp_path / "other.py").write_text("1")
    table = tmp_path / "tuned.json"
    table.write_text("{}")
    return tmp_path, lambda architecture=None: digest("toy", architecture, tmp_path, table)


def test_contents_and_names_count_and_other_files_do_not(toy):
    folder, toy_digest = toy
    first = toy_digest()
    (folder / "other.py").write_text("2")
    assert toy_digest() == first

    (folder / "kernels" / "a.py").write_text("2")
    changed = toy_digest()
    (folder / "kernels" / "a.py").rename(folder / "kernels" / "b.py")
    assert len({first, changed, toy_digest()}) == 3


def test_a_setting_counts_on_its_architecture_alone(toy):
    folder, toy_digest = toy
    before = {name: toy_digest(name) for name in ("sm_90", "sm_86", None)}
    entries = {"sm_90": {"grpo": {"warps": 4}}, "sm_86": {"adamw": {"rows": 1}}}
    (folder / "tuned.json").write_text(json.dumps(entries))
    after = {name: toy_digest(name) for name in before}
    assert [name for name in before if before[name] != after[name]] == ["sm_90"]


@pytest.mark.parametrize("name", SOURCES)
def test_every_pattern_finds_a_file(name):
    assert [p for p in SOURCES[name].files if not any(ROOT.glob(p))] == []


def test_items_have_names_of_their_own_and_scripts_and_sources_that_exist():
    items = [*BACKGROUND, *ITEMS]
    assert len({item.name for item in items}) == len(items)
    for item in items:
        assert item.sources is None or item.sources in SOURCES
        if item.program[0] == "python" and item.program[1].endswith(".py"):
            assert (ROOT / item.program[1]).exists()
        assert set(item.after) <= {each.name for each in BACKGROUND}
