import pytest

from mr1_fast import DynamicKL


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


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, (0.1, 0.2, 0.3)), (1.0, (0.2, 0.15, 0.1))])
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
