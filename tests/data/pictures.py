"""Pictures of one colour each, and rows of data that hold or name them."""

import io
import json

import datasets
from PIL import Image


def colour(index):
    return (index * 20 % 256, 100, 200)


def picture(index):
    return Image.new("RGB", (28, 28), colour(index))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    return str(path)


def contents(examples):
    """Return what makes examples equal."""
    return [
        (item.problem, *(image.tobytes() for image in item.images), item.solution, item.key)
        for item in examples
    ]


ROW = {"image": "1.png", "problem": "?", "solution": "1"}
"""A row of data in R1-V's columns."""


def table(size=5, **columns):
    """A data set in R1-V's columns with embedded images."""
    rows = {
        "image": [{"bytes": encoded(picture(index)), "path": None} for index in range(size)],
        "problem": [f"How many? {index}" for index in range(size)],
        "solution": [f"<answer> {index} </answer>" for index in range(size)],
    }
    made = datasets.Dataset.from_dict(
        {name: cells for name, cells in (rows | columns).items() if cells is not None}
    )
    return made.cast_column("image", datasets.Image())


def folder_of_lines(folder, **columns):
    """A folder with three image files and a list of JSON lines that names them."""
    folder.mkdir()
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
    write_lines(
        folder / "train.jsonl", [ROW | {"image": f"{index}.png"} | columns for index in range(3)]
    )
    return folder


def in_format(image, name, **options):
    """The bytes of an image in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(size=80):
    """A picture whose file is not small."""
    return Image.effect_noise((size, size), 50)
