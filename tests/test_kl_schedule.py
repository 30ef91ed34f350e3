import json
from itertools import pairwise
from math import inf, nan, tanh
from typing import get_args

import pytest

from mr1_fast import DynamicKL
from mr1_fast.kl_schedule import AccuracyKL, BetaShape, TargetKL

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


# --- by what a run measures -----------------------------------------------------------------------


def at(schedule, accuracy):
    """β of a step with this share of right answers."""
    schedule.observe_accuracy(accuracy)
    return schedule(3)


def test_the_papers_curve_by_its_own_bounds():
    """FG-ExPO: β·(1 + tanh a)/2 with β = 0.02, which it gives as 0.5·β to 0.881·β."""
    schedule = AccuracyKL(0.01, 0.02 * (1 + tanh(1)) / 2)
    for a in (0.0, 0.1, 0.25, 0.5, 0.77, 1.0):
        assert at(schedule, a) == pytest.approx(0.02 * (tanh(a) + 1) / 2, rel=1e-14)
    assert at(schedule, 1.0) / 0.02 == pytest.approx(0.881, abs=5e-4)


@pytest.mark.parametrize("low, high", [(LOW, HIGH), (0.0, 0.02), (0.05, 0.05)])
def test_by_accuracy_beta_rises_from_beta_min_to_beta_max(low, high):
    schedule = AccuracyKL(low, high)
    assert schedule(0) == schedule(99) == low  # nothing has been right so far
    betas = [at(schedule, share / 20) for share in range(21)]
    assert (betas[0], betas[-1]) == (low, pytest.approx(high)) and betas == sorted(betas)
    schedule.observe_kl(5.0)
    assert (schedule(0), schedule.state()) == (betas[-1], {})


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, nan])
def test_an_accuracy_is_a_share(accuracy):
    with pytest.raises(ValueError, match="accuracy must lie in"):
        AccuracyKL(LOW, HIGH).observe_accuracy(accuracy)


@pytest.mark.parametrize(
    "kl, change",
    [(0.01, 0), (0.011, 0.01), (0.0095, -0.005), (0.5, 0.02), (0.0, -0.02), (0.012, 0.02)],
)
def test_the_controller_changes_beta_by_a_tenth_of_the_relative_error_up_to_a_fifth(kl, change):
    schedule = TargetKL(LOW, HIGH, target=0.01)
    assert schedule(0) == pytest.approx(MIDDLE)
    schedule.observe_kl(kl)
    assert schedule(1) == pytest.approx(MIDDLE * (1 + change))


def test_the_controller_stays_within_its_bounds_and_leaves_them_again():
    schedule = TargetKL(LOW, HIGH, target=0.01)
    for kl, bound in ((1.0, HIGH), (0.0, LOW)):
        for _ in range(100):
            schedule.observe_kl(kl)
        assert schedule(1) == bound
    schedule.observe_kl(1.0)
    assert schedule(1) == pytest.approx(LOW * 1.02)


@pytest.mark.parametrize("kl", [nan, inf, -inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    schedule = TargetKL(LOW, HIGH, target=0.01)
    before = schedule(0)
    schedule.observe_kl(kl)
    assert schedule(1) == before


def test_the_controller_brings_a_kl_to_its_target():
    """Of a policy whose KL is inversely proportional to β: 0.02 at β = 0.045."""
    schedule = TargetKL(0.01, 0.1, target=0.02)
    for step in range(200):
        schedule.observe_kl(0.0009 / schedule(step))
    assert schedule(200) == pytest.approx(0.045, rel=0.01)


def test_the_controllers_state_comes_back_bit_for_bit_through_json():
    schedule, other = TargetKL(LOW, HIGH, target=0.01), TargetKL(LOW, HIGH, target=0.01)
    for kl in (0.003, 0.0101, 0.02, 0.0097, 0.0042):
        schedule.observe_kl(kl)
    other.load(json.loads(json.dumps(schedule.state())))
    assert other(5) == schedule(5) != TargetKL(LOW, HIGH, target=0.01)(5)
    narrower = TargetKL(0.08, 0.09, target=0.01)
    narrower.load(schedule.state())
    assert narrower(5) == 0.08  # the bounds that are set now hold


@pytest.mark.parametrize("beta", [None, "0.05", nan, inf, 0.0, -0.05])
def test_a_state_that_is_none_is_refused(beta):
    schedule = TargetKL(LOW, HIGH, target=0.01)
    before = schedule(0)
    with pytest.raises(ValueError, match="the KL weight of target-kl is"):
        schedule.load({"beta": beta})
    assert schedule(0) == before


@pytest.mark.parametrize(
    "low, high, target, message",
    [
        (0.0, 0.1, 0.01, "beta_min is 0, which the factors of target-kl could never leave"),
        (0.2, 0.1, 0.01, "need 0 <= beta_min <= beta_max"),
        (LOW, HIGH, 0.0, "target must be finite and greater than 0"),
        (LOW, HIGH, nan, "target must be finite and greater than 0"),
    ],
)
def test_a_controller_that_could_not_control_is_refused(low, high, target, message):
    with pytest.raises(ValueError, match=message):
        TargetKL(low, high, target)


def test_bounds_in_the_wrong_order_are_refused_by_accuracy_too():
    with pytest.raises(ValueError, match="need 0 <= beta_min <= beta_max"):
        AccuracyKL(0.2, 0.1)
