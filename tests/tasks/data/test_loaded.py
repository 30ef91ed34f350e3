"""Loaded examples: every kind of row and image that data may hold, read when it is taken."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from decimal import Decimal

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import DataOptions, load_examples
from mr1_fast.tasks.data.digests import digest_of
from mr1_fast.tasks.data.layouts import COLUMNS
from mr1_fast.tasks.data.loaded import LoadedExamples

from ...data.pictures import (
    ROW,
    colour,
    contents,
    encoded,
    picture,
    table,
)


def test_loaded_examples_come_once_per_epoch_in_a_new_order(tmp_path):
    table(10).to_parquet(tmp_path / "rows.parquet")
    examples = load_examples("counting", str(tmp_path), "train", 0, limit=8)
    epochs = [[example.solution for example in examples.take(step, 8)] for step in range(3)]
    assert all(sorted(epoch) == list("01234567") for epoch in epochs) and epochs[0] != epochs[1]
    other = load_examples("counting", str(tmp_path), "train", 1, limit=8)
    assert [[example.solution for example in other.take(step, 8)] for step in range(3)] != epochs


def test_image_root_and_every_kind_of_cell(tmp_path):
    picture(1).save(tmp_path / "1.png")
    cells = [
        "1.png",
        encoded(picture(1)),
        {"bytes": encoded(picture(1)), "path": None},
        {"path": "1.png"},
        picture(1),
    ]
    rows = [ROW | {"image": cell} for cell in [*cells, cells, None]]
    examples = LoadedExamples(rows, "rows", 0, image_root=tmp_path).all(9)
    assert [len(example.images) for example in examples] == [1, 1, 1, 1, 1, 5, 0]
    assert {image.getpixel((5, 5)) for example in examples for image in example.images} == {
        colour(1)
    }


def test_transparency_turns_white_and_rotation_is_applied(tmp_path):
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    turned, exif = Image.new("RGB", (56, 28)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    rows = [ROW | {"image": cell} for cell in (encoded(clear), str(tmp_path / "turned.jpg"))]
    first, second = LoadedExamples(rows, "rows", 0).all(2)
    assert first.images[0].getpixel((0, 0)) == (255, 255, 255)
    assert second.images[0].size == (28, 56)


def test_a_whole_number_that_a_table_made_a_fraction(tmp_path):
    table(2, solution=[3.0, 2.5]).to_parquet(tmp_path / "rows.parquet")
    assert [
        item.solution for item in load_examples("counting", str(tmp_path), "train", 0).all(2)
    ] == ["3", "2.5"]


def test_many_rows_are_not_decoded_before_they_are_taken():
    rows = [ROW | {"image": encoded(picture(2))}] + [ROW | {"image": "nowhere.png"}] * 69_999
    examples = LoadedExamples(rows, "rows", 0)
    assert len(examples) == 70_000 and len(examples.all(1)) == 1
    with pytest.raises(UserError, match=r"nowhere.png \(row 2 of rows\) is missing"):
        examples.all(2)


def test_supervised_training_needs_thinking(tmp_path):
    table().to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        UserError, match=r"no column 'thinking' \(found: image, problem, solution\): add it"
    ):
        load_examples("counting", str(tmp_path), "train", 0).require_thinking()
    table(thinking=[" ", "2", "3", "4", "5"]).to_parquet(tmp_path / "train.parquet")
    load_examples("counting", str(tmp_path), "train", 0).require_thinking()


def test_supervised_training_reads_the_reasoning_in_solutions():
    worked = ROW | {"solution": "<think>1</think><answer>1</answer>", "image": "nowhere.png"}
    LoadedExamples([worked, ROW], "rows", 0).require_thinking()
    LoadedExamples([worked | {"problem": ""}, ROW], "rows", 0).require_thinking()
    with pytest.raises(UserError, match="no column 'thinking'"):
        LoadedExamples([ROW, worked], "rows", 0).require_thinking()


def test_numbered_columns_of_images_are_recognised():
    rows = [{"problem": "<image 2> or <image 1>?", "answer": "A"}]
    rows[0] |= {f"image_{number}": encoded(picture(number)) for number in (1, 2)}
    (example,) = LoadedExamples(rows, "rows", 0).all(1)
    assert len(example.images) == 2 and example.problem == "<image> or <image>?"


def test_a_message_names_only_the_first_of_many_columns():
    rows = [{f"c{number}": 1 for number in range(100_000)}]
    with pytest.raises(UserError, match=r"found: c0, c1, .*, c29, …\)") as raised:
        LoadedExamples(rows, "rows", 0)
    assert len(str(raised.value)) < 600


def test_a_row_that_is_deep_has_a_digest():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert digest_of(deep) != digest_of([deep])


def test_rows_that_are_left_out_are_not_taken():
    rows = [{"problem": "?", "solution": str(index)} for index in range(10)]
    examples = LoadedExamples(rows, "rows", 0, limit=6)
    assert (list(examples.indices), len(examples)) == (list(range(10)), 6)
    examples.leave_out([0, 3])
    examples.leave_out([3, 7])
    assert [item.solution for item in examples.all(99)] == list("124568")  # the next take its place
    assert [item.solution for item in examples.all(2)] == list("12")
    epochs = [[item.solution for item in examples.take(step, 6)] for step in range(3)]
    assert all(sorted(epoch) == list("124568") for epoch in epochs)
    assert sorted(item.solution for item in examples.take_more(0, 6)) == list("124568")
    more = [item.solution for item in examples.take_more(0, 12)]
    assert [item.solution for item in examples.take_more(4, 8)] == more[4:]  # across two epochs
    assert more[:6] not in epochs and sorted(more[6:]) == list("124568")
    examples.leave_out([8, 9])
    assert (list(examples.indices), len(examples)) == ([1, 2, 4, 5, 6], 5)
    third = examples.read(3)  # also what is left out
    assert (third.solution, third.source, third.key) == ("3", "row 4 of rows", "row 4")
    examples.leave_out(range(10))
    assert len(examples) == 0


def test_a_digest_follows_the_cells_and_the_files(tmp_path):
    for name in ("1.png", "2.png"):
        picture(1).save(tmp_path / name)
    rows = [ROW, ROW | {"image": "2.png"}, ROW | {"solution": "2"}, dict(ROW), {"solution": "1"}]
    rows[-1]["problem"] = ["not understood"]

    def digests():
        examples = LoadedExamples(rows, "rows", 0, image_root=tmp_path)
        return [examples.digest(index) for index in range(len(rows))]

    before = digests()
    assert before[0] == before[3] and len(set(before)) == 4
    picture(2).resize((40, 40)).save(tmp_path / "1.png")
    after = digests()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False, False, True]


@pytest.mark.parametrize("as_list", [True, False])
def test_rows_may_be_read_from_several_threads(as_list, tmp_path):
    rows = table(40)
    examples = LoadedExamples(
        list(rows.with_format("arrow").to_list()) if as_list else rows, "r", 0
    )
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(examples.read, list(examples.indices) * 5))
    assert contents(read) == contents(examples.all(40)) * 5


def test_a_row_is_named_where_it_is_read():
    rows = [{"problem": "?", "solution": "1"}, {"problem": "?", "solution": None}]
    examples = LoadedExamples(rows, "rows.jsonl", 0)
    assert examples.read(0).source == "row 1 of rows.jsonl"
    with pytest.raises(UserError, match=r"row 2 of rows.jsonl has no 'solution'"):
        examples.read(1)


def test_columns_that_are_named_must_be_there():
    row = {"query": "?", "label": "1", "solution": "no"}
    options = DataOptions(columns={"problem": "query", "solution": "label"})
    item = LoadedExamples([row], "rows", 0, options=options).read(0)
    assert (item.problem, item.solution, item.extra) == ("?", "1", {"query": "?", "label": "1"})
    with pytest.raises(UserError, match=r"rows has no column 'label' .*\(found: query\)"):
        LoadedExamples([{"query": "?"}], "rows", 0, options=options)


def test_keys_are_short():
    long = "data:image/png;base64," + "A" * 20
    for cell in (encoded(picture(1)), {"bytes": encoded(picture(1)), "path": long}):
        assert LoadedExamples([ROW | {"image": cell}], "rows", 0).read(0).key == "row 1"


def test_conversations_in_tables(tmp_path):
    """A table gives every part and row all keys, empty where they were missing."""
    image = {"bytes": encoded(picture(1)), "path": None}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    rows = [
        {"images": [image], "prompt": [{"role": "user", "content": parts}], "answer": "3"},
        {"images": None, "prompt": [{"role": "user", "content": parts[1:]}], "answer": "4"},
    ]
    made = datasets.Dataset.from_list([row | {"reward_model": {"style": "rule"}} for row in rows])
    made.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "a.parquet")
    first, second = load_examples("free", str(tmp_path / "a.parquet"), "train", 0).all(2)
    assert (first.problem, first.solution, len(first.images)) == ("How many?", "3", 1)
    assert (second.problem, second.solution, second.images) == ("How many?", "4", ())
    assert first.extra["prompt"] == rows[0]["prompt"]
    assert first.extra["reward_model"] == {"style": "rule"}


KEYS = (
    *(each for names in COLUMNS.values() for each in names if "." not in each),
    *("image_1", "image_2", "reward_model", "system", "bytes", "path", "url", "type", "text"),
    *("role", "content", "from", "value"),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(4999, 5001).map(lambda digits: 10**digits),
    st.floats(),
    st.sampled_from([Decimal("sNaN"), Decimal("1e999999999"), date.max, timedelta.max, 1j, {1}]),
    st.sampled_from(["<image>", "<image 1>", "</think>3", "<answer>3</answer>", "#### 3", "user"]),
    st.sampled_from(["gpt", "text", "image", "/dev/zero", "../x.png", "data:,x", "http://x/"]),
    st.text(st.characters(), max_size=20),
    st.binary(max_size=20),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES, max_size=5)
FILLED = ROWS.map(lambda row: {"problem": "How many?", "solution": "3"} | row)


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(ROWS | FILLED)
@example({"problem": "p", "solution": Decimal("sNaN")})
@example({"problem": "p", "solution": "3", "image": [{"bytes": {"path": "/dev/zero"}}]})
def test_any_row_is_an_example_or_one_sentence(row):
    """Whatever the cells of a row hold, in any column, and nested in any way."""
    try:
        source = LoadedExamples([row], "data.jsonl", 0, image_root="/nowhere", fenced=True)
        source.fingerprint()
        source.require_thinking()
        source.digest(0)
        found = source.all(1)[0]
    except UserError as error:
        text = str(error)
        assert len(text) <= 500 and "\n" not in text and text.isprintable(), text
        assert "data.jsonl" in text
    else:
        (found.problem + found.solution + found.thinking + found.key).encode()
        assert found.problem and found.solution
