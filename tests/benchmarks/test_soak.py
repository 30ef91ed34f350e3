"""The soak test: what is found of a process, and that a slope beyond its bound is told."""

import os
import subprocess
import sys

import pytest
from soak import BOUNDS, children, judge, sample, slope, steps_done


def steady(**growing):
    """Samples of a run in which nothing grows but what is named, by an amount per 1,000 steps."""
    rates = dict.fromkeys(BOUNDS, 0.0) | growing
    return [
        {"steps": steps, **{name: 2.0 + rate * steps / 1000 for name, rate in rates.items()}}
        for steps in range(100, 5000, 100)
    ]


def test_nothing_that_is_steady_breaks_a_bound():
    assert all(figures["holds"] for figures in judge(steady()).values())


@pytest.mark.parametrize("name", [name for name, bound in BOUNDS.items() if bound.slope])
def test_what_grows_beyond_its_bound_is_named(name):
    found = judge(steady(**{name: 1.1 * BOUNDS[name].slope}))
    assert [each for each, figures in found.items() if not figures["holds"]] == [name]
    assert found[name]["per_1000_steps"] == pytest.approx(1.1 * BOUNDS[name].slope)


def test_growth_during_the_warm_up_does_not_count():
    samples = steady()
    for number, each in enumerate(samples):
        each["memory"] = min(number, 10) * 50.0
    growth, last, most = slope(samples, "memory")
    assert growth == pytest.approx(0, abs=1e-9) and last == most == 500


def test_too_few_samples_are_no_proof():
    assert not any(figures["holds"] for figures in judge(steady()[:3]).values())


def test_a_dead_child_is_seen_until_it_is_waited_for(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()  # it ends
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (child.pid, "Z") in children(os.getpid())
    found = sample(os.getpid(), tmp_path)
    assert found["zombies"] >= 1 and found["memory"] > 10 and found["threads"] >= 1
    child.wait()
    child.stdout.close()
    assert child.pid not in dict(children(os.getpid()))


def test_steps_are_those_of_the_last_whole_line(tmp_path):
    assert steps_done(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2')
    assert steps_done(tmp_path) == 2
