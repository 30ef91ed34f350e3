"""Loading the native libraries: only those that were built from the present sources."""

import shutil
from pathlib import Path

import pytest
import torch

from mr1_fast.kernels import native
from mr1_fast.kernels.csrc_digest import csrc_digest
from mr1_fast.kernels.grpo import rows_cuda


@pytest.fixture
def statuses(monkeypatch):
    """Forget the libraries, before and after."""
    for module in (native, rows_cuda):
        module.status.cache_clear()
    yield native.status, rows_cuda.status
    monkeypatch.undo()
    for module in (native, rows_cuda):
        module.status.cache_clear()


@pytest.fixture
def csrc(tmp_path) -> Path:
    if not native.CSRC.exists():
        pytest.skip("an installed wheel has no sources")
    return shutil.copytree(native.CSRC, tmp_path / "csrc")


def test_libraries_of_other_sources_are_not_used(statuses, csrc, monkeypatch):
    """A pull that changes a struct leaves the old library, which would read beyond the new one."""
    header = csrc / "decode.h"
    header.write_text(header.read_text().replace("scale, eps;", "eps, scale;"))
    monkeypatch.setattr(native, "CSRC", csrc)
    found = [module for module in (native, rows_cuda) if module.LIBRARY.exists()]
    if not found:
        pytest.skip("not built")
    for module in found:
        name = module.LIBRARY.name
        reason = f"not of these sources: {name} is out of date, run `pip install -e .`"
        if module is native:
            with pytest.warns(UserWarning, match=r"is out of date, run .*; using PyTorch"):
                assert module.status() == (None, reason)
        else:
            assert module.status() == (None, reason)


def test_libraries_of_the_same_sources_are_used_wherever_these_are(statuses, csrc, monkeypatch):
    monkeypatch.setattr(native, "CSRC", csrc)
    if not native.LIBRARY.exists():
        pytest.skip("not built")
    assert native.status()[0] is not None


def test_without_sources_there_is_nothing_to_compare_with(statuses, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CSRC", tmp_path / "missing")
    if not native.LIBRARY.exists():
        pytest.skip("not built")
    assert native.status()[0] is not None


def test_a_library_without_a_number_is_out_of_date(csrc):
    library = Path(torch._C.__file__)
    loaded, reason = native.load(library, "a compiler")
    assert loaded is None and f"{library.name} is out of date" in reason


def test_the_number_changes_with_a_source_and_with_nothing_else(csrc):
    before = csrc_digest(csrc)
    (csrc / ".decode.h.swp").write_text("what an editor leaves")
    assert csrc_digest(csrc) == before == csrc_digest(native.CSRC)
    (csrc / "decode.h").rename(csrc / "other.h")
    renamed = csrc_digest(csrc)
    (csrc / "other.h").write_text("// changed")
    assert len({before, renamed, csrc_digest(csrc)}) == 3
