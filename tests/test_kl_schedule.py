from itertools import pairwise
from typing import get_args

import pytest

from mr1_fast import DynamicKL
from mr1_fast.kl_schedule import BetaShape

LOW, MIDDLE, HIGH, T = 0.04, 0.07, 0.1, 50
SHAPES = get_args(BetaShape)


def path(shape, steps=T, explore_fraction=0.3):
    """β at each step of a run, 0 … steps."""
    schedule = DynamicKL(LOW, HIGH, steps, explore_fraction, shape)
    return [schedule(step) for step in range(steps + 1)]


@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.04, 0.1), (0.0, 0.02)])
def test_follows_the_papers_two_lines(beta_min, beta_max):
    schedule = DynamicKL(beta_min, beta_max, total_steps=200)
    middle, w, t = (beta_min + beta_max) / 2, 60, 200
    for step in range(t + 1):
        if step <= w:
            expected = middle - (middle - beta_min) * step / w
        else:
            expected = beta_min + (beta_max - beta_min) * (step - w) / (t - w)
        assert schedule(step) == pytest.approx(expected, abs=1e-15)
    assert (schedule(0), schedule(w), schedule(t)) == pytest.approx((middle, beta_min, beta_max))


def test_falls_then_rises():
    betas = [DynamicKL(0.0, 0.02, 50)(step) for step in range(51)]
    turn = betas.index(min(betas))
    assert turn == 15
    assert betas[: turn + 1] == sorted(betas[: turn + 1], reverse=True)
    assert betas[turn:] == sorted(betas[turn:])


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, (0.1, 0.2, 0.3)), (1.0, (0.2, 0.15, 0.1))]
)
def test_all_or_no_exploration(fraction, expected):
    schedule = DynamicKL(0.1, 0.3, 10, explore_fraction=fraction)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx(expected)


def test_stays_at_beta_max_after_the_end_and_constant_where_both_are_equal():
    assert DynamicKL(0.1, 0.3, 10)(1000) == pytest.approx(0.3)
    assert {DynamicKL(0.04, 0.04, 10)(step) for step in range(11)} == {0.04}


@pytest.mark.parametrize(
    "arguments",
    [(0.2, 0.1, 10), (-0.1, 0.1, 10), (0.0, float("nan"), 10), (0.0, 0.1, 0), (0.0, 0.1, 10, 1.5)],
)
def test_refuses_impossible_schedules(arguments):
    with pytest.raises(ValueError, match=r"beta_min|total_steps|explore_fraction"):
        DynamicKL(*arguments)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_papers_path_is_the_default(fraction):
    assert path("grpo-d", explore_fraction=fraction) == [
        DynamicKL(LOW, HIGH, T, fraction)(s) for s in range(T + 1)
    ]


@pytest.mark.parametrize(
    "shape, first, turn, at_turn, last",
    [
        ("grpo-d", MIDDLE, 15, LOW, HIGH),
        ("linear-up", LOW, 25, MIDDLE, HIGH),
        ("linear-down", HIGH, 25, MIDDLE, LOW),
        ("reversed", HIGH, 35, LOW, MIDDLE),
    ],
)
def test_where_each_shape_starts_turns_and_ends(shape, first, turn, at_turn, last):
    betas = path(shape)
    assert (betas[0], betas[turn], betas[T]) == pytest.approx((first, at_turn, last))
    # On each side of the turn β falls, or rises, by the same amount a step.
    for part in (betas[: turn + 1], betas[turn:]):
        step = (part[-1] - part[0]) / (len(part) - 1)
        assert [b - a for a, b in pairwise(part)] == pytest.approx([step] * (len(part) - 1))
    beyond = DynamicKL(LOW, HIGH, T, shape=shape)
    assert {beyond(step) for step in (T + 1, 10 * T)} == {betas[T]}


@pytest.mark.parametrize("shape, original", [("reversed", "grpo-d"), ("linear-down", "linear-up")])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_mirror_images_in_time(shape, original, fraction):
    for steps in (1, 7, T):
        assert path(shape, steps, fraction) == path(original, steps, fraction)[::-1]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_straight_line_explores_nothing(fraction):
    assert path("linear-up", explore_fraction=fraction) == path("grpo-d", explore_fraction=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_each_shape(shape):
    # Over time: 0.3 of it at (β_mid + β_min)/2 and 0.7 at β_mid, or all of it at β_mid.
    expected = (
        0.3 * (MIDDLE + LOW) / 2 + 0.7 * MIDDLE if shape in ("grpo-d", "reversed") else MIDDLE
    )
    betas = path(shape)
    assert (sum(betas) - (betas[0] + betas[T]) / 2) / T == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_one_value_is_constant(shape):
    assert {DynamicKL(0.04, 0.04, 10, shape=shape)(step) for step in range(12)} == {0.04}


def test_an_unknown_shape_is_told_the_known_ones():
    with pytest.raises(
        ValueError, match="one of grpo-d, linear-up, linear-down, reversed, got 'cosine'"
    ):
        DynamicKL(0.0, 0.1, 10, shape="cosine")
