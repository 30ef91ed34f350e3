"""The examples of docs/data.md: every row in it loads as the page says."""

import json
import re
from pathlib import Path

import pytest

from mr1_fast.tasks.data import DataOptions, load_examples

from ...data.pictures import colour, picture

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
BLOCKS = re.findall(r"```(json|csv|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def loaded(form, text, folder, columns=None):
    picture(1).save(folder / "a.png")
    (folder / f"rows.{form}").write_text(text, encoding="utf-8")
    options = DataOptions(columns=columns or {})
    return load_examples("free", str(folder / f"rows.{form}"), "train", 0, options=options).all(9)


def rows():
    """Return each example of a row with the columns that the flag above it names."""
    columns = {}
    for form, text in BLOCKS:
        if form == "sh":
            flag = re.search(r"^--columns '(.*)'$", text.strip())
            columns = json.loads(flag[1]) if flag else {}
        else:
            yield form, text, columns
            columns = {}


ROWS = list(rows())


def test_the_page_has_an_example_of_every_layout():
    assert len(ROWS) == 13 and sum(bool(columns) for *_, columns in ROWS) == 1


@pytest.mark.parametrize("form, text, columns", [row for row in ROWS if "What" not in row[1]])
def test_a_layout(form, text, columns, tmp_path):
    (item,) = loaded(form, text, tmp_path, columns)
    assert (item.problem, item.solution) == ("How many?", "3")
    shown = [colour(1)] if "a.png" in text else []
    assert [image.getpixel((0, 0)) for image in item.images] == shown
    assert item.source == f"row 1 of {tmp_path}/rows.{form}"
    worked = {"####": "One and two are 3.", "boxed": r"One and two are $\boxed{3}$."}
    worked["think"] = "One, two, three."
    assert item.thinking == next((way for mark, way in worked.items() if mark in text), "")


def test_the_places_of_images(tmp_path):
    (row,) = [row for row in ROWS if "What" in row[1]]
    (item,) = loaded(*row[:2], tmp_path)
    assert item.problem == "Before: <image> After: <image> What changed?"
    assert len(item.images) == 2
