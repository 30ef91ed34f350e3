"""What the judge made of each output, for `--explain`."""

from ..errors import printable

SHOWN_CHARACTERS = 80
"""How much of a text is shown."""


def explanation(record: dict) -> str:
    """Return a line for each output of a record of `accuracy.judged`.

    It has the verdict, the reason, the end of the output and the item's key, for example
    `wrong · 12 km is not 12 m · <answer>12 km</answer> · row 3`. Control characters of a model are
    escaped, since a terminal would obey them.
    """
    lines = []
    for output, correct, why in zip(
        record["outputs"], record["correct"], record["why"], strict=True
    ):
        verdict = "right" if correct else "wrong"
        lines.append(f"{verdict} · {why} · {_shown(output)} · {_shown(record['key'])}")
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Return the end of a text, where the answer is, on one printable line."""
    end = text.strip()[-SHOWN_CHARACTERS:]
    shown = printable(end).replace("\n", "\\n")
    return ("…" if len(text.strip()) > SHOWN_CHARACTERS else "") + shown
