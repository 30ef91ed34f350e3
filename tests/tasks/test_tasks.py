"""The drawn tasks: repeatable items, splits that share nothing, prompts and solutions."""

import hashlib
from dataclasses import replace
from typing import get_args

import pytest

from mr1_fast.config import TaskName
from mr1_fast.errors import UserError
from mr1_fast.tasks import DRAWN_TASKS, TASKS, counting, format_problem, format_solution, get_task
from mr1_fast.tasks.split import SPLITS

WITH_IMAGES = {name: task for name, task in DRAWN_TASKS.items() if task.draws_images}


def image_hash(example):
    return hashlib.sha256(example.images[0].tobytes()).hexdigest()


def test_splits_share_no_parameters_and_no_images(drawn):
    with_images = bool(drawn["train"][0].images)
    for seen in (lambda example: example.key, image_hash)[: 1 + with_images]:
        train, validation, test = ({seen(example) for example in drawn[split]} for split in SPLITS)
        assert not train & validation and not train & test and not validation & test


@pytest.mark.parametrize("drawn", WITH_IMAGES, indirect=True)
def test_no_image_is_fixed_by_its_parameters(drawn):
    for examples in drawn.values():
        assert len({image_hash(example) for example in examples}) == len(examples)


@pytest.mark.parametrize("task", DRAWN_TASKS.values(), ids=DRAWN_TASKS)
def test_the_arguments_determine_the_item_and_each_matters(task):
    def fingerprint(*arguments):
        example = task.draw(*arguments)
        looks = image_hash(example) if example.images else example.key
        return example.problem, example.solution, example.thinking, example.key, looks

    assert fingerprint("test", 3, 14, 1) == fingerprint("test", 3, 14, 1)
    others = [("validation", 3, 14, 1), ("test", 4, 14, 1), ("test", 3, 15, 1), ("test", 3, 14, 2)]
    assert all(fingerprint("test", 3, 14, 1)[-1] != fingerprint(*other)[-1] for other in others)


@pytest.mark.parametrize("task", WITH_IMAGES.values(), ids=WITH_IMAGES)
@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_images_are_square_rgb_in_whole_tokens(task, difficulty):
    image = task.draw("train", 0, 0, difficulty).images[0]
    assert image.mode == "RGB" and image.width == image.height and image.width % 28 == 0


@pytest.mark.parametrize("task", WITH_IMAGES.values(), ids=WITH_IMAGES)
def test_an_item_that_is_not_painted_is_the_same_without_its_images(task):
    for arguments in (("train", 0, 7, 1), ("test", 1, 3, 3)):
        item = task.draw(*arguments)
        assert item.images and task.draw(*arguments, painted=False) == replace(item, images=())


@pytest.mark.parametrize("task", DRAWN_TASKS.values(), ids=DRAWN_TASKS)
@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_what_supervised_training_imitates_counts_as_right(task, difficulty):
    for index in range(40):
        example = task.draw("train", 5, index, difficulty)
        assert task.is_correct(format_solution(example), example.solution)
        wrong = replace(
            example, solution=example.solution.replace(example.solution.rstrip("°"), "181")
        )
        assert not task.is_correct(format_solution(wrong), example.solution)


@pytest.mark.parametrize("task", DRAWN_TASKS.values(), ids=DRAWN_TASKS)
def test_a_task_draws_images_or_text_alone(task):
    assert {bool(task.draw("test", 0, index).images) for index in range(20)} == {task.draws_images}


def test_unknown_task_lists_the_known_ones():
    assert get_task("counting").draw is counting.draw
    assert tuple(TASKS) == get_args(TaskName), "what the settings allow"
    with pytest.raises(UserError, match="'chess', but the known tasks are counting, geometry"):
        get_task("chess")


def test_the_judges_of_a_task():
    """R1-V evaluates counting by the first tagged integer, and trains by math-verify."""
    task = get_task("counting")
    two = "<answer> 5 </answer> and <answer>6</answer>"
    assert not task.is_correct(two, "5")
    assert task.judge("r1v")(two, "5").right
    hacked = "<think>the total is 5</think><answer></answer>"
    assert task.judge("r1v", training=True)(hacked, "5").right
    assert not task.judge("r1v")(hacked, "5").right
    assert not task.judge("strict", training=True)(hacked, "5").right


def test_the_free_task_draws_nothing_and_judges_a_completion_without_tags():
    free = get_task("free")
    assert free.draw is None
    assert free.is_correct("B", "B") and free.is_correct("<answer>B</answer>", "B")
    assert not free.is_correct("B <answer></answer>", "B")
    assert not get_task("geometry").is_correct("B", "B")


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
