"""The layouts of rows that are recognised: which column holds the images, problem and solution."""

import datetime
import decimal
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, shortened
from .conversations import Conversation, is_conversation, read_conversation
from .images import as_list
from .marks import place_images, with_marks
from .worked import read_worked

COLUMNS = {
    "images": (
        *("image", "images", "image_path", "image_paths", "image_url", "image_urls"),
        *("img", "file_name"),
    ),
    "problem": ("problem", "question", "query", "prompt", "messages", "conversations"),
    "solution": ("solution", "answer", "ground_truth", "reward_model.ground_truth"),
    "thinking": ("thinking",),
}
"""The columns that may hold a field of an example; in a row the first that is not empty counts."""

CONVERSATIONS = ("prompt", "messages", "conversations")
"""The columns whose last message may be the solution."""

LONGEST_TEXT = 2**22
"""The most characters of a text; no prompt can hold as many, and reading more takes minutes."""
SHOWN = 30
"""The most columns of data that a message names."""

Row = Mapping[str, Any]
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NUMBERED_IMAGE = re.compile(r"image_?(\d{1,3})")


@dataclass
class Fields:
    """What a row says, before its images are decoded."""

    problem: str
    solution: str
    thinking: str
    images: list[Any]
    """Images in any form, in the order of their places in the problem."""
    extra: dict[str, Any]
    """The other columns, and the message of the system as `system`."""


def check_columns(
    names: Sequence[str], columns: Mapping[str, str], source: str, lenient: bool = False
) -> dict[str, str]:
    """Return the columns that the user names and the data `source` has.

    `names` are all columns of the data. Raises UserError for an unknown field, for a column that is
    missing (unless `lenient`), and for data without a column for the problem or the solution.
    """
    found = found_names(names)
    for field, column in columns.items():
        if field not in COLUMNS:
            raise UserError(
                f"columns names {field!r}, but what a column may hold is {', '.join(COLUMNS)}: "
                "correct --columns."
            )
        if not lenient and _head(column, names) not in names:
            raise UserError(
                f"{source} has no column {column!r} for the {field} {found}: correct --columns."
            )
    columns = {key: column for key, column in columns.items() if _head(column, names) in names}

    for field in ("problem", "solution"):
        known = COLUMNS[field] + (CONVERSATIONS if field == "solution" else ())
        if field in columns or any(_head(column, names) in names for column in known):
            continue
        raise UserError(
            f"{source} has no column {one_of(COLUMNS[field])} {found}: rename the column that "
            f"""holds the {field}, or name it as in --columns '{{"{field}": "its name"}}'."""
        )
    return columns


def found_names(names: Sequence[str]) -> str:
    """Return the columns that data has, as messages name them; only the first of many."""
    shown = ", ".join(shortened(name, 40) for name in names[:SHOWN])
    return f"(found: {shortened(shown, 200)}{', …' * (len(names) > SHOWN)})"


def one_of(names: Sequence[str]) -> str:
    """Return names in quotes, with `or` before the last one."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


def holds_images(name: str) -> bool:
    """Return whether a column of this name is recognised as one of images."""
    return name in COLUMNS["images"] or _NUMBERED_IMAGE.fullmatch(name) is not None


def looks_like_images(value: Any) -> bool:
    """Return whether a cell holds an encoded image, the path of one, or a list of them."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"}
    if isinstance(value, str):
        return len(value) < 300 and value.lower().endswith(_IMAGE_SUFFIXES)
    return isinstance(value, bytes)


def read_fields(row: Row, columns: Mapping[str, str], name: str) -> Fields:
    """Return what a row says; `columns` name the columns of fields that are not recognised.

    Raises UserError, which calls the row `name`, for a row that is not understood.
    """
    column, value = _first(row, columns, "problem")
    talk = _conversation(row, columns, name)
    problem = _text(talk.problem, column, name) if talk else with_marks(_text(value, column, name))
    solution, thinking = _answer(row, columns, talk, name)

    images_column, images = _images(row, columns, name)
    images = _marked_images(talk.marked if talk else [], images, name)
    problem, images = place_images(problem, images, name)
    if not problem:
        raise UserError(f"{name} has no text in {column!r}: fill it in or leave the row out.")
    return Fields(
        problem=problem,
        solution=solution,
        thinking=thinking,
        images=images,
        extra=_extra(row, images_column, talk),
    )


def _conversation(row: Row, columns: Mapping[str, str], name: str) -> Conversation | None:
    """Return the conversation that is a row's problem; None where the problem is a text."""
    column, value = _first(row, columns, "problem")
    if is_conversation(value) or column in CONVERSATIONS[1:]:
        return read_conversation(value, column, name)
    return None


def _answer(
    row: Row, columns: Mapping[str, str], talk: Conversation | None, name: str
) -> tuple[str, str]:
    """Return the solution of a row, and the worked solution or an empty text."""
    way = ""
    column, value = _first(row, columns, "solution")
    if _missing(value) and talk and talk.answer is not None:
        column, value = "the assistant's message", talk.answer
    elif column == "solution" and "solution" not in columns and "answer" in row:
        # Beside an answer, a solution is the way to it, unless it has R1-V's tags.
        is_worked = isinstance(value, str) and "<answer>" not in value
        if is_worked and not _missing(row["answer"]):
            way = _text(value, column, name)
            column, value = "answer", row["answer"]

    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value:
        raise UserError(
            f"{name} has several values in {column!r}, and it is unclear whether all or any are "
            'required: write a text such as "3, 4" if all are, or leave the row out.'
        )
    solution = _text(value, column, name)
    bare = _text(_inside("answer", solution), column, name)
    if bare == solution:  # no tag says where the answer is
        bare, working = read_worked(solution)
        way = way if way not in ("", bare) else working

    thinking = _first(row, columns, "thinking")[1]
    if not _missing(thinking):
        return bare, _inside("think", _text(thinking, "thinking", name))
    return bare, _inside("think", solution) if "</think>" in solution else way


def _images(row: Row, columns: Mapping[str, str], name: str) -> tuple[str | None, list[Any]]:
    """Return the column that holds a row's images, and the images."""
    column, value = _first(row, columns, "images")
    if column == "image" and "images" not in columns:
        both = [list(as_list(row.get(each))) for each in ("image", "images")]
        if all(both) and both[0] != both[1]:
            raise UserError(
                f"{name} has images in both 'image' and 'images': leave one empty, or say which "
                """counts as in --columns '{"images": "images"}'."""
            )
    images = [cell for cell in as_list(value) if cell is not None]
    if not images and "images" not in columns:
        # MMMU has a column for each image.
        numbered = sorted(
            (int(found[1]), row[each])
            for each in row
            if (found := _NUMBERED_IMAGE.fullmatch(each)) and not _missing(row[each])
        )
        images = [cell for _, cell in numbered]
    return column, images


def _marked_images(marked: list[Any], images: list[Any], name: str) -> list[Any]:
    """Return the images of a row in the order of the marks in a conversation.

    `marked` has for each mark the image that the message holds, or None for the next of `images`.
    """
    if all(cell is None for cell in marked):
        return images
    places = marked.count(None)
    rest = iter(images)
    found = [next(rest, None) if cell is None else cell for cell in marked]
    if any(cell is None for cell in found) or (None in marked and next(rest, None) is not None):
        raise UserError(
            f"{name} has {places} place{'s' * (places != 1)} for images that its messages do not "
            f"hold, but {len(images)} images beside them: give one for each place."
        )
    return found


def _extra(row: Row, images: str | None, talk: Conversation | None) -> dict[str, Any]:
    """Return the columns of a row that are not themselves a field of an example."""
    own = {"problem", "solution", "thinking", "image", "images", images}
    extra = {
        key: value
        for key, value in row.items()
        if (key not in own or is_conversation(value)) and not _NUMBERED_IMAGE.fullmatch(key)
    }
    if talk and talk.system is not None:
        extra["system"] = talk.system
    return extra


def _first(row: Row, columns: Mapping[str, str], field: str) -> tuple[str | None, Any]:
    """Return the column of a row that holds a field, and its value.

    Where all are empty, the column is one that the row has, and the value is empty.
    """
    candidates = (columns[field],) if field in columns else COLUMNS[field]
    values = [(column, _at(row, column)) for column in candidates]
    filled = [pair for pair in values if not _missing(pair[1])]
    there = [(column, None) for column in candidates if _head(column, row) in row]
    return next(iter(filled or there), (candidates[0], None))


def _at(row: Row, column: str) -> Any:
    """Return a cell of a row; a dot reaches into objects. It is None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _head(column: str, names: Any) -> str:
    """Return the column that a dotted name reaches into, or the name itself if it is a column."""
    return column if column in names else column.split(".")[0]


def _missing(value: Any) -> bool:
    """Return whether a cell holds nothing."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == []


def _text(value: Any, column: str, name: str) -> str:
    """Return a cell as text; raises UserError, which calls the row `name`, if it holds none."""
    if _missing(value):
        raise UserError(f"{name} has no {column!r}: fill it in or leave the row out.")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers turns into one of fractions if a number is missing.
        value = int(value)
    known = str | int | float | decimal.Decimal | datetime.date | datetime.time
    if not isinstance(value, known) or value in (math.inf, -math.inf):
        raise UserError(
            f"{name} has in {column!r} a value that is neither a text nor a number "
            f"({type(value).__name__}): write a text."
        )
    text = str(value).strip()
    if len(text) > LONGEST_TEXT:
        raise UserError(
            f"{name} has in {column!r} {len(text):,} characters, more than {LONGEST_TEXT:,}: "
            "shorten the text or leave the row out."
        )
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(
            f"{name} has in {column!r} half a character (a lone surrogate): correct the text."
        )
    return text


def _inside(tag: str, text: str) -> str:
    """Return the text inside a tag, or all of it without one: `<answer> 3 </answer>` gives `3`."""
    start = text.find(f"<{tag}>") + len(tag) + 2
    end = text.find(f"</{tag}>", start)
    if f"<{tag}>" not in text or end < 0:
        return text.strip()
    return text[start:end].strip()
