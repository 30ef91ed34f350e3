"""The lines of `--explain`."""

from mr1_fast.evaluate.explain import explanation

RECORD = {
    "key": "row 3",
    "outputs": ["<answer>12 km</answer>", "\x1b[2J" + "so " * 50 + "<answer>12 m</answer>\n"],
    "correct": [False, True],
    "why": ["12 km is not 12 m", "the same text"],
}


def test_each_output_has_its_verdict_its_reason_and_its_end():
    first, second = explanation(RECORD).split("\n")
    assert first == "wrong · 12 km is not 12 m · <answer>12 km</answer> · row 3"
    assert second.startswith("right · the same text · …")
    assert second.endswith("<answer>12 m</answer> · row 3")


def test_no_control_character_of_a_model_reaches_the_terminal():
    record = RECORD | {"outputs": ["\x1b[2J\r\n\u202e", "\ud800"], "key": "a\x07"}
    text = explanation(record)
    assert text.count("\n") == 1 and text.replace("\n", "").isprintable()
