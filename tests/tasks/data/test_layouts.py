"""Layouts of rows: which column holds what, and one sentence for a row that is not understood."""

import datetime
import decimal
import math
import random

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.layouts import (
    COLUMNS,
    check_columns,
    looks_like_images,
    read_fields,
)


def fields(row, columns=None):
    read = read_fields(row, columns or {}, "row 4 of set")
    return read


ROW = {"image": "a.png", "problem": "How many?", "solution": "3"}
USER = {"role": "user", "content": "<image>How many?"}
PARTS = [{"type": "image"}, {"type": "text", "text": "How many?"}]
GPT = {"from": "gpt", "value": "<think> 1+2 </think>\n<answer> 3 </answer>"}

LAYOUTS = {
    "R1-V": ROW | {"solution": "<answer> 3 </answer>"},
    "R1-V's test set": {"image_path": "a.png", "question": "How many?", "ground_truth": 3},
    "EasyR1": {"images": ["a.png"], "problem": "How many?", "answer": "3"},
    "prompt": {"image": "a.png", "prompt": "How many?", "answer": "3"},
    "query": {"image_url": "a.png", "query": "How many?", "ground_truth": "3"},
    "ShareGPT": {"image": "a.png", "conversations": [{"from": "human", "value": "How many?"}, GPT]},
    "OpenAI": {"images": ["a.png"], "messages": [USER, {"role": "assistant", "content": "3"}]},
    "OpenAI and a solution": {"images": ["a.png"], "messages": [USER], "solution": "3"},
    "TRL": {"image": "a.png", "prompt": [{"role": "user", "content": PARTS}], "solution": "3"},
    "problem as messages": {"image": "a.png", "problem": [USER], "solution": "3"},
    "verl": {"images": ["a.png"], "prompt": [USER], "reward_model": {"ground_truth": "3"}},
    "image in the message": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, PARTS[1]]}],
        "answer": "3",
    },
    "image in the message and beside it": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, PARTS[1]]}],
        "answer": "3",
    },
    "empty columns of a table": ROW
    | {"images": [], "question": None, "answer": None, "ground_truth": "", "messages": None},
    "MMMU": {"question": "<image 1>How many?", "image_1": "a.png", "image_2": None, "answer": "3"},
    "imagefolder": {"file_name": "a.png", "problem": "How many?", "solution": "3"},
    "answer and its way": ROW | {"solution": "As 1 + 2 is 3, it is \\boxed{3}.", "answer": "3"},
    "answer and R1-V's solution": ROW | {"solution": "<answer>3</answer>", "answer": "C"},
    "a list of one": ROW | {"solution": ["3"]},
}


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(row):
    read = fields(row)
    assert (read.problem, read.solution, read.images) == ("How many?", "3", ["a.png"])


@pytest.mark.parametrize(
    "cell, text",
    [
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        ("145°", "145°"),
        ("007", "007"),
        ("None", "None"),
        (True, "true"),
        (decimal.Decimal("2.50"), "2.50"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (1e22, "10000000000000000000000"),
        ("<answer> x <answer> y </answer>", "x <answer> y"),
        ("</answer><answer>z", "</answer><answer>z"),
    ],
)
def test_solutions_become_text(cell, text):
    assert fields(ROW | {"solution": cell}).solution == text


def test_images_of_each_row():
    assert fields({"problem": "?", "solution": "1"}).images == []
    for row in ({"image": None}, {"images": []}, {"images": None, "image": ""}, {"images": [None]}):
        assert fields({"problem": "?", "solution": "1"} | row).images == []
    assert fields(ROW | {"image": None, "images": ["b", "c"]}).images == ["b", "c"]
    assert fields(ROW | {"images": ["a.png"]}).images == ["a.png"]
    assert fields(ROW | {"image_path": "elsewhere.png"}).images == ["a.png"]
    three = {"question": "?", "answer": "1", "image_10": "c", "image_2": "b", "image_1": "a"}
    assert fields(three).images == ["a", "b", "c"]


def test_images_of_messages_and_of_columns_take_their_places():
    parts = [{"type": "image", "image": "b"}, {"type": "text", "text": "is"}, {"type": "image"}]
    row = {"images": ["c"], "prompt": [{"role": "user", "content": parts}], "answer": "1"}
    read = fields(row)
    assert (read.problem, read.images) == ("<image>is<image>", ["b", "c"])
    for images in ([], ["c", "d"]):
        with pytest.raises(UserError, match=f"row 4 of set has 1 place .* but {len(images)} imag"):
            fields(row | {"images": images})


def test_worked_solutions():
    assert fields(ROW).thinking == ""
    assert fields(ROW | {"thinking": "<think> 1+2 </think>"}).thinking == "1+2"
    assert fields(ROW | {"thinking": "1+2"}).thinking == "1+2"
    assert fields(LAYOUTS["ShareGPT"]).thinking == "1+2"
    assert fields(ROW | {"thinking": " ", "solution": "<think>x</think>3"}).thinking == "x"


GSM8K = "Half of 48 is 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 1,072"
MATH = r"Since $2x = 1$, it is $\boxed{\frac{1}{2}}$. \(x > 0\)"
ENDS = {
    "GSM8K": ({"answer": GSM8K}, "1,072", "Half of 48 is 48/2 = 24.\nIn all 48+24 = 72."),
    "GSM8K without a way": ({"answer": "#### 72"}, "72", ""),
    "only the last line": ({"answer": "#### a\nb\n#### c"}, "c", "#### a\nb"),
    "a heading": ({"answer": "#### Way\nIt is 3"}, "#### Way\nIt is 3", ""),
    "within a line": ({"answer": "see #### 3"}, "see #### 3", ""),
    "no number": ({"answer": "It is 3\n####"}, "It is 3\n####", ""),
    "MATH": ({"solution": MATH}, r"\frac{1}{2}", MATH),
    "MATH-500": ({"solution": MATH, "answer": "0.5"}, "0.5", MATH),
    "the last box": ({"solution": r"\boxed{1}, so \boxed {2}"}, "2", r"\boxed{1}, so \boxed {2}"),
    "braces that are text": ({"solution": r"So \boxed{\{1\}}"}, r"\{1\}", r"So \boxed{\{1\}}"),
    "a box alone": ({"answer": r"$\boxed{2}$."}, "2", ""),
    "an open box": ({"answer": r"It is \boxed{2"}, r"It is \boxed{2", ""),
    "an empty box": ({"answer": r"It is \boxed{ }"}, r"It is \boxed{ }", ""),
    "a box in tags": ({"solution": r"<answer>\boxed{2} a</answer>"}, r"\boxed{2} a", ""),
    "thoughts and a box": (
        {"messages": [USER, {"role": "assistant", "content": r"<think>1+2</think> \boxed{3}"}]},
        "3",
        "1+2",
    ),
    "a way of its own": ({"solution": MATH, "answer": "1", "thinking": "x"}, "1", "x"),
    "twice the same": ({"solution": "3", "answer": "3"}, "3", ""),
}


@pytest.mark.parametrize("row, solution, thinking", ENDS.values(), ids=ENDS)
def test_worked_solutions_that_end_in_the_answer(row, solution, thinking):
    problem = {} if "messages" in row else {"question": "How many?"}
    read = fields(row | problem | ({"images": ["a.png"]} if "messages" in row else {}))
    assert (read.solution, read.thinking) == (solution, thinking)
    assert read.images == (["a.png"] if "messages" in row else [])


def test_long_texts_of_braces_and_boxes_take_no_time():
    for text in ("\\boxed{" * 50_000, "\\" * 99_999 + "\\boxed{" + "\\" * 99_999, "<<" * 99_999):
        assert fields({"problem": "?", "solution": text + "\n."}).thinking == ""


def test_all_other_columns_are_kept():
    row = ROW | {"options": ["A", "B"], "question": "raw", "level": 3, "thinking": "x"}
    assert fields(row).extra == {"options": ["A", "B"], "question": "raw", "level": 3}
    system = {"role": "system", "content": "Be brief."}
    row = {"images": ["a.png"], "prompt": [system, USER], "reward_model": {"ground_truth": "3"}}
    extra = {"prompt": row["prompt"], "reward_model": {"ground_truth": "3"}, "system": "Be brief."}
    assert fields(row).extra == extra
    assert fields(ROW | {"problem": [USER]}).extra == {"problem": [USER]}


def test_named_columns():
    row = {"photo": "a.png", "problem": "not this", "text": {"q": "How many?"}, "a.b": "3"}
    columns = {"images": "photo", "problem": "text.q", "solution": "a.b"}
    assert check_columns(list(row), columns, "set") == columns
    read = fields(row, columns)
    assert (read.problem, read.solution, read.images) == ("How many?", "3", ["a.png"])
    assert fields(ROW | {"answer": "4"}, {"solution": "solution"}).solution == "3"
    assert fields(ROW | {"images": ["b"]}, {"images": "images"}).images == ["b"]
    with pytest.raises(UserError, match=r"row 4 of set has no 'text.q': fill it in"):
        fields(row | {"text": None}, columns)


@pytest.mark.parametrize(
    "names, columns, message",
    [
        (
            ["image", "problem"],
            {},
            r"set has no column 'solution', 'answer', .*\(found: image, pro",
        ),
        (["image", "answer"], {}, r"set has no column 'problem', .* or 'conversations' \(found"),
        (["a", "b"], {"problem": "a"}, "set has no column 'solution'.* --columns '{\"solution\": "),
        (["a"], {"text": "a"}, "columns names 'text', but .* images, problem, solution, thinking"),
        (
            ["problem", "answer"],
            {"images": "x.y"},
            r"no column 'x.y' for the images \(found: probl",
        ),
    ],
)
def test_missing_columns(names, columns, message):
    with pytest.raises(UserError, match=message):
        check_columns(names, columns, "set")


def test_held_out_data_may_have_other_columns():
    names = ["image", "question", "ground_truth"]
    assert check_columns(names, {"problem": "query", "images": "image"}, "set", lenient=True) == {
        "images": "image"
    }


FAULTS = {
    "no problem": ({"problem": None}, "has no 'problem': fill it in"),
    "blank problem": ({"problem": " \n"}, "has no 'problem': fill it in"),
    "only images": ({"problem": "<image>"}, "has no text in 'problem'"),
    "no solution": ({"solution": None}, "has no 'solution': fill it in"),
    "not a number": ({"solution": math.nan}, "has no 'solution': fill it in"),
    "blank solution": ({"solution": ""}, "has no 'solution': fill it in"),
    "blank answer": ({"solution": "<answer> </answer>"}, "has no 'solution': fill it in"),
    "no values": ({"solution": []}, "has no 'solution': fill it in"),
    "an empty value": ({"solution": [""]}, "has no 'solution': fill it in"),
    "several values": ({"solution": ["3", "three"]}, "several values in 'solution'.*\"3, 4\""),
    "object as solution": ({"solution": {"a": 1}}, r"in 'solution' a value that .* \(dict\)"),
    "list in a list": ({"solution": [["3", "4"]]}, "several values in 'solution'"),
    "bytes": ({"solution": b"3"}, r"in 'solution' a value that is neither .* \(bytes\)"),
    "infinite": ({"solution": math.inf}, "in 'solution' a value that is neither"),
    "list as problem": ({"problem": ["How", "many?"]}, r"in 'problem' a value .* \(list\)"),
    "object as problem": ({"problem": {"text": "?"}}, r"in 'problem' a value .* \(dict\)"),
    "half a character": ({"problem": "how \ud83d"}, "half a character"),
    "marks": ({"problem": "<image> or <image>?"}, "2 marks <image> .* but 1 image:"),
    "two kinds of images": ({"images": ["b", "c"]}, "images in both 'image' and 'images'"),
    "text as messages": (
        {"problem": None, "messages": "How many?"},
        "has in 'messages' no list of messages",
    ),
    "two questions": (
        {"problem": None, "prompt": [USER, USER]},
        "has in 'prompt' a conversation of 2 user",
    ),
    "no answer": (
        {"problem": None, "solution": None, "messages": [USER]},
        "has no 'solution': fill it in",
    ),
}


@pytest.mark.parametrize("cells, message", FAULTS.values(), ids=FAULTS)
def test_a_row_that_is_not_understood(cells, message):
    with pytest.raises(UserError, match=rf"^row 4 of set .*{message}") as raised:
        fields(ROW | cells)
    assert "\n" not in str(raised.value)


def test_what_looks_like_images():
    yes = [
        "a.png",
        "b/C.JPG",
        ["a.webp"],
        b"\x89PNG",
        {"bytes": b"", "path": None},
        [{"path": "x"}],
    ]
    no = ["text", "see a.png now", 3, None, [], {}, {"a": 1}, ["A", "B"], "x" * 400 + ".png"]
    assert all(map(looks_like_images, yes)) and not any(map(looks_like_images, no))


def test_hostile_solutions_take_linear_time():
    for text in ("<answer>" * 300_000, "<think>" * 300_000 + "<answer>3</answer>"):
        assert fields(ROW | {"solution": text}).thinking == ""


NUMBERS = [3, 2.5, math.nan, -math.inf, True, 10**300, None, b"x", {}, []]
TEXTS = [
    "",
    " ",
    "?",
    "<image>",
    "<image 1>",
    "\ud800",
    "user",
    "gpt",
    "<answer>",
    "</think>4",
    "[{",
]


def anything(rng, depth=3):
    """A value as hostile data may hold it in any cell."""
    if depth and rng.random() < 0.4:
        keys = ["role", "content", "from", "value", "type", "text", "image", "url", "ground_truth"]
        inner = [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
        return rng.choice([inner, {rng.choice(keys): each for each in inner}])
    return rng.choice(rng.choice([NUMBERS, TEXTS]))


def test_any_row_is_understood_or_refused():
    rng = random.Random(0)
    columns = [name for names in COLUMNS.values() for name in names if "." not in name]
    understood = 0
    for _ in range(20_000):
        row = {name: anything(rng) for name in rng.sample(columns, 5)} | {"reward_model": {}}
        if rng.random() < 0.5:
            row |= {"problem": "<image>" * rng.randrange(2) + "?", "solution": rng.choice("ab")}
        try:
            read = read_fields(row, {}, "row 4 of set")
        except UserError as error:
            assert str(error).startswith("row 4 of set "), error
            continue
        understood += 1
        assert read.problem and read.solution and isinstance(read.thinking, str)
        (read.problem + read.solution + read.thinking).encode()
        assert read.problem.count("<image>") in (0, len(read.images))
    assert 2_000 < understood < 18_000
