r"""Worked solutions that end in their answer: GSM8K's after `####`, and MATH's in `\boxed{…}`."""

import re
from collections import deque

_CALCULATION = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's marks for a calculator, as in `48/2 = <<48/2=24>>24`."""
_BOXED = re.compile(r"\\boxed\s*\{")


def read_worked(text: str) -> tuple[str, str]:
    r"""Return the answer of a worked solution, and the working; the latter is empty without one.

    A text that ends with neither form of an answer is one itself.

    >>> read_worked("48/2 = <<48/2=24>>24 clips\n#### 24")
    ('24', '48/2 = 24 clips')
    >>> read_worked(r"Since $x = \frac{1}{2}$, it is $\boxed{\frac{1}{2}}$.")
    ('\\frac{1}{2}', 'Since $x = \\frac{1}{2}$, it is $\\boxed{\\frac{1}{2}}$.')
    >>> read_worked("24 clips")
    ('24 clips', '')
    """
    working, mark, answer = text.rpartition("####")
    answer = answer.strip()
    if mark and answer and "\n" not in answer and (not working or working.endswith("\n")):
        return answer, _CALCULATION.sub("", working).strip()
    boxed = _last_boxed(text)
    if boxed is None:
        return text, ""
    start, end = boxed
    alone = not text[:start].strip(" $") and not text[end + 1 :].strip(" $.")
    return text[text.index("{", start) + 1 : end].strip(), "" if alone else text


def _last_boxed(text: str) -> tuple[int, int] | None:
    r"""Return where the last `\boxed{…}` begins and where its closing brace stands, or None.

    It is None, too, where there is nothing inside, or no brace closes it.
    """
    last = deque(_BOXED.finditer(text), maxlen=1)
    if not last:
        return None
    found, depth = last[0], 1
    for brace in re.finditer(r"(?<!\\)(?:\\\\)*([{}])", text[found.end() :]):
        depth += 1 if brace[1] == "{" else -1
        if depth == 0:
            end = found.end() + brace.end() - 1
            return (found.start(), end) if text[found.end() : end].strip() else None
    return None
