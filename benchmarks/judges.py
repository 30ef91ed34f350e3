"""The strict judge beside R1-V's rules, on published outputs and on ways of writing an answer.

    python benchmarks/judges.py [--data ../shared/data] [--differences]

The first table counts the verdicts on the published outputs of two models on GeoQA and SuperCLEVR.
R1-V has two rules for each: its reward, by which it trains, and its evaluation. --differences lists
every output on which the strict judge and one of them differ.

The second table writes every GeoQA solution in ten other right forms and ten wrong ones, as
completions, and counts how often each judge is right. Its numbers and units are taken apart here,
by rules that are not the judge's. The last line is one JSON document.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sympy import N, pi, sqrt, sympify

from mr1_fast.rewards import Verdict, judge_completion
from mr1_fast.rewards.format import tagged_answer
from mr1_fast.rewards.r1v import r1v_counting, r1v_geometry, r1v_reward

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OUTPUTS = {
    "GeoQA": ("geoqa_test_qwen2vl_7b_instruct_outputs.json", r1v_geometry),
    "SuperCLEVR": ("superclevr200_qwen2vl_2b_instruct_outputs.json", r1v_counting),
}
UNIT = re.compile(r"(?:°|[a-z]+(?:\^\{2\}|\^2\^|²)?|[\u4e00-\u9fff]+)$")
UNIT_WORDS = {
    "°": " degrees",
    "cm": " centimeters",
    "m": " meters",
    "mm": " millimeters",
    "cm²": " square centimeters",
    "m²": " square meters",
    "米": " m",
    "厘米": " cm",
    "海里": " nautical miles",
    "秒": " seconds",
    "小时": " hours",
    "平方米": " m^2",
}
OTHER_UNITS = {
    "°": " rad",
    "cm": " m",
    "m": " km",
    "mm": " m",
    "cm²": " cm",
    "m²": " m",
    "米": " km",
    "厘米": " m",
    "海里": " km",
    "秒": " min",
    "小时": " min",
    "平方米": " m",
}


class Parts:
    """A GeoQA solution, taken apart into its number and its unit."""

    def __init__(self, solution: str) -> None:
        found = UNIT.search(solution)
        self.number = solution[: found.start()] if found else solution
        unit = found[0] if found else ""
        self.unit = unit
        self.unit_key = re.sub(r"\^\{2\}|\^2\^", "²", unit)
        self.whole = solution
        plain = re.sub(r"√\{(\d+)\}", r"sqrt(\1)", self.number)
        self.plain = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", plain)
        spaced = re.sub(r"(?<=[\d)])(?=sqrt|π|\()", "*", self.plain).replace("π", "pi")
        self.value = sympify(spaced, locals={"pi": pi, "sqrt": sqrt})
        self.latex = re.sub(r"√\{", r"\\sqrt{", self.number).replace("π", r"\pi")


def simple(parts: Parts) -> str:
    """Write fractions of whole numbers without brackets, and roots as √n."""
    text = re.sub(r"\((\d+)\)/\((\d+)\)", r"\1/\2", parts.plain)
    return re.sub(r"sqrt\((\d+)\)", r"√\1", text) + parts.unit


def decimals(parts: Parts) -> str:
    return str(N(parts.value, 12)).rstrip("0").rstrip(".") + parts.unit


def full_width(parts: Parts) -> str:
    return re.sub(r"\d", lambda digit: chr(ord(digit[0]) + 0xFEE0), parts.whole)


RIGHT: dict[str, Callable[[Parts], str]] = {
    "without spaces in the tag": lambda parts: parts.whole,
    "LaTeX in dollars: $2\\sqrt{3}$": lambda parts: f" ${parts.latex}${parts.unit} ",
    "boxed: \\boxed{2\\sqrt{3}}": lambda parts: f" \\boxed{{{parts.latex}}} ",
    "bold: **2√{3}**": lambda parts: f" **{parts.whole}** ",
    "plain: 2√3, 3/4": lambda parts: f" {simple(parts)} ",
    "as code: 2sqrt(3), (3)/(4)": lambda parts: f" {parts.plain} ",
    "a sentence: The answer is 2√{3}.": lambda parts: f" The answer is {parts.whole}. ",
    "an equation: x = 2√{3}": lambda parts: f" x = {parts.whole} ",
    "the unit in words, or full-width digits": lambda parts: (
        f" {parts.number}{UNIT_WORDS[parts.unit_key]} "
        if parts.unit_key in UNIT_WORDS
        else f" {full_width(parts)} "
    ),
    "twelve decimals: 3.46410161514": lambda parts: f" {decimals(parts)} ",
}
"""Other right ways to write a solution, by an example of 2√{3}."""


def other_root(parts: Parts) -> str:
    if "√" in parts.whole:
        return re.sub(r"√\{\d+\}", "√{97}", parts.whole)
    return f"{parts.number}√{{2}}{parts.unit}"


def bare_coefficient(parts: Parts) -> str:
    if "√" in parts.whole or "π" in parts.whole:
        found = re.match(r"\\frac\{(\d+)\}|\(?(\d+)", parts.number)
        return next(filter(None, found.groups())) if found else "1"
    return f"{parts.number}π{parts.unit}"


def other_unit(parts: Parts) -> str:
    if parts.unit:
        return f"{parts.number}{OTHER_UNITS[parts.unit_key]}"
    return f"{parts.number} apples"


IN_REASONING = "nothing in the tag, the answer before it"
WRONG: dict[str, Callable[[Parts], str]] = {
    "another number under the root": lambda parts: f" {other_root(parts)} ",
    "the bare coefficient, or π times it": lambda parts: f" {bare_coefficient(parts)} ",
    "another unit, or apples": lambda parts: f" {other_unit(parts)} ",
    "the answer and another one": lambda parts: f" {parts.whole} or 999 ",
    "the negative": lambda parts: f" -{parts.whole} ",
    "times 10^3": lambda parts: f" {parts.latex}·10^3{parts.unit} ",
    "a ratio: 2√{3}:7": lambda parts: f" {parts.number}:7 ",
    "a sum: 2√{3}+1": lambda parts: f" {parts.number}+1 ",
    "a denial: not 2√{3}": lambda parts: f" not {parts.whole} ",
    IN_REASONING: lambda parts: "",
}
"""Wrong answers that begin like the solution, end like it, or leave it outside of the tag."""

JUDGES: dict[str, Callable[[str, str], Verdict]] = {
    "strict": judge_completion,
    "R1-V's reward": r1v_reward,
    "R1-V's evaluation": r1v_geometry,
}


def load(name: str, folder: Path) -> list[tuple[str, str]]:
    results = json.loads((folder / OUTPUTS[name][0]).read_text())["results"]
    return [(result["model_output"], str(result["ground_truth"])) for result in results]


def count_published(name: str, folder: Path, show: bool) -> dict[str, Counter]:
    """Count the verdicts of the strict judge beside each of R1-V's rules."""
    counts = {"reward": Counter(), "evaluation": Counter()}
    for index, (output, solution) in enumerate(load(name, folder)):
        strict = judge_completion(output, solution)
        rules = {"reward": r1v_reward, "evaluation": OUTPUTS[name][1]}
        rules = {rule: judge(output, solution).right for rule, judge in rules.items()}
        for rule, right in rules.items():
            counts[rule][strict.right, right] += 1
        if show and set(rules.values()) != {strict.right}:
            answer = tagged_answer(output)
            print(f"{name} {index}: {solution!r}, {answer!r}: {strict}, R1-V: {rules}")
    return counts


def count_forms(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Count, for every form, in how many of the solutions each judge is right about it."""
    solutions = [Parts(solution) for _, solution in load("GeoQA", folder)]
    kinds = {"right": RIGHT, "wrong": WRONG}
    counts: dict = {kind: {} for kind in kinds}
    for kind, forms in kinds.items():
        for form, write in forms.items():
            counts[kind][form] = Counter()
            for parts in solutions:
                thinking = f"It comes to {parts.whole}." if form == IN_REASONING else "so"
                text = f"<think>{thinking}</think><answer>{write(parts)}</answer>"
                for name, judge in JUDGES.items():
                    is_right = judge(text, parts.whole).right
                    counts[kind][form][name] += is_right == (kind == "right")
        print(f"\n| {kind} form, of {len(solutions)} | {' | '.join(JUDGES)} |")
        print("|---|" + "---|" * len(JUDGES))
        for form, count in counts[kind].items():
            print(f"| {form} | {' | '.join(str(count[name]) for name in JUDGES)} |")
        total = [sum(count[name] for count in counts[kind].values()) for name in JUDGES]
        print(f"| **all {len(forms) * len(solutions):,}** | {' | '.join(map(str, total))} |")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--differences", action="store_true")
    arguments = parser.parse_args()

    published, rows = {}, []
    for name in OUTPUTS:
        counts = count_published(name, arguments.data, arguments.differences)
        for rule, count in counts.items():
            row = {
                "outputs": sum(count.values()),
                "both right": count[True, True],
                "strict alone right": count[True, False],
                "R1-V alone right": count[False, True],
                "both wrong": count[False, False],
            }
            published[f"{name}, R1-V's {rule}"] = row
            rows.append((f"{name}, R1-V's {rule}", row))
    print(f"\n| outputs and rule | {' | '.join(rows[0][1])} |")
    print("|---|" + "---|" * len(rows[0][1]))
    for title, row in rows:
        print(f"| {title} | {' | '.join(map(str, row.values()))} |")

    forms = count_forms(arguments.data)
    document = {"benchmark": "judges", "command": " ".join(["python", *sys.argv])}
    print("\n" + json.dumps({**document, "published": published, "forms": forms}))


if __name__ == "__main__":
    main()
