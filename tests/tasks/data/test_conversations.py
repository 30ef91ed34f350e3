"""Conversations in the forms of several libraries, and those that are no problem."""

import json

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.conversations import is_conversation, read_conversation


def user(*parts):
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


ANSWER = {"role": "assistant", "content": "3"}
TEXT = {"type": "text", "text": "How many?"}
URL = {"url": "https://a/b.png"}

READ = {
    "OpenAI": ([user("How many?"), ANSWER], "How many?", [], "3", None),
    "ShareGPT": (
        [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "3"}],
        *("<image>How many?", [None], "3", None),
    ),
    "system": ([{"role": "system", "content": "Be brief."}, user("?")], "?", [], None, "Be brief."),
    "system in parts": (
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user("?")],
        *("?", [], None, "Be brief."),
    ),
    "TRL": ([user({"type": "image"}, TEXT)], "<image>How many?", [None], None, None),
    "images in parts": (
        [user({"type": "image", "image": "a.png"}, TEXT, {"type": "image_url", "image_url": URL})],
        *("<image>How many?<image>", ["a.png", URL], None, None),
    ),
    "Qwen's parts": (
        [user({"image": "a.png"}, {"text": "How many?"})],
        *("<image>How many?", ["a.png"], None, None),
    ),
    "a table's empty keys": (
        [user(TEXT | {"image": None}, {"type": "image", "text": None, "image": None})],
        *("How many?<image>", [None], None, None),
    ),
    "OpenAI's responses": (
        [user({"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": "x"})],
        *("?<image>", ["x"], None, None),
    ),
    "texts as parts": ([{"role": "user", "content": ["a", "b"]}], "ab", [], None, None),
    "Qwen's tokens": (
        [user("<|vision_start|><|image_pad|><|vision_end|>?")],
        *("<image>?", [None], None, None),
    ),
    "a number as answer": ([user("?"), {"role": "assistant", "content": 3}], "?", [], "3", None),
    "JSON": (json.dumps([user("How many?"), ANSWER]), "How many?", [], "3", None),
}


@pytest.mark.parametrize("value, problem, marked, answer, system", READ.values(), ids=READ)
def test_forms(value, problem, marked, answer, system):
    read = read_conversation(value, "messages", "row 1")
    assert (read.problem, read.marked) == (problem, marked)
    assert (read.answer, read.system) == (answer, system)


FAULTS = {
    "two questions": ([user("?"), ANSWER, user("And?"), ANSWER], "2 user and 2 assistant messages"),
    "another question": ([user("?"), ANSWER, user("And?")], "2 user and 1 assistant"),
    "no question": ([ANSWER], "0 user and 1 assistant"),
    "answer first": ([ANSWER, user("?")], "1 user and 1 assistant"),
    "a tool": ([user("?"), {"role": "tool", "content": "7"}], "a message of 'tool'"),
    "an image of the system": (
        [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, user("?")],
        "an image of 'system'",
    ),
    "a video": ([user({"type": "video", "video": "a.mp4"})], "a part of the type 'video'"),
    "a part in a part": ([user({"type": "text", "text": {"a": 1}})], "a part of the type 'text'"),
    "no messages": ({"role": "user"}, "no list of messages"),
    "a text": ("How many?", "no list of messages"),
    "deep JSON": ("[" * 100_000, "no list of messages"),
}


@pytest.mark.parametrize("value, message", FAULTS.values(), ids=FAULTS)
def test_what_is_no_problem_is_told(value, message):
    with pytest.raises(UserError, match=rf"^row 5 has in 'messages' .*{message}"):
        read_conversation(value, "messages", "row 5")


def test_lists_that_are_no_conversation():
    for value in ([], ["a"], [{"a": 1}], "text", None, [user("?"), "text"]):
        assert not is_conversation(value)
