"""Any value of any setting of any command is accepted and kept, or refused in one sentence.

Hypothesis makes YAML documents and command lines beside the values that are listed here.
"""

import dataclasses
import math
import os
import socket
from functools import partial
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mr1_fast import settings_file
from mr1_fast.command_line import SettingsParser, parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.config.bounds import (
    BOUNDS,
    LONGEST_PROSE,
    MOST_ITEMS,
    NOT_ZERO,
    PROSE,
    check_value,
)
from mr1_fast.config.objective import ALGORITHMS
from mr1_fast.errors import UserError
from mr1_fast.evaluate import settings as evaluation
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.merge.settings import MergeConfig
from mr1_fast.plan.settings import PlanConfig
from mr1_fast.profiles import profile_defaults
from mr1_fast.report.run_report import read_config
from mr1_fast.resuming import write_config
from mr1_fast.settings_file import DEEPEST, LARGEST, MOST_VALUES, dump_yaml, load_yaml

NUL, HALF, LONG = "a\0b", "a\ud800b", "x" * 4_100
HUGE = int("9" * 400)
VALUES = [
    *(None, True, False, 0, 1, -1, 2**63, HUGE, 0.5, -0.5, 1e-320, 1e38, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf, "", " ", "~", "null", "true", "no", "1", "1e3", "nan", "inf"),
    *("0x10", "1:30", "09", "=", "*a", "- a", "a: b", "2026-11-26", "١٢", NUL, HALF, "\x1b[2J"),
    *("a\nb", "\U0001f600", "%s %d {0}", "../" * 90, "/" * 5_000, "x" * 300, LONG, "9" * 4_400),
    *([], [None], [[]], [1], [1, 1], [1.5], ["a"], ["a", "a"], [""], [HALF], [LONG], [math.nan]),
    *([-1], [True], [*range(1_001)], {}, {"a": None}, {"": 1}, {"a": 1}, {"a": math.inf}, {NUL: 1}),
    *({"a": "b"}, {1: 2}, {None: 1}, {"a": {}}, {"a": [1]}, {"a": HUGE}, {LONG: 1}),
]
"""Values of every type, as they stand in a file."""

MORE = {
    "extra_rewards": [{"overlong": 1}],
    "loggers": [["tensorboard", "wandb"], ["wandb"] * 2, ["comet"]],
    "model": ["tiny", " Tiny "],
    "pass_at": [[1], [2], [2**63]],
    "prompt_suffix": ["x" * 20_000, "x" * 20_001],
    "seeds": [[0, 1], [2**63 - 1], [2**63]],
    "settings": [
        *({"steps": 3}, {"steps": None}, {"algo": "grpo"}, {"algo": None}, {"config": "a"}),
        *({"prompts-per-step": 1}, {"help": True}, {"extra_rewards": {1: 2}}, {"seed": 1}),
        *(
            {"extra_rewards": {"a": math.nan}},
            {"extra_rewards": {"a": 0.5}},
            {"model": "tiny-text"},
        ),
    ],
    "stop": [["a\nb"], ["</answer>"] * 2],
}
"""Values of single settings beside these."""

MEANT = {"~": None, "null": None, "true": True, "no": False, "1": 1, "09": 9, "1e3": 1e3, "١٢": 12}
MEANT |= {"- a": ["a"], "a: b": {"a": "b"}}
"""Texts that stand for a value of another type where a setting has that type."""

COMMANDS = {
    "train": SettingsParser(TrainConfig, "train", profile_defaults),
    "evaluate": SettingsParser(evaluation.EvaluateConfig, "evaluate", evaluation._profile),
    "plan": SettingsParser(PlanConfig, "plan", profile_defaults),
    "merge": SettingsParser(MergeConfig, "merge"),
    "experiment": SettingsParser(ExperimentConfig, "experiment"),
}
"""The commands that have settings; push, report and env have none."""
FIELDS = [
    pytest.param(
        name, field, marks=[pytest.mark.thorough] * (name in ("plan", "evaluate") and is_shared)
    )
    for name, each in COMMANDS.items()
    for field in each.kinds
    for is_shared in [field in COMMANDS["train"].kinds]
]
NEEDED = {"merge": {"adapter": "somewhere", "output": "a/new/folder"}}
"""Settings without which a command is refused, whatever the others are."""
PARTNERS = {
    "beta_max": "KL schedule",
    "beta_min": "KL schedule",
    "explore_fraction": "KL schedule",
    "max_new_tokens": "tokens_per_microbatch",
    "max_prompt_tokens": "tokens_per_microbatch",
}
"""What is named instead where two settings exclude each other."""


def read(command: str, *words: str):
    parser = COMMANDS[command]
    return parser.settle(parser.read(list(words)))


def kept_or_refused(act, *names: str):
    """Return what `act` returns, or None where one sentence with one of the names refuses it."""
    try:
        return act()
    except UserError as error:
        sentence = str(error)
        assert len(sentence) <= 500 and sentence.isprintable() and sentence[-1] == ".", sentence
        assert any(name in sentence for name in names), sentence
        return None


def flow(value) -> str:
    """Return a value as YAML on one line."""
    return yaml.dump(value, Dumper=settings_file.PlainDumper, default_flow_style=True, width=1e9)


def spelled(value) -> tuple:
    """Return a value with what stands for it in a file, and on a command line."""
    text = flow(value).removesuffix("...\n").strip("\n")
    return value, text, value if isinstance(value, str) else text


TEXTS = [spelled(value) for value in VALUES]


def own_values(cls: type, name: str) -> list[tuple]:
    """Return what a setting has by default, and its choices."""
    values = [getattr(cls(), name), *choices(get_type_hints(cls)[name])]
    return [spelled(value) for value in values if value is not None]


def choices(kind) -> list[str]:
    """Return the texts that a kind has, also beside others."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for each in get_args(kind) for choice in choices(each)]


def means(found, value, flag: str | None = None) -> bool:
    """Return whether what a setting has become is the value that a file, or a flag, gives."""
    if flag is not None and isinstance(found, str):
        value = flag
    if value == " Tiny ":  # the name of a model
        return found == "tiny"
    if isinstance(value, str) and not isinstance(found, str):
        value = MEANT.get(value, value)
    if isinstance(found, float) and isinstance(value, int):
        value = float(value)
    return found == value and isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize("command, name", FIELDS)
def test_every_value_of_every_setting(command, name, tmp_path):
    path = tmp_path / "settings.yaml"
    parser = COMMANDS[command]
    needed = {k: v for k, v in NEEDED.get(command, {}).items() if k != name}
    words = [f"--{k}={v}" for k, v in needed.items()]
    names = (name, PARTNERS.get(name, name))
    accepted = 0
    more = MORE.get(name, [])
    for value, text, flag in [*TEXTS, *own_values(parser.cls, name), *map(spelled, more)]:
        path.write_text(f"{name}: {text}", encoding="utf-8")
        for word, said, where in (
            (f"--config={path}", None, (*names, f"config {path}")),
            (f"--{name}={flag}", flag, names),
        ):
            config = kept_or_refused(partial(read, command, word, *words), *where)
            if config is None:
                continue
            accepted += 1
            found = getattr(config, name)
            by_default = found is not None and value in (None, "null", "~")
            if not (by_default and name in ALGORITHMS["grpo"]):
                assert means(found, value, said), (word[:200], found)
            again = parser.converted(name, load_yaml(dump_yaml({name: found}))[name])
            assert again == found and type(again) is type(found)
    assert accepted


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_those_of_settings_and_hold_on_both_sides(name):
    [kind, *_] = [each.kinds[name] for each in COMMANDS.values() if name in each.kinds]
    least, most = BOUNDS[name]
    is_whole = "int" in str(kind)
    beyond = [least - 1, most + 1] if is_whole else [least - 1e-9, most * 1.001]
    wrap = (lambda value: [value]) if get_origin(kind) is list else (lambda value: value)
    for value in (least, most):
        if value == 0 and name in NOT_ZERO:
            beyond.append(0)
        else:
            check_value(name, wrap(value))
    for value in beyond:
        with pytest.raises(UserError, match=f"^{name} is .*, but (each item )?must "):
            check_value(name, wrap(value))


TEXTS_OF_YAML = [
    *("1e5", "09", "0x10", "1:30", "=", "<<", "null", "~", "", "yes", "Off", "2020-01-01", "a: b"),
    *(
        "#",
        "a\nb",
        "a\r\nb\n",
        "\u2028",
        "\x85",
        "\x07",
        "\U0001f600",
        "\ufeff",
        "1_000",
        ".5",
        "-",
    ),
    *(
        "- a",
        '"',
        "'",
        "!x",
        "&a",
        "*a",
        "%a",
        "@",
        "`",
        " a",
        "a ",
        "a\t",
        "\t",
        "+.inf",
        "1.",
        "x" * 300,
    ),
    *(
        "x " * 200,
        "\ufffe",
        "1\n",
        "\xa0",
        "\u200b",
        "? a",
        "[a",
        "{a",
        "a,b",
        "|",
        ">",
        "\\",
        "...",
    ),
]


@pytest.mark.parametrize("text", TEXTS_OF_YAML)
def test_a_written_text_is_the_same_to_any_reader_of_yaml(text):
    values = {"a": text, "b": [text], "c": {text: text}}
    assert load_yaml(dump_yaml(values)) == yaml.safe_load(dump_yaml(values)) == values


def test_a_run_that_has_the_longest_texts_is_read_back(tmp_path):
    longest = {name: "\U0001f600" * LONGEST_PROSE for name in PROSE - {"stop"}}
    many = {f"{index}": 1e-30 for index in range(MOST_ITEMS)}
    path = "/".join(["é" * 125] * 15)
    config = dataclasses.replace(
        parse_train_config([]), **longest, extra_rewards=many, output=path, data=path, steps=10**9
    )
    config.check()
    write_config(config, tmp_path / "config.yaml")
    assert parse_train_config([f"--config={tmp_path / 'config.yaml'}"]) == config
    assert read_config(tmp_path)["output"] == path


BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
NO_SETTINGS = {
    "bomb": (f"a: &a [x]\n{BOMB}", r"has an alias, \*a, in line 2, but settings are plain YAML"),
    "endless": ("steps: &a [*a]", r"has an alias, \*a, in line 1"),
    "merge": ("<<: {steps: 1}", "has '<<', which is no setting"),
    "deep": ("steps: " + "[" * 100_000, f"has more than {DEEPEST} lists and mappings within"),
    "deep block": ("- " * 100_000, f"has more than {DEEPEST} lists and mappings within"),
    "deep names": ("? " * 100_000, f"has more than {DEEPEST} lists and mappings within"),
    "many": ("stop: [" + "a," * 100_000 + "]", f"has more than {MOST_VALUES:,} values"),
    "large": ("# " + "x" * LARGEST, f"has more than {LARGEST:,} bytes"),
    "lines": ("steps:" + "\n" * (LARGEST - 7), "steps is blank, but must be a whole number"),
    "tag": ("steps: !!python/object/apply:os.getpid []", "has a tag, .*python/object.*, in line 1"),
    "own tag": ("!x\nsteps: 1", "has a tag, !x, in line 1"),
    "integer tag": ("steps: !!int x", "has a tag"),
    "twice": ("steps: 1\nseed: 2\nsteps: 3", "has a mapping that names steps twice in line 1"),
    "nested twice": ("extra_rewards: {a: 1, a: 2}", "has a mapping that names a twice in line 1"),
    "old and new": ("gradient_checkpointing: true\nrecompute: all", "has recompute by an earlier"),
    "number": ("1: 2", "has '?1'?, which is no setting"),
    "null": ("~: 2", "has None, which is no setting"),
    "list as name": ("[a]: 2", "is not YAML .*unhashable key"),
    "digits": ("seed: " + "9" * 5_000, "has a number of too many digits in line 1"),
    "no character": (r'model: "\UFFFFFFFF"', "has a character that does not exist"),
    "two documents": ("steps: 1\n---\nsteps: 2", "is not YAML .*another document"),
    "list": ("- 1", "holds no settings"),
    "scalar": ("steps", "holds no settings"),
    "nothing": ("", "holds no settings"),
    "version": ("%YAML 3.0\n---\nsteps: 1", "is not YAML"),
    "control": ("steps: \x01", "is not YAML .*special characters are not allowed"),
    "utf-16": ("steps: 1".encode("utf-16"), "is not a text file"),
    "bytes": (bytes(range(256)), "is not a text file"),
    "zeros": (bytes(1_000), "is not YAML"),
    "folder": (os.mkdir, "is no regular file"),
    "pipe": (os.mkfifo, "is no regular file"),
    "device": (partial(os.symlink, "/dev/zero"), "is no regular file"),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(path), "is no regular file"),
    "loop": (lambda path: os.symlink(path, path), "cannot be read"),
    "absent": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("content, message", NO_SETTINGS.values(), ids=NO_SETTINGS)
def test_a_file_that_holds_no_settings(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    if callable(content):
        content("config.yaml")
    else:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"^(config config.yaml )?{message}") as raised:
        parse_train_config(["--config=config.yaml"])
    assert len(str(raised.value)) <= 500 and "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "x" * 300, "x/" * 5_000, "\ud800", "."])
def test_a_path_that_no_file_has(path):
    with pytest.raises(UserError, match=r"config .*(cannot be read|is no regular file)"):
        parse_train_config(["--config", path])


def test_an_alias_bomb_is_refused_before_anything_is_made_of_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        settings_file.PlainLoader, "construct_object", lambda *a, **k: made.append(a)
    )
    with pytest.raises(yaml.YAMLError, match="alias"):
        load_yaml(f"a: &a [x]\n{BOMB}")
    assert not made


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "--stop=[&a x, *a]",
            "stop is .*, but must be a list .* in plain YAML, and this has an al",
        ),
        ("--extra-rewards={a: 1, a: 2}", "this has a mapping that names a twice in line 1: see"),
        ("--extra-rewards={a: !!float 1}", "and this has a tag, tag:yaml.org,2002:float, in line"),
        ("--loggers=" + "[" * 10_000, "and this has more than 20 lists and mappings within"),
        ("--stop=[" + "a," * 20_000 + "]", "and this has more than 10,000 values"),
        ("--stop=" + "a" * (LARGEST + 1), "and this has more than 524,288 characters"),
        ("--loggers=[wandb, wandb]", "must be different values, none of them twice"),
        ("--extra-rewards={'': 1}", "extra_rewards is .*, but each item must not be empty"),
        ("--" + "x" * 10_000, "unrecognized arguments: --xxx.*…: see"),
        ("--algo=" + "x" * 50_000, "algo is x{79}…, but must be one of"),
        ("--resume=" + "x/" * 5_000, "resume is .*, but must be shorter"),
        ("--resume=a\0b", "resume is .*, but must be a name without control characters"),
    ],
)
def test_a_flag_is_refused_as_a_file_is(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_train_config([flag])
    assert len(str(raised.value)) <= 500 and "\n" not in str(raised.value)


IN_YAML = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "tiny", "1e5", "null", "grpo", "tensorboard"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted({name for each in COMMANDS.values() for name in each.kinds}))
SYNTAX = st.text("abs: -\n[]{},'\"&*!|>%#?<~=.0159_eE\\\t\0\ud800é", max_size=60)
PIECES = st.lists(
    NAMES.map(lambda name: f"{name}: ") | SYNTAX | st.sampled_from(["\n", "*a ", "&a ", "!!int "]),
    max_size=12,
).map("".join)
BRIEFLY = settings(max_examples=150, derandomize=True, database=None, deadline=None)
AT_LENGTH = settings(max_examples=5_000, database=None, deadline=None)


def read_anything(command: str, words: list[str]) -> None:
    """Read settings; afterwards they are kept, or one sentence has refused them."""
    parser = COMMANDS[command]
    try:
        if command == "train":
            config = parse_train_config(words)
        else:
            config = parser.settle(parser.read(words))
    except UserError as error:
        assert len(str(error)) <= 500 and "\n" not in str(error)
    except SystemExit as ended:
        assert ended.code == 0 and {"-h", "--help"} & set(words)
    else:
        values = load_yaml(dump_yaml(vars(config)))
        again = {name: parser.converted(name, value) for name, value in values.items()}
        assert again == vars(config)


def check_documents(path, command: str, document: str | dict) -> None:
    if isinstance(document, dict):
        document = yaml.dump(document, Dumper=settings_file.PlainDumper, allow_unicode=False)
    path.write_bytes(document.encode("utf-8", "surrogatepass"))
    read_anything(command, [f"--config={path}"])


COMMAND = st.sampled_from(sorted(COMMANDS))
DOCUMENT = PIECES | st.dictionaries(NAMES, IN_YAML, max_size=4) | st.text(max_size=60)
FLAG = st.tuples(NAMES, SYNTAX | IN_YAML.map(str)).map(lambda flag: f"--{flag[0]}={flag[1]}")
WORDS = st.lists(FLAG | SYNTAX | NAMES.map("--{}".format) | st.just("--help"), max_size=4)


@BRIEFLY
@given(COMMAND, DOCUMENT)
def test_any_document(tmp_path_factory, command, document):
    check_documents(tmp_path_factory.getbasetemp() / "document.yaml", command, document)


@BRIEFLY
@given(COMMAND, WORDS)
def test_any_command_line(command, words):
    read_anything(command, words)


@pytest.mark.thorough
@AT_LENGTH
@given(COMMAND, DOCUMENT)
def test_any_document_at_length(tmp_path_factory, command, document):
    check_documents(tmp_path_factory.getbasetemp() / "document.yaml", command, document)


@pytest.mark.thorough
@AT_LENGTH
@given(COMMAND, WORDS)
def test_any_command_line_at_length(command, words):
    read_anything(command, words)
