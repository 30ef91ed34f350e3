"""The documentation as a site: it builds without a warning and loads nothing from elsewhere."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]+)")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert loaded.findall(page.read_text(encoding="utf-8")) == [], page


def test_the_api_has_signatures_docstrings_and_doctests(site):
    page = (site / "api" / "schedule.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "explore_fraction: float = 0.3" in text
    assert "falls from (β_min + β_max)/2" in text
    assert re.search(r"<pre.*&gt;&gt;&gt; </span>", page)


def test_links_out_of_the_pages_lead_to_the_repository_where_its_address_is_known():
    hook = runpy.run_path(str(ROOT / "docs" / "hooks" / "links.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="experiment/tiny.md"))
    config = SimpleNamespace(repo_url="https://example.org/us/mr1_fast/")
    text = "[how](../experiment.md), [all](../../benchmarks/RESULTS.md#loss)"
    address = "https://example.org/us/mr1_fast/blob/main/benchmarks/RESULTS.md#loss"
    assert hook(text, page, config) == f"[how](../experiment.md), [all]({address})"


def test_links_out_of_the_pages_become_paths_and_others_stay(site):
    page = (site / "configuration.html").read_text(encoding="utf-8")
    assert "<code>benchmarks/RESULTS.md</code>" in page and "../benchmarks" not in page
    assert 'href="memory.html#what-auto-chooses"' in page
