"""The documentation as a site: it builds without a warning and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_links_out_of_the_pages_become_paths_and_others_stay(site):
    page = (site / "configuration.html").read_text(encoding="utf-8")
    assert "<code>benchmarks/RESULTS.md</code>" in page and "../benchmarks" not in page
    assert 'href="memory.html#what-auto-chooses"' in page
