"""Counting: answers that follow from the layout."""

from mr1_fast.tasks import counting


def test_counting_answers_follow_from_the_layout():
    for difficulty in (1, 2, 3):
        examples = [counting.draw("train", 1, index, difficulty) for index in range(200)]
        for example in examples:
            cells = [int(item.split(":")[0]) for item in example.key.split(" ") if ":" in item]
            assert example.solution == str(len(set(cells)))
            assert example.thinking == f"{len(cells)} items"
        assert (
            max(int(example.solution) for example in examples) > difficulty**2 + 4 * difficulty + 1
        )
