"""Figures of unit squares: connected, true, and new where they are held out."""

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks import figures
from mr1_fast.tasks.split import SPLITS


def test_figures_are_connected_true_and_new_where_held_out():
    for difficulty in (1, 2):
        side = difficulty + 3
        for split in SPLITS:
            examples = [figures.draw(split, 3, index, difficulty) for index in range(200)]
            for example in examples:
                asked, *squares = example.key.split(" ")
                filled = set(map(int, squares))
                reached, around = set(), [min(filled)]
                while around:
                    square = around.pop()
                    reached.add(square)
                    row, column = divmod(square, side)
                    steps = [
                        (row + 1, column),
                        (row - 1, column),
                        (row, column + 1),
                        (row, column - 1),
                    ]
                    beside = {y * side + x for y, x in steps if 0 <= x < side}
                    around += (beside & filled) - reached
                assert reached == filled and len(filled) >= 3
                edges = sum(
                    len({s - side, s + side, s - 1, s + 1} - filled) for s in filled
                )  # but for row ends
                wraps = sum(1 for s in filled if s % side == side - 1 and s + 1 in filled)
                assert example.solution == str(
                    {"area": len(filled), "perimeter": edges + 2 * wraps}[asked]
                )
            assert split == "train" or len({example.key for example in examples}) == len(examples)


def test_more_held_out_figures_than_there_are_is_told(monkeypatch):
    monkeypatch.setattr(figures, "MOST_REPEATS", 20)  # of a thousand, which take half a minute
    with pytest.raises(UserError, match="no 9999 different test items: ask for fewer"):
        figures.draw("test", 4, 9998, 1)
