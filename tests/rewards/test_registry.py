"""Rewards: right verdicts, hostile strings, the worker process behind math_check, and the registry."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.rewards import math_check
from mr1_fast.rewards import registry as rewards
from mr1_fast.rewards.math_check import math_answer, math_equal
from mr1_fast.rewards.registry import accuracy_reward, format_reward, load_plugin, reward, score
from mr1_fast.tasks import counting
from mr1_fast.types import Example

DATA = Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published outputs are not here")


def example(solution: str) -> Example:
    return Example(problem="How many?", images=(), solution=solution)


def test_format():
    good = "<think>a\n</think>\n \t<answer>\n3</answer>"
    bad = [
        "",
        "3",
        " " + good,
        good + "\n",
        good + "<answer>4</answer>",
        good.upper(),
        good.replace("\t", "so"),
    ]
    bad += ["<answer>3</answer><think>a</think>", "<think>a<answer>3</think></answer>"]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        bad += [
            good.replace(tag, ""),
            good.replace(tag, 2 * tag),
            good.replace("a\n", tag),
            good.replace("3", tag),
        ]
    for text in (good, "<think>a</think><answer>3</answer>", "<think></think><answer></answer>"):
        assert format_reward(text, example("3")) == 1.0
    for text in bad:
        assert format_reward(text, example("3")) == 0.0, text


def test_accuracy():
    cases = [
        (" 3 ", "3", 1.0),
        (" 3 ", "4", 0.0),
        (" 145° ", "145", 1.0),
        ("3.0", "3", 0.0),
        (" -3 ", "3", 0.0),
    ]
    cases += [
        (r" $\frac{2}{4}$ ", r"\frac{1}{2}", 1.0),
        (r" $\frac{2}{5}$ ", r"\frac{1}{2}", 0.0),
        ("", "", 0.0),
    ]
    cases += [
        ("\n    3\n", "3", 1.0),
        (" (√{3}+1)小时 ", "(√{3}+1)小时", 1.0),
        (" (√{3}+1)小时 ", "(√{3}+2)小时", 0.0),
    ]
    for answer, solution, value in cases:
        assert (
            accuracy_reward(f"<think>so 7</think><answer>{answer}</answer>", example(solution))
            == value
        ), answer
    # Where R1-V reads a number from the reasoning: the one after the word "answer", or if there is no space in the tag.
    assert accuracy_reward("the answer is 7 <answer>\n    3 </answer>", example("7")) == 1.0
    assert accuracy_reward("so it is 7. <answer>3</answer>", example("7")) == 1.0
    assert (
        accuracy_reward("so it is 7. <answer>3</answer>", example("3")) == 1.0
    )  # the exact text counts as well
    assert (
        accuracy_reward("<answer> 3/1 </answer>" + " so" * 3000, example("3")) == 0.0
    )  # only the end is read


def r1v_accuracy(output: str, solution: str) -> float:
    """R1-V's accuracy_reward without short cuts, as the reference."""
    found = re.search(r"<answer>(.*?)</answer>", output)
    text = found.group(1).strip() if found else output.strip()
    return float(math_equal(output, solution) or text == solution.strip())


def test_the_fast_path_for_numbers_agrees_with_math_verify():
    """Reasoning that may or may not come before the tag, spaces that hide it, units, and near misses."""
    rng = random.Random(3)
    thoughts = [
        "",
        "so 3 + 4 = 7",
        "The answer is 7",
        "answer: 7",
        "Final answer is 7",
        r"\boxed{7}",
        "$x = 7$",
        "$",
    ]
    thoughts += [
        "aNſwer 7,",
        "anſwer =\n",
        "answer = ",
        "thus [ 7 ] x",
        "(7",
        r"so \frac{1}{7}",
        "12 50% of 7",
        "A. 1",
    ]
    spaces = ("", " ", "\n", "\n   ", "  \n", " \u3000", " " * 50, " " * 51, " \n" * 20)
    numbers = (
        "7",
        "12",
        "-7",
        "7.0",
        "07",
        "7.5",
        "12.50",
        "0",
        "-0",
        "0.000001",
        "123456789",
        "1000",
    )
    units = ("", "°", "cm", "m²", " cm", "%", " percent", "pct", "米")
    decided = 0
    for _ in range(1500):
        space, number, unit = rng.choice(spaces), rng.choice(numbers), rng.choice(units)
        output = f"<think>{rng.choice(thoughts)}</think><answer>{space}{number}{unit}{rng.choice(spaces)}</answer>"
        solution = rng.choice((number, rng.choice(numbers))) + rng.choice(units)
        verdict = rewards._number_verdict(output, solution)
        if verdict is not None:
            decided += 1
            assert verdict == math_equal(output, solution), (output, solution)
    assert decided > 200


@published
def test_published_geometry_verdicts():
    results = json.loads((DATA / "geoqa_test_qwen2vl_7b_instruct_outputs.json").read_text())[
        "results"
    ]
    verdicts = [math_equal(r["model_output"], r["ground_truth"]) for r in results]
    assert verdicts == [r["is_correct"] for r in results]
    assert (len(verdicts), sum(verdicts)) == (754, 231)
    scored = [accuracy_reward(r["model_output"], example(r["ground_truth"])) for r in results]
    assert scored == [r1v_accuracy(r["model_output"], r["ground_truth"]) for r in results]
    # The two whose tag is right in text, while math-verify reads a number from the reasoning.
    assert [i for i, (a, b) in enumerate(zip(scored, verdicts, strict=True)) if a != b] == [
        361,
        556,
    ]


@published
def test_published_counting_verdicts():
    results = json.loads((DATA / "superclevr200_qwen2vl_2b_instruct_outputs.json").read_text())[
        "results"
    ]
    assert (len(results), sum(r["extracted_answer"] == r["ground_truth"] for r in results)) == (
        200,
        96,
    )
    for r in results:
        output, solution = r["model_output"], str(r["ground_truth"])
        assert counting.is_correct(output, solution) == (r["extracted_answer"] == r["ground_truth"])
        verdict = math_equal(output, solution)
        assert (
            accuracy_reward(output, example(solution)) == r1v_accuracy(output, solution) == verdict
        )


TOKENS = r"""<think> </think> <answer> </answer> answer answer: final boxed \frac{ \sqrt{ \boxed{ \text{ \left( \int
\sum_ \begin{pmatrix} \pi \( \) \[ \] $$ { } ( ) [ ] $ ^ _ & \\ % , . | ! = ≤ + - * / 145° √{3} 0 1 3 12 999 1e9 0x1F x
\det y i ٣ ² None lambda: مرحبا שלום 😀"""
TOKENS = [*re.findall(r"\S+|\s", TOKENS), "final answer is", *"\t\0\ud800\udfff\u202e\x1b\ufeff"]


def random_strings(count: int, rng: random.Random) -> list[str]:
    """Soups of tokens, and of any code points, some of them inside an answer tag."""
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
    """What keeps sympy busy for longer than anyone waits; each costs a whole deadline, so they are few."""
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


@pytest.mark.slow
def test_ten_thousand_hostile_strings(tmp_path):
    """No exception, no answer later than 2 s, nothing executed, and a right answer is still found afterwards."""
    marker, item = tmp_path / "executed", example("3")
    special = [*injections(marker), *nested(), *endless(), *megabytes()]
    strings = [*random_strings(10_000 - len(special), random.Random(11)), *special]
    assert math_equal("<answer> 3 </answer>", "3")  # the worker has started
    calls = {
        "format": lambda text: format_reward(text, item),
        "accuracy": lambda text: accuracy_reward(text, item),
        "counting": lambda text: counting.is_correct(text, "3"),
        "math_equal": lambda text: math_equal(text, "3", seconds=0.3),
        "math_answer": lambda text: len(math_answer(text, seconds=0.3) or "") <= 8192 or "too long",
    }
    for text in strings:
        for name, call in calls.items():
            start = time.monotonic()
            assert call(text) in (0.0, 1.0)
            assert time.monotonic() - start < 2.0, (name, text[:80], len(text))
    assert math_equal("<answer> 3 </answer>", "3")
    assert not marker.exists()


def test_a_hanging_string_does_not_lose_the_next_answer():
    for text in endless()[:2]:
        start = time.monotonic()
        assert not math_equal(text, "3", seconds=0.2)
        assert time.monotonic() - start < 5.0
        assert math_equal("<answer> $\\frac{6}{2}$ </answer>", "3")
        assert not math_equal("<answer> $\\frac{6}{2}$ </answer>", "4")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_child_or_zygote_is_replaced():
    assert math_equal("1/2", "0.5", seconds=0.3)
    zygote = math_check._client.worker.process.pid
    (child,) = children(zygote)
    time.sleep(0.4)  # the timer is off between requests
    assert re.search(
        r"Max address space +2147483648 +2147483648 ", Path(f"/proc/{child}/limits").read_text()
    )
    os.kill(child, signal.SIGSEGV)
    assert math_equal("1/2", "0.5")
    assert math_check._client.worker.process.pid == zygote
    assert children(zygote) not in ([], [child])
    os.kill(*children(zygote), signal.SIGSEGV)
    assert math_answer("1/2") == "1/2"
    assert math_check._client.worker.process.pid == zygote
    os.kill(zygote, signal.SIGKILL)
    assert math_equal("1/2", "0.5")
    assert math_check._client.worker.process.pid != zygote
    os.kill(math_check._client.worker.process.pid, signal.SIGKILL)
    assert math_answer("1/2") == "1/2"


def test_threads_share_the_worker():
    verdicts, answers = {}, {}

    def ask(k: int) -> None:
        verdicts[k] = score(
            [f"<answer> {n}/1 </answer>" for n in range(8)], [example(str(k))], {"accuracy": 1.0}
        )[0]

    def read(k: int) -> None:
        answers[k] = [math_answer(f"<answer> {n} </answer>") for n in range(k, k + 8)]

    threads = [threading.Thread(target=act, args=(k,)) for k in range(8) for act in (ask, read)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert {k: v[0].tolist() for k, v in verdicts.items()} == {
        k: [float(n == k) for n in range(8)] for k in range(8)
    }
    assert answers == {k: [str(n) for n in range(k, k + 8)] for k in range(8)}


def run_script(path: Path, text: str, **environment: str) -> subprocess.CompletedProcess:
    path.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{text}")
    command, env = [sys.executable, str(path)], {**os.environ, **environment}
    return subprocess.run(
        command, cwd=path.parent, env=env, capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_plain_script_without_main_guard_scores_and_leaves_no_process(tmp_path, end):
    """Also after a fork, as in a DataLoader worker: parent and child must not share the pipes."""
    script = f"""
import os, signal
from mr1_fast.rewards.math_check import _client, math_equal
def right(k):
    return all(math_equal(f"<answer> {{n}} </answer>", str(k)) == (n == k) for n in range(50))
first = right(2)
pid = os.fork()
if pid == 0:
    os._exit(0 if right(3) else 1)
zygote = _client.worker.process.pid
print(first, right(4), os.waitpid(pid, 0)[1], zygote, flush=True)
print(open(f"/proc/{{zygote}}/task/{{zygote}}/children").read(), flush=True)
{end}
"""
    words = (done := run_script(tmp_path / "plain.py", script)).stdout.split()
    assert (words[:3], done.stderr, len(words)) == (["True", "True", "0"], "", 5)
    deadline = time.monotonic() + 5
    while any(map(is_running, words[3:])):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie does not run
    except OSError:
        return False


def test_missing_math_verify_is_one_clear_error(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed here')")
    script = "from mr1_fast.errors import exit_on_user_error\nfrom mr1_fast.rewards.math_check import math_equal\n"
    script += "exit_on_user_error(lambda: math_equal('1', '1'))"
    done = run_script(tmp_path / "script.py", script, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search("not installed here.*pip install math-verify", done.stderr)


def test_the_worker_imports_no_torch_and_its_hook_stops_commands(tmp_path):
    script = f"""
from mr1_fast.rewards import math_worker
math_worker._warm_up()
print([name for name in ("torch", "transformers") if name in sys.modules])
sys.addaudithook(math_worker._refuse)
import os
for act in (lambda: os.system("touch {tmp_path}/a"), lambda: open("{tmp_path}/b", "w"), os.fork):
    try:
        print(act())
    except PermissionError:
        print("refused")
"""
    done = run_script(tmp_path / "hook.py", script)
    assert done.stdout.split() == ["[]", "refused", "refused", "refused"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hook.py"]


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that a test's rewards do not stay."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    return rewards.REWARDS


def test_score_is_group_major_and_weighted():
    completions = ["<think>a</think><answer> 1 </answer>", "2", "<answer> 2 </answer>", "1"]
    total, values = score(
        completions, [example("1"), example("2")], {"accuracy": 1.0, "format": 0.5}
    )
    assert (total.dtype, total.tolist()) == (torch.float32, [[1.5, 0.0], [1.0, 0.0]])
    assert values == {"accuracy": [1.0, 0.0, 1.0, 0.0], "format": [1.0, 0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="3 completions"):
        score(completions[:3], [example("1"), example("2")], {"format": 1.0})


def test_a_users_reward_is_one_decorator_away(registry):
    @reward("length")
    def length(completion, item):
        return torch.tensor(len(completion) + len(item.solution))  # a number of any type will do

    assert length("ab", example("3")) == 3  # the decorator leaves the function itself usable
    total, values = score(["ab", "abc"], [example("3")], {"length": 2, "format": 0})
    assert total.tolist() == [[6.0, 8.0]]
    assert values == {"length": [3.0, 4.0], "format": [0.0, 0.0]}  # weight 0 is still computed


def test_names_are_unique_and_an_unknown_one_lists_the_known(registry):
    with pytest.raises(ValueError, match="'format'"):
        reward("format")(lambda completion, item: 0.0)
    with pytest.raises(UserError, match=r"'acuracy'.*accuracy, format"):
        score(["a"], [example("3")], {"acuracy": 1.0})


NOT_NUMBERS = ("None", "'1'", "[1]", "1j", "torch.ones(2)", "1 / 0", "completion.no_such_thing")
NOT_FINITE = ("float('nan')", "float('inf')", "-float('inf')", "10**400", "1e39")


@pytest.mark.parametrize("code", NOT_NUMBERS + NOT_FINITE)
def test_a_bad_value_or_an_exception_names_the_function(registry, code):
    @reward("odd")
    def my_odd_reward(completion, item):
        return eval(code)

    with pytest.raises(
        UserError, match=r"'odd'.*my_odd_reward.*(finite number|ZeroDivisionError|AttributeError)"
    ):
        score(["a"], [example("3")], {"odd": 0.0})


def test_a_plugin_file_registers_its_rewards(registry, tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(
        "from mr1_fast.rewards import reward\n@reward('two')\ndef two(completion, item): return 2"
    )
    for _ in range(2):  # a second time does nothing
        load_plugin(str(path))
    assert score(["a"], [example("3")], {"two": 1.0})[0].tolist() == [[2.0]]


def test_a_failing_or_missing_plugin_names_the_file_and_registers_nothing(registry, tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(UserError, match=re.escape(f"{path} does not exist")):
        load_plugin(path)
    for text in (
        "def (",
        "import no_such_module",
        "1 / 0",
        "raise SystemExit",
        "reward('format')(print)",
    ):
        path.write_text(
            f"from mr1_fast.rewards import reward\nreward('half')(lambda c, e: 0.5)\n{text}"
        )
        with pytest.raises(UserError, match=re.escape(f"{path} fails")):
            load_plugin(path)
        assert "half" not in registry
