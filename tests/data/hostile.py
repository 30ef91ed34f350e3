"""Strings that a model might write to exploit a reward, or that a parser finds hard."""

import random
import re
from pathlib import Path

from mr1_fast.types import Example


def example(solution: str) -> Example:
    return Example(problem="How many?", images=(), solution=solution)


TOKENS = (
    r"<think> </think> <answer> </answer> answer answer: final boxed \frac{ \sqrt{ \boxed{ \text{ "
    r"\left( \int" + "\n"
    r"\sum_ \begin{pmatrix} \pi \( \) \[ \] $$ { } ( ) [ ] $ ^ _ & \\ % , . | ! = ≤ + - * / "
    r"145° √{3} 0 1 3 12 999 1e9 0x1F x" + "\n"
    r"\det y i ٣ ² None lambda: مرحبا שלום 😀"
)
TOKENS = [*re.findall(r"\S+|\s", TOKENS), "final answer is", *"\t\0\ud800\udfff\u202e\x1b\ufeff"]


def random_strings(count: int, rng: random.Random) -> list[str]:
    """Random sequences of tokens, and of any code points, some of them inside an answer tag."""
    strings = []
    for i in range(count):
        points = [
            chr(rng.randrange(rng.choice((128, 0x3000, 0x110000))))
            for _ in range(rng.randint(0, 60))
        ]
        text = "".join(rng.choices(TOKENS, k=rng.randint(0, 25)) if i % 3 else points)
        strings.append(f"<think>{text}</think><answer>{text}</answer>" if i % 4 == 0 else text)
    return strings


def injections(marker: Path) -> list[str]:
    """Attempts to have a parser run a command."""
    command = f"__import__('os').system('touch {marker}')"
    bodies = [
        command,
        f"eval({command!r})",
        f"(lambda: {command})()",
        f"1 + {command} + 1",
        f"x_{{{command}}}",
    ]
    bodies += [
        f"\\text{{{command}}}",
        f"cos\nsystem\n(S'touch {marker}'\ntR.",
        f"$(touch {marker})",
    ]
    bodies += [f"Symbol('x').__class__.__init__.__globals__['__builtins__']['eval'](\"{command}\")"]
    wrappers = (
        "{}",
        "${}$",
        "<answer>{}</answer>",
        "<answer> ${}$ </answer>",
        "\\boxed{{{}}}",
        "final answer is: {}",
    )
    return [wrapper.format(body) for body in bodies for wrapper in wrappers]


def nested() -> list[str]:
    """Deep nesting and long input that a parser finds hard, without megabytes."""
    shapes = [
        ("(", ")"),
        ("{", "}"),
        ("[", "]"),
        ("\\frac{1}{", "}"),
        ("\\left(", "\\right)"),
        ("-(", ")"),
        ("|", "|"),
    ]
    strings = [f"${a * n}3{b * n}$" for a, b in shapes for n in (5, 1000 if a in "({" else 6)]
    strings += [f"<answer> {a * n}3{b * n} </answer>" for a, b in shapes for n in (20, 2000)]
    strings += [
        "\\frac{" * 900,
        "{" * 5000,
        "$" * 8001,
        "answer " * 1100,
        "$\\boxed{" * 900,
        "1+" * 3000,
        "=1" * 4000,
    ]
    return [
        *strings,
        f"<answer> {'7' * 10**5} </answer>",
        "<answer>" * 1000,
        "1 " * 1500,
        f"${'9' * 5000}$",
    ]


def endless() -> list[str]:
    """Strings that keep sympy busy for ever; they are few, since each costs a whole deadline."""
    return ["<answer> 9**9**9**9 </answer>", "$9^{9^{9^{9}}}$", "$(10^9)!$", "$2^{2^{40}}$"]


def megabytes() -> list[str]:
    """Long strings on which a backtracking pattern takes quadratic time."""
    n = 2_000_000
    tags = (
        "a",
        " ",
        "\n",
        "9",
        "\0",
        "\ud800",
        "</think>",
        "<answer>",
        "<think>",
        "<answer> ",
        "<answer>1",
        "answer ",
    )
    strings = [tag * (n // len(tag)) for tag in tags]
    strings += [
        f"<answer>{' ' * n}",
        f"<think>{' ' * n}</think>{' ' * n}<answer>3{' ' * n}</answer>",
    ]
    strings += [
        f"<answer>{' ' * n}123456789{' ' * n}<",
        f"<think></think>{' ' * n}",
        f"<think>{'a ' * n}<answer>",
    ]
    return strings
