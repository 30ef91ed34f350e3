"""Telling labels from formulas: ranges, scores, codes, sequences of letters and short words.

`20-30`, `B-C-A` and `is it` could be computed, but then `30-40`, `B-A-C` and `it is` would be the
same.
"""

import re

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
_WORD = "[A-Za-z]{1,2}"
_LABELS = [
    re.compile(rf"{_NUMBER}(?: ?- ?{_NUMBER})+"),  # 20-30, 1-3-2-4, 1.5-2.5, 1/2-3/4
    re.compile(rf"{_NUMBER} ?([A-Za-z]+)(?: ?- ?{_NUMBER} ?\1)+"),  # 5K-10K
    re.compile(r"[0-9]+(?: ?/ ?[0-9]+){2,}"),  # 3/4/24
    re.compile(r"[0-9]+ ?(?:st|nd|rd|th)", re.IGNORECASE),
    re.compile("n/a", re.IGNORECASE),
    # B-C-A, D C A B, is it, Wi-Fi; but x y and ln x are formulas.
    re.compile(rf"(?!.*\bl[ng]\b){_WORD}(?: ?[-/ ] ?{_WORD}){{2,}}"),
    re.compile(rf"(?!l[ng]\b|[a-z] [a-z]$){_WORD} {_WORD}"),
    re.compile(rf"[A-Za-z][a-z] ?- ?{_WORD}"),
]


def is_label(text: str) -> bool:
    """Return whether a normalised text is a label, which is not computed."""
    return any(pattern.fullmatch(text) for pattern in _LABELS)
