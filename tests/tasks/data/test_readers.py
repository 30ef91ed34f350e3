"""Files of rows as text: what stands in them arrives, and a bad line is named."""

import json

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.readers import READERS


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return READERS[path.suffix](path)


ROWS = [{"a": 3, "b": "145°"}, {"a": "B", "b": None}, {"a": 2.5, "b": ["x", {"y": "007"}]}]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize(
    "name, text",
    [
        ("array.json", json.dumps(ROWS, indent=1)),
        ("object.json", json.dumps({"version": 2, "data": ROWS}, indent=1)),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("lines.jsonl", "\n\n" + "\n".join(map(json.dumps, ROWS)) + "\n\n"),
    ],
)
def test_all_forms_of_json_give_the_same_rows(name, text, ends, mark, tmp_path):
    assert read(tmp_path / name, mark + text.replace("\n", ends)) == ROWS


def test_one_object_is_one_row(tmp_path):
    row = {"data": "a text", "problem": "line\u2028separator"}
    for name in ("one.json", "one.jsonl"):
        assert read(tmp_path / name, json.dumps(row, ensure_ascii=False)) == [row]


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["unix", "windows"])
def test_cells_of_a_table_are_texts(suffix, separator, ends, tmp_path):
    lines = [
        ["image", "problem", "solution"],
        ["a.png", '"one, two\tthree ""four"""', "007"],
        ["", "None", "NA"],
        ["2020-01-01", "\u2028 null", "1e3"],
        ["true", '"two\nlines"', ""],
    ]
    text = "\ufeff" + ends.join(separator.join(line) for line in lines) + ends + ends
    rows = read(tmp_path / f"rows.{suffix}", text)
    assert [list(row.values()) for row in rows] == [
        ["a.png", 'one, two\tthree "four"', "007"],
        [None, "None", "NA"],
        ["2020-01-01", "\u2028 null", "1e3"],
        ["true", "two\nlines", None],
    ]
    assert all(list(row) == lines[0] for row in rows)


def test_a_cell_may_hold_a_large_image(tmp_path):
    cell = "A" * 3_000_000
    assert read(tmp_path / "rows.csv", f"image,problem\n{cell},x\n")[0]["image"] == cell


FAULTS = {
    "bad line": ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 of .*a.jsonl is not JSON"),
    "bad line of json": ("a.json", '{"a": 1}\n{"a": \n', "line 2 of .*a.json is not JSON"),
    "bad array": ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "line 3 of .*a.json is not JSON"),
    "bad object": ("a.json", '{\n"data": [\n{"a" 2}\n]}', "line 3 of .*a.json is not JSON"),
    "array of lists": ("a.json", '[{"a": 1}, [2]]', "row 2 of .*a.json is not a JSON object"),
    "a text": ("a.json", '"text"', "a.json is not an array of objects"),
    "a number a line": ("a.jsonl", '{"a": 1}\n7\n', "line 2 of .*a.jsonl is not a JSON object"),
    "deep": ("a.jsonl", "[" * 200_000, "line 1 of .*a.jsonl is not JSON"),
    "deep array": ("a.json", "[" * 200_000, "line 1 of .*a.json is not JSON"),
    "huge number": ("a.jsonl", f'{{"a": {"9" * 5000}}}', "line 1 of .*a.jsonl is not JSON"),
    "latin-1": ("a.jsonl", '{"a": 1}\n{"a": "145°"}'.encode("latin-1"), "line 2 of .*not UTF-8"),
    "latin-1 table": ("a.csv", "a\n145°\n".encode("latin-1"), "line 2 of .*a.csv is not UTF-8"),
    "too many cells": ("a.csv", 'a,b\n"1\n2",3\n1,2,3\n', "line 4 of .*row of 3 cells.* 2 columns"),
    "too few cells": ("a.csv", "a,b\n1\n", "line 2 of .* ends a row of 1 cells"),
    "open quote": ("a.csv", 'a,b\n1,"2\n3,4\n', "line 3 of .*a.csv is no row of a table"),
    "same name twice": ("a.csv", "a,b,a\n1,2,3\n", "a.csv has two columns 'a': give each its own"),
}


@pytest.mark.parametrize("name, content, message", FAULTS.values(), ids=FAULTS)
def test_a_bad_line_is_named(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name, content)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_many_columns_are_compared_in_linear_time(tmp_path):
    names = [f"c{number}" for number in range(100_000)]
    (tmp_path / "rows.csv").write_text(",".join(names))
    assert READERS[".csv"](tmp_path / "rows.csv") == []
    (tmp_path / "rows.csv").write_text(",".join([*names, "c7"]))
    with pytest.raises(UserError, match="two columns 'c7'"):
        READERS[".csv"](tmp_path / "rows.csv")
