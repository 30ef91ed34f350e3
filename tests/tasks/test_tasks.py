"""The drawn tasks: repeatable items, splits that share nothing, true answers and figures."""

import cmath
import hashlib
import math
import random
import re
from dataclasses import replace

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks import (
    TASKS,
    counting,
    diagram,
    figures,
    format_problem,
    format_solution,
    geometry,
    get_task,
)
from mr1_fast.tasks.split import SPLITS, split_of


def image_hash(example):
    return hashlib.sha256(example.images[0].tobytes()).hexdigest()


@pytest.fixture(scope="module", params=TASKS)
def drawn(request):
    """Return each split's first items at difficulty 1; there are fewer figures that differ."""
    task, count = get_task(request.param), 1000 if request.param == "figures" else 2000
    return {split: [task.draw(split, 0, index) for index in range(count)] for split in SPLITS}


def test_splits_share_no_parameters_and_no_images(drawn):
    for seen in (lambda example: example.key, image_hash):
        train, validation, test = ({seen(example) for example in drawn[split]} for split in SPLITS)
        assert not train & validation and not train & test and not validation & test


def test_no_image_is_fixed_by_its_parameters(drawn):
    for examples in drawn.values():
        assert len({image_hash(example) for example in examples}) == len(examples)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_arguments_determine_the_item_and_each_matters(task):
    def fingerprint(*arguments):
        example = task.draw(*arguments)
        return example.problem, example.solution, example.thinking, example.key, image_hash(example)

    assert fingerprint("test", 3, 14, 1) == fingerprint("test", 3, 14, 1)
    others = [("validation", 3, 14, 1), ("test", 4, 14, 1), ("test", 3, 15, 1), ("test", 3, 14, 2)]
    assert all(fingerprint("test", 3, 14, 1)[-1] != fingerprint(*other)[-1] for other in others)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_images_are_square_rgb_in_whole_tokens(task, difficulty):
    image = task.draw("train", 0, 0, difficulty).images[0]
    assert image.mode == "RGB" and image.width == image.height and image.width % 28 == 0


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


@pytest.mark.parametrize(
    "output, right",
    [
        ("<think>2+0+3</think><answer>5</answer>", True),
        ("<answer> 5 </answer> and <answer>6</answer>", True),
        ("<answer>4</answer>", False),
        ("5", False),
        ("<answer>5 items</answer>", False),
        ("<answer>" + "5" * 5000 + "</answer>", False),
    ],
)
def test_counting_verdict(output, right):
    assert counting.is_correct(output, "5") is right


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_what_supervised_training_imitates_counts_as_right(task, difficulty):
    for index in range(40):
        example = task.draw("train", 5, index, difficulty)
        assert task.is_correct(format_solution(example), example.solution)
        wrong = replace(
            example, solution=example.solution.replace(example.solution.rstrip("°"), "181")
        )
        assert not task.is_correct(format_solution(wrong), example.solution)


@pytest.mark.parametrize("drawn", ["geometry"], indirect=True)
def test_geometry_has_enough_problems_at_difficulty_1_and_draws_all(drawn):
    sizes = range(10, 180, 5)
    pairs = {(a, b) for a in sizes for b in sizes if a <= b and a + b <= 170}
    assert len(pairs) == 256
    for split, least in zip(SPLITS, (170, 25, 50), strict=True):
        possible = {
            f"third-angle {a} {b}" for a, b in pairs if split_of(("third-angle", a, b)) == split
        }
        assert len(possible) >= least
        found = {example.key for example in drawn[split]}
        assert found <= possible and len(found) > 0.99 * len(possible)


@pytest.mark.parametrize("drawn", ["geometry"], indirect=True)
def test_geometry_asks_no_pair_of_training_in_another_order(drawn):
    pairs = [
        {frozenset(re.findall(r"\d+", example.problem)) for example in drawn[split]}
        for split in SPLITS
    ]
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]


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
    with pytest.raises(UserError, match="no 9999 different test items: ask for fewer"):
        figures.draw("test", 3, 9998, 1)


def expected_answer(key):
    """The answer of a geometry item, from its parameters alone."""
    family, *sizes = key.split(" ", 2)
    if family in ("third-angle", "exterior"):
        first, second, *variant = [
            part if not part.isdigit() else int(part) for part in " ".join(sizes).split()
        ]
        return {(): 180 - first - second, ("outside",): first + second, ("remote",): second}[
            tuple(variant)
        ]
    size, variant = int(sizes[0]), sizes[1]
    return {
        "parallel": {"corresponding": size, "alternate": size, "co-interior": 180 - size},
        "bisector": {"half from half": size, "half from whole": size, "whole": 2 * size},
        "isosceles": {"base": size, "apex": 180 - 2 * size},
        "inscribed": {"major": size, "minor": 180 - size, "central": 2 * size},
        "tangent": {"at A": 90 - size, "at O": size},
    }[family][variant]


@pytest.mark.parametrize("difficulty", geometry.SIDES)
def test_geometry_answers_and_the_dial(difficulty):
    examples = [geometry.draw("train", 2, index, difficulty) for index in range(400)]
    assert all(example.solution == f"{expected_answer(example.key)}°" for example in examples)
    families = {example.key.split(" ")[0] for example in examples}
    assert families == {
        name for name, family in geometry.FAMILIES.items() if family.first_difficulty <= difficulty
    }
    numbers = [
        int(size) for example in examples for size in re.findall(r"= (\d+)", example.problem)
    ]
    assert bool(numbers) == (difficulty < 4)
    assert all(size % 5 == 0 for size in numbers) == (difficulty in (1, 2, 4))
    assert {example.images[0].width for example in examples} == {geometry.SIDES[difficulty]}
    if difficulty == 1:
        assert max(len(example.problem) for example in examples) < 60
        assert max(len(example.thinking) for example in examples) <= 14
    if difficulty == 2:  # the same words and numbers, different answers: only the figure tells
        answers = {}
        for example in examples:
            answers.setdefault(example.problem, set()).add(example.solution)
        assert any(len(found) > 1 for found in answers.values())


def test_geometry_writes_sizes_into_the_figure():
    figure = geometry.FAMILIES["third-angle"].build((50, 60), random.Random(0))
    plain, written = (
        diagram.paint(figure, 224, sizes, random.Random(1)) for sizes in (False, True)
    )
    assert plain.tobytes() != written.tobytes()
    figure.given[0].degrees = 51
    assert diagram.paint(figure, 224, False, random.Random(1)).tobytes() == plain.tobytes()
    assert diagram.paint(figure, 224, True, random.Random(1)).tobytes() != written.tobytes()


def measured(points, corners):
    start, vertex, end = (points[name] for name in corners)
    return abs(math.degrees(cmath.phase((end - vertex) / (start - vertex))))


def test_figures_are_turned_mirrored_scaled_and_shifted():
    figure = geometry.FAMILIES["third-angle"].build((50, 60), random.Random(0))
    placed = [diagram.place(figure, 84, random.Random(seed))[0] for seed in range(200)]
    sides = [points["B"] - points["A"] for points in placed]
    assert {round(cmath.phase(side) / (math.pi / 4)) for side in sides} == set(range(-4, 5))
    assert (
        len(
            {
                cmath.phase((points["C"] - points["A"]) / (points["B"] - points["A"])) > 0
                for points in placed
            }
        )
        == 2
    )
    assert max(map(abs, sides)) > 1.1 * min(map(abs, sides))
    centres = [sum(points.values()) / 3 for points in placed]
    assert max(centre.real for centre in centres) - min(centre.real for centre in centres) > 10


@pytest.mark.parametrize("family", geometry.FAMILIES)
@pytest.mark.parametrize("step", [1, 5])
def test_figures_are_true_to_their_numbers(family, step):
    sample, build = geometry.FAMILIES[family].sample, geometry.FAMILIES[family].build
    for seed in range(300):
        rng = random.Random(seed)
        figure = build(sample(rng, step), rng)
        placed, radius = diagram.place(figure, 84, rng)
        for points in (figure.points, placed):
            for angle in (*figure.given, figure.asked):
                assert measured(points, angle.corners) == pytest.approx(angle.degrees, abs=1e-6)
        assert all(0 < part < 84 for point in placed.values() for part in (point.real, point.imag))
        p = placed
        if family == "parallel":
            assert ((p["a"] - p["a'"]) / (p["b"] - p["b'"])).imag == pytest.approx(0, abs=1e-9)
        if family == "bisector":
            assert measured(p, "AOC") == pytest.approx(measured(p, "COB"))
        if family == "isosceles":
            assert abs(p["A"] - p["B"]) == pytest.approx(abs(p["A"] - p["C"]))
        if family == "exterior":
            assert measured(p, "BCD") == pytest.approx(180)
        if family == "inscribed":
            assert all(abs(p[name] - p["O"]) == pytest.approx(radius) for name in "ABC")
        if family == "tangent":
            assert abs(p["B"] - p["O"]) == pytest.approx(radius) and measured(
                p, "OBA"
            ) == pytest.approx(90)


def test_geometry_rejects_an_unknown_difficulty():
    with pytest.raises(UserError, match="difficulty is 5, but geometry has difficulties 1 to 4"):
        geometry.draw("train", 0, 0, 5)


def test_unknown_task_lists_the_known_ones():
    assert get_task("counting") is counting
    with pytest.raises(UserError, match="'chess', but the known tasks are counting, geometry"):
        get_task("chess")


def test_prompt_and_completion_as_in_r1v():
    example = counting.draw("train", 0, 0)
    assert format_problem(example) == (
        "How many items are there in the image? Output the thinking process in <think> </think> "
        "and final answer (number) in <answer> </answer> tags."
    )
    assert (
        format_solution(example)
        == f"<think>{example.thinking}</think><answer> {example.solution} </answer>"
    )
