"""The pages of a run of 100,000 steps are no larger than those of a short one."""

import json
import re

import pytest

from mr1_fast.report.completions import MOST_BYTES, MOST_COMPLETIONS, select
from mr1_fast.report.plots import BINS
from mr1_fast.report.run_report import write_report

from .test_run_report import AFTER, BEFORE, grpo_step, make_run


def write_run(folder, steps):
    """A run with metrics of each step, an evaluation each 50, and completions each 20."""
    make_run(folder, [grpo_step(step) for step in range(steps)], {"before": BEFORE, "after": AFTER})
    figures = AFTER["greedy"] | {"seconds": 1.0}
    points = [json.dumps({"step": step, **figures}) + "\n" for step in range(0, steps, 50)]
    (folder / "evaluations.jsonl").write_text("".join(points))
    completion = {"text": "<answer> 3 </answer>" * 20, "reward": 1.0, "why": "", "reason": "eos"}
    question = {"key": "k", "problem": "How many?", "solution": "<answer> 3 </answer>"}
    lines = [
        json.dumps({"step": step, **question, "completions": [completion] * 8}) + "\n"
        for step in range(0, steps, 20)
    ]
    (folder / "completions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of a run of 2,000 steps, and that of one of 100,000 with its folder."""
    short, long = (write_run(tmp_path_factory.mktemp("run"), steps) for steps in (2_000, 100_000))
    return write_report(short), write_report(long), long


def test_the_report_does_not_grow_with_the_steps(pages):
    short, long, _ = pages
    assert long.stat().st_size < 1.3 * short.stat().st_size < 400_000


def test_no_curve_has_more_points_than_a_screen_can_show(pages):
    curves = re.findall(r'\sd="([^"]*)"', pages[1].read_text(encoding="utf-8"))
    points = [len(re.findall("[ML]", curve)) for curve in curves]
    assert max(points) <= 2 * BINS and sum(points) < 20_000
    assert max(points) > 20  # a curve of the run is among them


def test_the_page_of_completions_has_a_largest_size(pages):
    folder = pages[2]
    chosen = select(folder / "completions.jsonl")
    assert chosen.total == 40_000 and chosen.shown <= MOST_COMPLETIONS
    assert (folder / "completions.html").stat().st_size < 1.1 * MOST_BYTES
