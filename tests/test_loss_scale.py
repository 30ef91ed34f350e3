import math

import pytest
import torch

from mr1_fast.loss_scale import GOOD_STEPS, LARGEST, LossScale


def test_it_halves_at_once_and_doubles_after_many_good_steps_in_a_row():
    scale = LossScale()
    for _ in range(3):
        scale.observe(finite=False)
    assert scale.value == LARGEST / 8
    for _ in range(GOOD_STEPS - 1):
        scale.observe(finite=True)
    scale.observe(finite=False)  # one step before the row was long enough
    assert scale.value == LARGEST / 16
    for _ in range(GOOD_STEPS):
        scale.observe(finite=True)
    assert scale.value == LARGEST / 8


def test_it_stays_within_its_bounds():
    scale = LossScale()
    for _ in range(GOOD_STEPS):
        scale.observe(finite=True)
    assert scale.value == LARGEST
    for _ in range(40):
        scale.observe(finite=False)
    assert scale.value == 1


def test_gradients_are_divided_by_it():
    scale = LossScale()
    gradients = [torch.tensor([3.0, -5.0]), torch.tensor(7.0)]
    scale.unscale_(gradients)
    assert [g.mul(LARGEST).tolist() for g in gradients] == [[3.0, -5.0], 7.0]
    scale.unscale_([])  # a step that reached no weight


def test_what_it_loads_goes_on_as_it_would_have():
    scale, other = LossScale(), LossScale()
    scale.observe(finite=False)
    for _ in range(GOOD_STEPS - 1):
        scale.observe(finite=True)
    other.load(scale.state())
    for each in (scale, other):
        each.observe(finite=True)
    assert scale.state() == other.state() == {"value": LARGEST, "good_steps": 0}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"value": 4.0},
        {"value": math.nan, "good_steps": 0},
        {"value": 0.5, "good_steps": 0},
        {"value": 2 * LARGEST, "good_steps": 0},
        {"value": True, "good_steps": 0},
        {"value": 4.0, "good_steps": -1},
        {"value": 4.0, "good_steps": GOOD_STEPS},
        {"value": 4.0, "good_steps": "1"},
    ],
)
def test_numbers_that_it_never_had_are_refused(state):
    scale = LossScale()
    with pytest.raises(ValueError, match="loss scale"):
        scale.load(state)
    assert scale.state() == LossScale().state()
