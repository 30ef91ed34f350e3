"""Loaded examples: every kind of row and image that data may hold, read when it is taken."""

import pytest
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples
from mr1_fast.tasks.data.loaded import LoadedExamples

from ...data.pictures import (
    ROW,
    colour,
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
    table(thinking=["1", "2", " ", "4", "5"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 3 of .* has no 'thinking'"):
        load_examples("counting", str(tmp_path), "train", 0).require_thinking()
    load_examples("counting", str(tmp_path), "train", 0, limit=2).require_thinking()
