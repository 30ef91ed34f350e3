"""One way of writing for answers and solutions: Unicode, LaTeX and Markdown become plain text.

`normalise` changes how a text is written and never what it says. All patterns take linear time.
"""

import re
import unicodedata

_CHARACTERS = {
    **{chr(code): "-" for code in (0x2010, 0x2011, 0x2012, 0x2013, 0x2212, 0xFE63, 0xFF0D)},
    **dict.fromkeys("·⋅∙•∗", "*"),
    **dict.fromkeys("∶", ":"),
    **dict.fromkeys("⁄∕÷", "/"),
    **dict.fromkeys("º˚∘", "°"),
    **dict.fromkeys("≤⩽≦", "≤"),
    **dict.fromkeys("≥⩾≧", "≥"),
    **dict.fromkeys("μµ", "μ"),
    **dict.fromkeys("，﹐", ","),
    **dict.fromkeys("；", ";"),
    **dict.fromkeys("。．｡", "."),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("‘’′", "'"),
    "∡": "∠",
    "Ω": "Ω",
    "㎝": "cm",
    "㎜": "mm",
    "㎞": "km",
    "㎏": "kg",
    "㎡": "m^{2}",
    "㎥": "m^{3}",
    "㎠": "cm^{2}",
    "㎢": "km^{2}",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_GROUPS = re.compile(
    r"(?<![\d.,])(?<!\d[ \xa0])([1-9]\d{0,2}(?:(?:[ \xa0\u2009\u202f]|\\,|\{,\}|,\\!)\d{3})+)"
    r"(?![\d.]*[\u2009\u202f]| ?[\d/]| ?\\[dt]?frac)"
)
"""Thousands with spaces between, as in 12 345."""

_GREEK = {
    **dict(alpha="α", beta="β", gamma="γ", delta="δ", epsilon="ε", varepsilon="ε", zeta="ζ"),
    **dict(eta="η", theta="θ", vartheta="θ", iota="ι", kappa="κ", mu="μ", nu="ν", xi="ξ"),
    **dict(rho="ρ", sigma="σ", tau="τ", phi="φ", varphi="φ", chi="χ", psi="ψ", omega="ω"),
    **dict(Gamma="Γ", Delta="Δ", Theta="Θ", Lambda="Λ", Sigma="Σ", Phi="Φ", Psi="Ψ", Omega="Ω"),
    "lambda": "λ",
}
_COMMANDS = {
    **_GREEK,
    "pi": "π",
    "times": "×",
    "cdot": "*",
    "ast": "*",
    "div": "/",
    "pm": "±",
    "infty": "∞",
    "degree": "°",
    "circ": "°",
    "angle": "∠",
    "triangle": "△",
    "le": "≤",
    "leq": "≤",
    "leqslant": "≤",
    "ge": "≥",
    "geq": "≥",
    "geqslant": "≥",
    "lt": "<",
    "gt": ">",
    "ne": "≠",
    "neq": "≠",
    "approx": "≈",
    "cup": "∪",
    "cap": "∩",
    "lbrace": "⦃",
    "rbrace": "⦄",
    "lbrack": "[",
    "rbrack": "]",
    "colon": ":",
    "prime": "'",
    "parallel": "∥",
    "perp": "⊥",
    "cong": "≅",
    "in": "∈",
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("quad", "qquad", "enspace", "displaystyle", "textstyle", "limits"), " "),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr"), ""),
}
_COMMAND = re.compile(r"\\([A-Za-z]+) ?|\\([^A-Za-z])")
_SYMBOLS = {
    "{": "⦃",
    "}": "⦄",
    "%": "%",
    "$": " dollar ",
    "&": "&",
    "#": "#",
    "_": "_",
    "\\": "\\\\",
    "!": "",
    **dict.fromkeys(" ,;:>", " "),
}
_WRAPPERS = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|textup|mathrm|mathbf|mathit|mathsf|mathbb|mbox|"
    r"operatorname|bm|boldsymbol|emph|underline|ensuremath) ?\{|[{}]"
)
_EMPHASIS = re.compile(
    r"(?<![\w)\]}*_`])(\*\*\*|\*\*|\*|__|`)(?=[^\s*_`])([^*_`]+)(?<=\S)\1(?![\w(\[{*_`])"
)
_QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'", re.DOTALL)


def normalise(text: str) -> str:
    """Return the text in one way of writing, for example `2√{3}cm^{2}` for `$2\\sqrt3\\,cm²$`."""
    text = unicodedata.normalize("NFC", text)
    text = _plain_characters(_GROUPS.sub(_without_separators, text))
    text = _EMPHASIS.sub(r" \2 ", text)
    text = _without_dollars(text)
    text = _unwrapped(text)
    text = _COMMAND.sub(_plain_command, text)
    text = _plain_marks(text)
    return _bare(text)


def _without_separators(found: re.Match) -> str:
    return re.sub(r"\D", "", found[1])


def _plain_characters(text: str) -> str:
    """Replace characters one by one: digits of all scripts, full-width forms, superscripts."""
    parts = []
    script = ""
    for char in text:
        raised, lowered = char.translate(_SUPERSCRIPTS), char.translate(_SUBSCRIPTS)
        now = "^" if raised != char else "_" if lowered != char else ""
        if now != script:
            parts.append(("}" if script else "") + (now + "{" if now else ""))
            script = now
        parts.append(raised if now == "^" else lowered if now else _plain_character(char))
    return "".join(parts) + ("}" if script else "")


def _plain_character(char: str) -> str:
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    if char.isascii():
        return char if char.isprintable() else " "
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category in ("Cf", "Mn"):  # invisible characters, and accents on their own
        return "" if category == "Cf" else char
    if category == "No" and "VULGAR" in unicodedata.name(char, ""):
        return " " + unicodedata.normalize("NFKC", char).replace("⁄", "/") + " "
    if category[0] == "Z" or category == "Cc":
        return " "
    folded = unicodedata.normalize("NFKC", char)
    return "".join(_CHARACTERS.get(part, part) for part in folded)


def _without_dollars(text: str) -> str:
    r"""Take LaTeX's `$` for space, and a `$` of an odd number of them for a dollar sign."""
    for delimiter in (r"\(", r"\)", r"\[", r"\]"):
        text = text.replace(delimiter, " ")
    if text.replace("\\$", "").count("$") % 2:
        return re.sub(r"(?<!\\)\$", " dollar ", text)
    return re.sub(r"(?<!\\)\$", " ", text)


def _unwrapped(text: str) -> str:
    r"""Take `\boxed{…}`, `\text{…}` and such away, with the brace that closes each of them."""
    parts, open_braces, place = [], [], 0
    for found in _WRAPPERS.finditer(text):
        parts.append(text[place : found.start()])
        place = found.end()
        if found[0] == "}":
            closes_wrapper = open_braces.pop() if open_braces else False
            parts.append(" " if closes_wrapper else "}")
        else:
            open_braces.append(found[0] != "{")
            parts.append("{" if found[0] == "{" else " ")
    return "".join(parts) + text[place:]


def _plain_command(found: re.Match) -> str:
    """Return what a LaTeX command stands for; one that is not known stays as it is."""
    if found[1]:
        known = _COMMANDS.get(found[1])
        return found[0] if known is None else known
    return _SYMBOLS.get(found[2], found[0])


def _temperature(found: re.Match) -> str:
    return "°" + found[1][0].upper()


_MARKS = [
    (re.compile(r"\^ ?\{ ?° ?\}|\^ ?°|\^ ?\{ ?o ?\}"), "°"),
    (re.compile(r"\^ ?\{ ?' ?\}|\^ ?'"), "'"),
    (re.compile(r"\^(-?[0-9]{1,3})\^"), r"^{\1}"),  # 5cm^2^
    (re.compile(r"<sup>(-?[0-9]{1,3})</sup>"), r"^{\1}"),
    (re.compile(r"(?<![A-Za-z\\])[Pp]i(?![A-Za-z])"), "π"),
    (re.compile(r"(?<![A-Za-z\\])([kcdm]?m)([23])(?![\w.])"), r"\1^{\2}"),  # 5 cm2
    (re.compile(r"\\frac ?([0-9A-Za-zπ])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac ?\{[^{}]*\}) ?([0-9A-Za-zπ])"), r"\1{\2}"),
    (re.compile(r"(?<=[0-9]) ?[xX] ?(?=10 ?(?:\^|\*\*))"), "×"),  # 1.5 x 10^3
    (re.compile(r"nautical miles?"), "nmi"),
    (re.compile(r"per cent\b"), "%"),
    (re.compile(r"(?:degrees?|°) ?([CF]|[Cc]elsius|[Ff]ahrenheit)\b"), _temperature),
    (re.compile(r"\b[Ii]nfinity\b"), "∞"),
    (re.compile(r"\b(?:US|USD) ?dollar "), "dollar "),  # US$5
    (re.compile(r">="), "≥"),
    (re.compile(r"<="), "≤"),
    (re.compile(r"!="), "≠"),
    (re.compile(r"~"), " "),
    (re.compile(r"\s+"), " "),
]


def _plain_marks(text: str) -> str:
    for pattern, plain in _MARKS:
        text = pattern.sub(plain, text)
    return text


def _bare(text: str) -> str:
    """Take quotation marks, braces around everything, and a closing full stop away."""
    while True:
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        elif found := _QUOTED.fullmatch(text):
            text = found[1] or found[2] or ""
        elif text[:1] == "{" and "," not in text and closes_at_end(text):
            text = text[1:-1]
        else:
            return text


OPENING, CLOSING = "([{⦃", ")]}⦄"


def closes_at_end(text: str) -> bool:
    """Return whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char in OPENING) - (char in CLOSING)
        if depth <= 0:
            return place == len(text) - 1 and depth == 0 and char in CLOSING
    return False
