"""What is fuzzed: for each target a function of bytes, and inputs to begin with."""

import io
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Call = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A function that gets bytes, and raises nothing but UserError."""

    make: Callable[[], Call]
    """Imports what is fuzzed and returns the function."""
    seeds: Callable[[], Iterable[bytes]]
    """Inputs to begin with."""
    longest: int = 4096
    """The most bytes of an input."""


def text(content: bytes) -> str:
    """Return bytes as text of any kind: also with lone surrogates and NULs."""
    return content.decode("utf-8", "surrogateescape")


def two(content: bytes) -> tuple[str, str]:
    """Return two texts."""
    first, _, second = content.partition(b"\xff")
    return text(first), text(second)


def make_judge() -> Call:
    """The strict judge: bounded, without an exception, and the same in both directions."""
    from mr1_fast.rewards.answers import judge, kind_of

    def call(content: bytes) -> None:
        answer, solution = two(content)
        kind_of(solution)
        right = judge(answer, solution).right
        assert right == judge(solution, answer).right, "not symmetric"
        assert not right or (answer.strip() and solution.strip()), "nothing is right"

    return call


def judge_seeds() -> list[bytes]:
    """Pairs of every kind, and texts that are hard to read."""
    from ..data.hostile import injections, nested
    from ..rewards.answers.pairs import RIGHT
    from ..rewards.answers.wrong_pairs import WRONG

    pairs = [pair for pairs in (*RIGHT.values(), *WRONG.values()) for pair in pairs]
    pairs += [(one, "3") for one in (*nested(), *injections(Path("/nowhere")))]
    pairs += [("1e999999999", "10^10^10^10"), ("9" * 999, "٣" * 999), ("2^2^2^2^2^2", "1!!!!!!!")]
    return [f"{a}\0{b}".encode().replace(b"\0", b"\xff", 1) for a, b in pairs]


def make_completion() -> Call:
    """What reads a whole completion within this process."""
    from mr1_fast.rewards.accuracy import judge_completion
    from mr1_fast.rewards.format import format_reward, tagged_answer
    from mr1_fast.rewards.r1v import number_verdict, r1v_counting, tagged_integer
    from mr1_fast.types import Example

    def call(content: bytes) -> None:
        completion, solution = two(content)
        for untagged in (False, True):
            judge_completion(completion, solution, untagged)
        assert format_reward(completion, Example("p", (), solution)) in (0.0, 1.0)
        tagged_answer(completion)
        number_verdict(completion, solution)
        r1v_counting(completion, solution)
        tagged_integer(completion)

    return call


def completion_seeds() -> list[bytes]:
    """Completions with right and broken tags."""
    from ..data.hostile import nested

    words = ["<think>a</think><answer>3</answer>", "<answer> 7 </answer>", "<answer>" * 9]
    words += [f"<think>{one}</think>\n<answer>{one}</answer>" for one in nested()]
    return [one.encode() + b"\xff3" for one in words] + [b"<answer>3</answer>\xff" + b"9" * 4500]


def make_files(*suffixes: str) -> Call:
    """The readers of text files."""
    from mr1_fast.errors import UserError
    from mr1_fast.tasks.data import load_examples

    folder = Path(tempfile.mkdtemp())

    def call(content: bytes) -> None:
        last = None
        for suffix in suffixes:
            path = folder / f"d{suffix}"
            path.write_bytes(content)
            try:
                examples = load_examples("free", str(path), "train", 0, image_root=str(folder))
                examples.all(3)
                examples.digest(0)
                examples.fingerprint()
            except UserError as error:
                last = error
        if last:
            raise last

    return call


ROW = {"problem": "How many?", "solution": "3", "image": "a.png"}
CONVERSATION = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}]
CONVERSATION += [{"role": "assistant", "content": "<think>a</think><answer>3</answer>"}]


def row_values() -> list[dict]:
    """Rows in several layouts."""
    return [
        ROW,
        {"messages": CONVERSATION, "images": [{"bytes": "aGk=", "path": None}]},
        {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "3"}]},
        {"question": "<image 1> q", "answer": ["3"], "image_1": "data:image/png;base64,aGk="},
        {"prompt": CONVERSATION[:1], "reward_model": {"ground_truth": 3.5}, "thinking": "t"},
        {"problem": "q", "solution": "x\n#### 3", "answer": 10**300, "image": {"url": "file:///x"}},
        {"problem": "\ud800", "solution": None, "image": [["a"], 7, True]},
    ]


def json_seeds() -> list[bytes]:
    """Files of JSON and of JSON lines."""
    lines = [json.dumps(row) for row in row_values()]
    whole = [json.dumps(row_values()), json.dumps({"data": row_values()}), "\n".join(lines)]
    hard = ["[" * 999, '{"a":' * 99 + "1" + "}" * 99, "9" * 4400, '{"problem":NaN}', "\ufeff{}"]
    return [each.encode() for each in (*whole, *lines, *hard)]


def csv_seeds() -> list[bytes]:
    """Tables."""
    tables = [
        "problem,solution\np,3\n",
        'problem\tsolution\n"a\nb"\t3\n',
        "\ufeffproblem,solution\r",
    ]
    return [each.encode() for each in (*tables, 'problem,solution\n"' + '"' * 99, "a,a\n1,2\n")]


def make_image() -> Call:
    """Images in every format, as the cell of a row."""
    from mr1_fast.tasks.data.images import ImageReader

    reader = ImageReader(Path(tempfile.mkdtemp()), fenced=True)

    def call(content: bytes) -> None:
        reader.header(content, "row 1 of data")
        reader.read(content, "row 1 of data")

    return call


def image_seeds() -> list[bytes]:
    """An image in each format and mode."""
    from PIL import Image

    seeds = []
    for format_ in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "EPS", "PPM"):
        for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "F"):
            file, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = 6
            try:
                Image.new(mode, (5, 7)).save(file, format_, exif=exif)
            except (OSError, ValueError, KeyError):
                continue
            seeds.append(file.getvalue())
    return seeds


def make_settings() -> Call:
    """Settings in YAML, and values of flags."""
    from mr1_fast.command_line import parse_train_config

    path = Path(tempfile.mkdtemp()) / "settings.yaml"

    def call(content: bytes) -> None:
        path.write_bytes(content)
        try:
            parse_train_config([str(path)], 1)
        except SystemExit as error:
            assert error.code in (0, 2), error.code

    return call


def settings_seeds() -> list[bytes]:
    """Settings of every type, and YAML that is hard."""
    texts = ["steps: 8\nalgo: grpo\nlr: 1e-5\n", "columns: {problem: q}\n", "steps:\n", "- a\n"]
    texts += ["lr: .nan\n", "steps: " + "9" * 400, "a: &a [*a]\n", "steps: !!python/object:os\n"]
    texts += ["extra_rewards: [a.py:f]\nreward_weights: {a: 1.0}\nbeta_max: .inf\n"]
    return [each.encode() for each in texts]


def make_records() -> Call:
    """The records of a run."""
    from mr1_fast.report.records import json_object

    def call(content: bytes) -> None:
        json_object(content, "a line of metrics.jsonl")

    return call


def make_prompt() -> Call:
    """Texts of a prompt, in which no control token may come from the data."""
    from mr1_fast.model.prompt import PromptWriter
    from mr1_fast.model.tiny import tiny_processor
    from mr1_fast.types import Example

    writer = PromptWriter(tiny_processor(), max_prompt_tokens=100_000)
    control = set(writer.text.control_ids.values())
    expected = [
        [each for each in writer._ids(Example("x", (), "3", extra=extra)) if each in control]
        for extra in ({}, {"system": "x"})
    ]

    def call(content: bytes) -> None:
        problem, system = (part.encode("utf-8", "replace").decode() for part in two(content))
        problem = problem.replace("<image>", "")
        extra = {"system": system} if system else {}
        ids = writer._ids(Example(problem, (), "3", extra=extra))
        found = [each for each in ids if each in control]
        assert found == expected[bool(system)], "a control token comes from the data"

    return call


def prompt_seeds() -> list[bytes]:
    """Texts with control tokens of several families."""
    tokens = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"]
    tokens += ["</s>", "[INST]", "<start_of_turn>", "<think>", "{{ 7 * 7 }}", "{% raw %}"]
    return [f"a {each} b".encode() + b"\xff" + each.encode() for each in tokens] + [b"How many?"]


TARGETS = {
    "judge": Target(make_judge, judge_seeds, 2100),
    "completion": Target(make_completion, completion_seeds, 10_000),
    "json": Target(lambda: make_files(".json", ".jsonl"), json_seeds),
    "csv": Target(lambda: make_files(".csv", ".tsv"), csv_seeds),
    "image": Target(make_image, image_seeds, 2048),
    "settings": Target(make_settings, settings_seeds, 1024),
    "records": Target(make_records, json_seeds),
    "prompt": Target(make_prompt, prompt_seeds, 2048),
}
"""The targets by name."""
