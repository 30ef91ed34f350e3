"""Drawn examples: repeatable by their arguments, endless or limited."""

import pytest

from mr1_fast.tasks import get_task
from mr1_fast.tasks.data.drawn import DrawnExamples

from ...data.pictures import contents


@pytest.mark.parametrize("limit", [None, 7])
def test_drawn_examples_depend_on_the_arguments_alone(limit):
    first, second = (DrawnExamples(get_task("counting"), "train", 5, limit=limit) for _ in range(2))
    first.take(0, 4), first.take(1, 4)
    assert contents(first.take(2, 4)) == contents(second.take(2, 4))
    assert contents(first.all(5)) == contents(second.all(5))
    assert contents(first.take(2, 4)) != contents(
        DrawnExamples(get_task("counting"), "train", 6, limit=limit).take(2, 4)
    )
    assert contents(first.all(5)) != contents(
        DrawnExamples(get_task("counting"), "test", 5, limit=limit).all(5)
    )


def test_drawn_steps_follow_each_other():
    examples = DrawnExamples(get_task("geometry"), "train", 0, difficulty=2)
    assert contents(examples.take(0, 3) + examples.take(1, 3)) == contents(examples.all(6))
    with pytest.raises(TypeError, match="no length"):
        len(examples)


def test_more_drawn_examples_are_none_that_a_step_takes_nor_held_out():
    examples = DrawnExamples(get_task("counting"), "train", 0)
    more = contents(examples.take_more(0, 30))
    assert contents(examples.take_more(10, 5)) == more[10:15]
    assert len({*more, *contents(examples.all(60))}) == 90
    held_out = {item.key for item in DrawnExamples(get_task("counting"), "test", 0).all(200)}
    assert not held_out & {item.key for item in examples.take_more(0, 200)}


def test_with_a_limit_more_drawn_examples_are_the_same_in_another_order():
    examples = DrawnExamples(get_task("counting"), "train", 0, limit=6)
    more, taken = contents(examples.take_more(0, 6)), contents(examples.take(0, 6))
    assert more != taken and sorted(more) == sorted(taken) == sorted(contents(examples.all(6)))
    assert contents(examples.take_more(4, 6))[:2] == more[4:]  # across two epochs
    assert contents(examples.take(0, 6)) == taken


def test_limited_drawn_examples_come_once_per_epoch_in_a_new_order():
    examples = DrawnExamples(get_task("counting"), "train", 0, limit=6)
    items = contents(examples.all(100))
    assert len(examples) == len(items) == 6
    epochs = [
        contents(examples.take(2 * epoch, 3) + examples.take(2 * epoch + 1, 3))
        for epoch in range(4)
    ]
    assert all(sorted(epoch) == sorted(items) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (
        contents(examples.take(0, 4) + examples.take(1, 4)) == epochs[0] + epochs[1][:2]
    )  # across two epochs
