"""What follows from the accuracies of a run: the best step and the wait for a better one."""

import pytest

from mr1_fast.errors import UserError
from mr1_fast.progress import Progress


@pytest.mark.parametrize(
    "accuracies, best, waiting",
    [
        ({}, None, 0),
        ({0: 0.0}, 0, 0),
        ({0: 0.5, 10: 0.25, 20: 0.5}, 0, 2),
        ({0: 0.1, 10: 0.3, 20: 0.2, 25: 0.3}, 10, 2),
        ({0: 0.1, 10: 0.2, 20: 0.3}, 20, 0),
    ],
)
def test_the_best_is_the_earliest_of_the_highest(accuracies, best, waiting):
    progress = Progress(accuracies)
    assert (progress.best(), progress.waiting) == (best, waiting)


def test_the_best_up_to_a_step_is_not_a_later_one():
    progress = Progress({0: 0.1, 10: 0.3, 20: 0.9})
    assert [progress.best(last) for last in (0, 9, 10, 19, 20)] == [0, 0, 10, 10, 20]


def test_the_file_is_read_up_to_a_step_without_a_line_that_was_cut(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    assert Progress.read(path, 10).accuracies == {}
    lines = [f'{{"step": {step}, "accuracy": {step / 100}, "count": 4}}\n' for step in (0, 10, 20)]
    path.write_text("".join(lines) + '{"step": 30, "accu')
    assert Progress.read(path, 10).accuracies == {0: 0.0, 10: 0.1}
    assert Progress.read(path, 99).accuracies == {0: 0.0, 10: 0.1, 20: 0.2}


def test_the_longest_time_is_known_whatever_the_step(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    times = ["3.5", "9", "2", "NaN", "Infinity", '"many"']
    lines = [f'{{"step": {n}, "accuracy": 0, "seconds": {time}}}\n' for n, time in enumerate(times)]
    path.write_text("".join(lines))
    assert Progress.read(path, 0).seconds == 9.0
    path.write_text('{"step": 0, "accuracy": 0}\n')
    assert Progress.read(path, 0).seconds == Progress().seconds == 0.0


@pytest.mark.parametrize("line", ["", "[1]", "{}", '{"step": "0", "accuracy": 1}', "\xff"])
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text(f'{{"step": 0, "accuracy": 0.5}}\n{line}\n')
    with pytest.raises(UserError, match=r"evaluations.jsonl line 2 .*: remove it\.$"):
        Progress.read(path, 10)
