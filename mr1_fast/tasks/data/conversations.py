"""Problems and answers that data writes as a conversation, in the forms of several libraries."""

import json
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError, shortened
from ..prompts import IMAGE_MARK
from .marks import with_marks

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""The role of a message by the word for it: OpenAI's words and ShareGPT's."""
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


@dataclass
class Conversation:
    """A question of one turn, with its answer if the data has one."""

    problem: str = ""
    """The user's message, with a mark `<image>` for each image."""
    marked: list[Any] = field(default_factory=list)
    """For each mark, the image that the message itself holds, or None."""
    answer: str | None = None
    """The assistant's message."""
    system: str | None = None
    """The system message."""


def is_conversation(value: Any) -> bool:
    """Return whether a cell is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def read_conversation(value: Any, column: str, name: str) -> Conversation:
    """Read a list of messages: `{"role", "content"}` or `{"from", "value"}`, or JSON of them.

    Content is a text, or a list of parts that are texts and images. Raises UserError, which calls
    the row `name`, for another form and for more than one question.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not is_conversation(value):
        raise UserError(
            f'{name} has in {column!r} no list of messages: write [{{"role": "user", "content": '
            '"…"}], or a text.'
        )

    read = Conversation()
    roles = []
    for message in value:
        word = str(message.get("role") or message.get("from"))
        role = ROLES.get(word.lower())
        text, marked = _content(message.get("content", message.get("value")), column, name)
        roles.append(role)
        if role == "user":
            read.problem, read.marked = text, marked
        elif role is None or any(cell is not None for cell in marked):
            word = shortened(repr(word), 40)
            what = f"a message of {word}" if role is None else f"an image of {word}"
            raise UserError(
                f"{name} has in {column!r} {what}, but only users show images, and only user, "
                "assistant and system speak: leave the row out."
            )
        elif role == "assistant":
            read.answer = text
        else:
            read.system = text
    if [role for role in roles if role != "system"] not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{name} has in {column!r} a conversation of {roles.count('user')} user and "
            f"{roles.count('assistant')} assistant messages, but a problem is one user message, "
            "which one answer may follow: make a row of each question."
        )
    return read


def _is_message(value: Any) -> bool:
    """Return whether a value is a message of a conversation."""
    return isinstance(value, dict) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def _content(content: Any, column: str, name: str) -> tuple[str, list[Any]]:
    """Return a message's text, and for each mark in it the image that the message holds."""
    texts, marked = [], []
    for part in content if isinstance(content, list) else [content]:
        kind, text = "text", part
        if isinstance(part, dict):
            image = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            kind = part.get("type") or ("text" if image is None else "image")
            text = part.get("text")
        if kind in _IMAGE_PARTS:
            texts.append(IMAGE_MARK)
            marked.append(image)
        elif kind in _TEXT_PARTS and (text is None or isinstance(text, str | int | float)):
            text = "" if text is None else with_marks(str(text))
            texts.append(text)
            marked += [None] * text.count(IMAGE_MARK)
        else:
            raise UserError(
                f"{name} has in {column!r} a part of the type {shortened(repr(kind), 40)} that is "
                "not understood: "
                "parts are texts and images."
            )
    return "".join(texts), marked
