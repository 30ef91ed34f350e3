"""Rows by their number: the same from a list and from a `datasets.Dataset`, images encoded."""

import struct

import datasets
import pyarrow as pa
import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.loaded import LoadedExamples
from mr1_fast.tasks.data.table import Table

from ...data.pictures import encoded, picture

needs_json = pytest.mark.skipif(
    not hasattr(datasets, "Json"), reason="this version of datasets has no type for mixed values"
)

MIXED = [
    {"solution": 3, "parts": [{"text": "a"}, "b"], "n": 1},
    {"solution": "145°", "parts": [], "n": None},
    {"solution": None, "parts": None, "n": 3},
]


@needs_json
def test_mixed_values_that_datasets_keeps_as_json():
    rows = datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")
    assert any(type(feature).__name__ == "Json" for feature in rows.features.values())
    table = Table(rows)
    assert table.names == Table(MIXED).names == ["solution", "parts", "n"]
    assert [table.row(index) for index in range(len(table))] == MIXED


@needs_json
def test_json_inside_lists_and_objects():
    features = datasets.Features(
        {
            "a": datasets.List(datasets.Json()),
            "b": {"c": datasets.Json(), "d": datasets.Value("int64")},
        }
    )
    rows = [{"a": [{"x": 1}, 2, "y"], "b": {"c": [1, "z"], "d": 4}}, {"a": None, "b": None}]
    table = Table(datasets.Dataset.from_list(rows, features=features))
    assert table.row(0) == rows[0]
    assert table.row(1)["a"] is None


@needs_json
@pytest.mark.parametrize("cell", ["{", "[" * 100_000])
def test_broken_json_in_a_cell_is_named(cell):
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array([cell]))
    info = datasets.DatasetInfo(features=datasets.Features({"a": datasets.Json()}))
    rows = datasets.Dataset(pa.table({"a": cells}), info=info)
    with pytest.raises(UserError, match=r"^row 1 has in 'a' no JSON .*leave the row out\.$"):
        Table(rows).row(0)


def test_images_stay_encoded():
    cell = {"bytes": encoded(picture(1)), "path": None}
    rows = datasets.Dataset.from_dict({"image": [cell], "problem": ["?"]})
    table = Table(rows.cast_column("image", datasets.Image()))
    assert table.row(0) == {"image": cell, "problem": "?"}


def test_names_of_rows_that_differ():
    assert Table([{"a": 1}, {"b": 2, "a": 3}]).names == ["a", "b"]


def test_a_broken_file_of_arrow_is_a_fault_of_its_rows(tmp_path):
    """Arrow trusts the places of texts in a file, and would read memory that is not its own."""
    texts = pa.table({"problem": ["abc", "de"], "solution": ["3", "4"]})
    path = tmp_path / "d.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, texts.schema) as writer:
        writer.write_table(texts)
    content, places = path.read_bytes(), struct.pack("<iii", 0, 3, 5)
    assert content.count(places) == 1
    for ends in ((0, 3, 2**30), (0, 3, 2), (0, -(2**30), 3)):
        path.write_bytes(content.replace(places, struct.pack("<iii", *ends)))
        examples = LoadedExamples(datasets.Dataset.from_file(str(path)), "d.arrow", 0)
        with pytest.raises(UserError, match=r"row 2 of d.arrow cannot be read \(ArrowInvalid"):
            examples.read(1)
    path.write_bytes(content.replace(b"abcde", b"abc\xff\xfe"))
    examples = LoadedExamples(datasets.Dataset.from_file(str(path)), "d.arrow", 0)
    assert examples.read(0).problem == "abc"
    with pytest.raises(UserError, match=r"row 2 of d.arrow cannot be read"):
        examples.read(1)
