"""The plots of long runs: bounded, with every spike, and a plot for each reward."""

import re

import numpy as np
import pytest

from mr1_fast.report.plots import (
    BINS,
    PLOTS,
    evaluation_figure,
    figure,
    histogram,
    plots_of,
    thinned,
)


def evaluations(steps, accuracy):
    steps, accuracy = np.array(steps, dtype=float), np.array(accuracy, dtype=float)
    values = {"step": steps, "accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    return values | {"seconds": np.ones(len(steps))}


def test_short_curve_is_kept_as_it_is():
    steps = np.arange(2.0 * BINS)
    kept = thinned(steps, steps**2)
    assert np.array_equal(kept, (steps, steps**2))


@pytest.mark.parametrize("count", [2 * BINS + 1, 5000, 100_001])
def test_long_curve_keeps_its_spikes_and_little_else(count):
    steps = np.arange(count) + 10.0
    values = np.sin(steps / 500)
    values[[3, count // 2, count - 1]] = 7, -9, 11
    kept_steps, kept = thinned(steps, values)
    assert len(kept) <= 2 * BINS and (np.diff(kept_steps) > 0).all()
    assert np.array_equal(kept, values[(kept_steps - 10).astype(int)])
    assert kept[-1] == 11 and kept.min() == -9 and 7 in kept


def test_long_curve_keeps_its_gaps():
    values = np.ones(5000)
    values[2000:3000] = np.nan
    values[::7] = np.inf
    kept_steps, kept = thinned(np.arange(5000.0), values)
    assert np.isnan(kept[(kept_steps > 2050) & (kept_steps < 2950)]).any()
    assert np.isfinite(kept[kept_steps < 1950]).all()


def test_plot_of_a_long_run_is_small():
    rng = np.random.default_rng(0)
    columns = {"step": np.arange(5000.0), "reward": rng.normal(size=5000)}
    assert len(figure(PLOTS[1], columns, 0)) < 60_000


def test_every_extra_reward_has_a_plot_of_its_own():
    plots = plots_of({"algo": "grpo-d", "extra_rewards": {"brief.py:brief": 1, "<b>": 0}})
    titles = [plot.title for plot in plots]
    assert titles[:4] == ["Reward", "Accuracy", "Reward brief.py:brief", "Reward <b>"]
    drawn = figure(plots[3], {"step": np.arange(3.0), "<b>": np.arange(3.0)}, 3)
    assert "<b>" not in drawn and "Reward &lt;b&gt;</figcaption>" in drawn
    assert plots_of({"algo": "sft"})[0].title == "Loss"


def test_lengths_are_drawn_with_their_percentiles():
    plot = next(plot for plot in PLOTS if plot.title == "Completion length")
    columns = {"step": np.arange(3.0)} | {name: np.ones(3) for name in plot.columns}
    drawn = figure(plot, columns, 0)
    assert all(f">{name}</text>" in drawn for name in ("mean", "10%", "median", "90%"))


def test_evaluations_are_drawn_with_their_intervals():
    drawn = evaluation_figure(evaluations([0, 10, 20], [0.5, 0.6, np.nan]))
    assert len(re.findall(r"<use [^>]*var\(--line0\)", drawn)) == 2  # a marker each
    (intervals,) = re.findall(r'id="evaluations-LineCollection_1">.*?</g>', drawn, re.DOTALL)
    assert intervals.count("<path") == 2
    assert evaluation_figure(evaluations([], [])) == ""
    assert evaluation_figure(evaluations([0], [np.nan])) == ""
    many = evaluation_figure(evaluations(range(3000), [0.5] * 3000))
    assert len(many) < 100_000


def test_few_different_rewards_have_a_bar_each():
    drawn = histogram(np.array([0, 1, 1, 2, 2, 2.0]))
    assert all(f">{value}</text>" in drawn for value in "012") and "Rewards, counted" in drawn
    assert ">0.4</text>" in histogram(np.linspace(0, 1, 50))
    histogram(np.array([1.0]))
