"""The page of completions: what it shows of how many, its bounds, and that no text can run."""

import base64
import hashlib
import html.parser
import json
import random
import re
import tracemalloc
from itertools import pairwise

import pytest

from mr1_fast.errors import UserError
from mr1_fast.report import completions, run_report
from mr1_fast.report.completions import select, write_completions
from mr1_fast.report.page import printable
from mr1_fast.report.run_report import write_report

from ..data.hostile import injections, nested, random_strings
from .test_run_report import CONFIG, Page, make_run

MARKUP = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "]]>\"'`${alert(1)}",
    "\u2028alert(1)\u2029",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    r"\u003cscript\u003ealert(1)",
]


def completion(text="<think>1</think><answer> 3 </answer>", **changed):
    given = {"text": text, "reward": 2.0, "accuracy": 1.0, "format": 1.0}
    return given | {"why": "the same text", "reason": "eos"} | changed


def group(step, count=2, **changed):
    given = {"step": step, "key": "k", "problem": "How many?", "solution": "3"}
    return given | {"completions": [completion() for _ in range(count)]} | changed


def write_groups(folder, groups):
    (folder / "completions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in groups))
    return folder / "completions.jsonl"


class Scripts(html.parser.HTMLParser):
    """The elements of a page and the content of its scripts, as a browser's parser finds them."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.tags, self.policy, self.inside = [], set(), "", False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        assert not [name for name in attrs if name.startswith("on")]
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append((attrs, ""))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)


def shown(path):
    """The groups that the page's script reads."""
    (_, data), _ = Scripts(path).scripts
    return json.loads(data)


def test_page_holds_every_completion_with_all_that_was_recorded(tmp_path):
    groups = [group(0), group(1, problem="Why?", completions=[completion(brief=None, reward=0.5)])]
    write_groups(tmp_path, groups)
    first, second = shown(write_completions(tmp_path, CONFIG))
    assert (first["step"], len(first["completions"])) == (0, 2)
    assert second == {
        "step": 1,
        "problem": "Why?",
        "solution": "3",
        "completions": [
            {
                "text": "<think>1</think><answer> 3 </answer>",
                "reward": 0.5,
                "why": "the same text",
                "reason": "eos",
                "parts": {"accuracy": 1.0, "format": 1.0, "brief": None},
            }
        ],
    }
    assert "All 3 completions." in (tmp_path / "completions.html").read_text()


def test_policy_lets_the_one_script_of_the_page_run_and_no_other(tmp_path):
    write_groups(tmp_path, [group(0)])
    page = Scripts(write_completions(tmp_path, CONFIG))
    (about_data, _), (about_script, script) = page.scripts
    assert about_data == {"type": "application/json", "id": "data"} and about_script == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    # What enters the page by the script is text.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function", script
    )


def test_hostile_texts_stay_texts(tmp_path):
    texts = [*MARKUP, *random_strings(300, random.Random(0)), *injections(tmp_path / "ran")]
    texts += nested()
    groups = [
        group(
            step,
            problem=text,
            solution=text,
            completions=[completion(text, why=text, reason=text, **{f"x{text}": 1.0})],
        )
        for step, text in enumerate(texts)
    ]
    write_groups(tmp_path, groups)
    config = CONFIG | {"model": MARKUP[0], "task": MARKUP[2]}
    path = write_completions(tmp_path, config)
    page = Scripts(path)
    assert len(page.scripts) == 2 and "img" not in page.tags
    assert not set("<>&\u2028\u2029") & set(page.scripts[0][1])
    found = shown(path)
    for text, each in zip(texts, found, strict=True):
        expected = "".join(printable(text, completions.LONGEST))
        (record,) = each["completions"]
        assert each["problem"] == each["solution"] == record["text"] == record["why"] == expected


def test_numbers_that_json_has_not_are_none(tmp_path):
    lines = json.dumps(group(0, completions=[completion(reward=float("nan"), brief=1e999)]))
    (tmp_path / "completions.jsonl").write_text(lines + "\n")
    ((record,),) = [each["completions"] for each in shown(write_completions(tmp_path, CONFIG))]
    assert record["reward"] is None and record["parts"]["brief"] is None


def test_long_run_shows_the_newest_and_an_even_sample_of_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MOST_COMPLETIONS", 200)
    path = write_groups(tmp_path, [group(step) for step in range(1000) for _ in range(2)])
    chosen = select(path)
    assert (chosen.shown, chosen.total, chosen.newest) == (200, 4000, 50)
    steps = [each["step"] for each in chosen.groups]
    assert steps[-50:] == [step for step in range(975, 1000) for _ in range(2)]
    gaps = {after - before for before, after in pairwise(steps[:50])}
    assert steps[0] == 0 and steps[49] == 974 and max(gaps) - min(gaps) <= 1
    assert chosen.describe() == (
        "200 of 4,000 completions: the newest 100, from step 975 to 999, and an even sample of "
        "100 earlier ones."
    )


def test_page_of_long_completions_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MOST_BYTES", 200_000)
    long = [completion("<" * 3000) for _ in range(2)]  # six bytes for each in the page
    path = write_groups(tmp_path, [group(step, completions=long) for step in range(100)])
    size = write_completions(tmp_path, CONFIG).stat().st_size
    assert 100_000 < size < 250_000
    assert select(path).groups[-1]["step"] == 99


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MOST_COMPLETIONS", 100)
    line = json.dumps(group(7, completions=[completion("x" * 3000)] * 4)) + "\n"
    path = tmp_path / "completions.jsonl"
    with path.open("w") as file:
        for _ in range(3000):
            file.write(line)
    assert path.stat().st_size > 35_000_000
    tracemalloc.start()
    assert select(path).total == 12_000
    assert tracemalloc.get_traced_memory()[1] < 12_000_000
    tracemalloc.stop()


def test_long_texts_are_cut_with_a_note(tmp_path):
    write_groups(tmp_path, [group(0, completions=[completion("y" * 9000)])])
    ((record,),) = [each["completions"] for each in shown(write_completions(tmp_path, CONFIG))]
    assert record["text"] == "y" * 4000 + " … cut: 4,000 of 9,000 characters shown"


@pytest.mark.parametrize(
    ("content", "total"),
    [("", 0), (json.dumps(group(0)) + '\n{"step": 1, "comp', 2)],
    ids=["empty", "half a line"],
)
def test_unfinished_file(tmp_path, content, total):
    (tmp_path / "completions.jsonl").write_text(content)
    chosen = select(tmp_path / "completions.jsonl")
    assert (chosen.shown, chosen.total) == (total, total)
    assert f"All {total} completions." in write_completions(tmp_path, CONFIG).read_text()


@pytest.mark.parametrize("line", ["{", "", '{"step": 1}', '{"completions": [1]}'])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "completions.jsonl"
    path.write_text(f"{json.dumps(group(0))}\n{line}\n")
    with pytest.raises(UserError, match=r"completions\.jsonl line 2 "):
        write_completions(tmp_path, CONFIG)
    assert not (tmp_path / "completions.html").exists()


def test_report_links_the_page_and_renews_it_while_that_is_cheap(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    page = run / "completions.html"
    write_report(run)
    assert not page.exists() and "completions.html" not in (run / "report.html").read_text()

    write_groups(run, [group(0)])
    monkeypatch.setattr(run_report, "LIVE_BYTES", 10)
    write_report(run, live=True)
    assert not page.exists() and "completions.html" not in (run / "report.html").read_text()

    monkeypatch.setattr(run_report, "LIVE_BYTES", 10_000)
    write_report(run, live=True)
    assert "All 2 completions." in page.read_text()
    assert "completions.html" in Page(run / "report.html").attributes("href")

    write_groups(run, [group(0), group(1)])
    monkeypatch.setattr(run_report, "LIVE_BYTES", 10)
    write_report(run)
    assert "All 4 completions." in page.read_text()
