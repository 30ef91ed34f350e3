"""The two forms of reward functions, and what TRL's is given: compared with TRL's own trainer."""

import asyncio
import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.rewards import reward, score
from mr1_fast.rewards.functions import Batch, is_batched, keyword_arguments
from mr1_fast.types import Example

from .conftest import row


def plain_decorator(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def ours(completion, example):
    return 1.0


async def ours_async(completion, example):
    return 1.0


def trl(completions, solution, **kwargs):
    return [1.0] * len(completions)


async def trl_async(completions, **kwargs):
    return [1.0] * len(completions)


class Ours:
    def __call__(self, completion, example):
        return 1.0

    def method(self, completion, example):
        return 1.0


class TRL:
    async def __call__(self, *, completions, **kwargs):
        return [1.0] * len(completions)

    def method(self, prompts, completions):
        return [1.0] * len(completions)


OURS = {
    "function": ours,
    "other names": lambda text, item: 1.0,
    "async": ours_async,
    "defaults": lambda completion, example, weight=1.0: 1.0,
    "one and the rest": lambda completion, *rest: 1.0,
    "any positions": lambda *args: 1.0,
    "keywords after": lambda completion, example, **kwargs: 1.0,
    "partial": functools.partial(lambda limit, completion, example: 1.0, 400),
    "partial keyword": functools.partial(lambda completion, example, limit: 1.0, limit=400),
    "decorated": plain_decorator(ours),
    "object": Ours(),
    "method": Ours().method,
}
TRLS = {
    "function": trl,
    "async": trl_async,
    "two": lambda completions, prompts: [1.0] * len(completions),
    "the other way round": lambda prompts, completions: [1.0] * len(completions),
    "keyword only": lambda *, completions: [1.0] * len(completions),
    "keywords alone": lambda **kwargs: [1.0] * len(kwargs["completions"]),
    "positions, too": lambda *args, completions, **kwargs: [1.0] * len(completions),
    "prompts alone": lambda prompts, **kwargs: [1.0] * len(prompts),
    "a column alone": lambda solution, **kwargs: [1.0] * len(solution),
    "partial": functools.partial(lambda limit, completions, **kwargs: [1.0] * len(completions), 4),
    "partial of a partial": functools.partial(functools.partial(trl), extra=1),
    "decorated": plain_decorator(trl),
    "decorated async": plain_decorator(trl_async),
    "object": TRL(),
    "method": TRL().method,
}


@pytest.mark.parametrize("function", OURS.values(), ids=OURS)
def test_functions_of_one_completion_are_recognised_and_run(registry, function):
    assert not is_batched("mine", function)
    reward("mine")(function)
    assert score(["a", "b"], [row(1)], {"mine": 1.0}).parts == {"mine": [1.0, 1.0]}


@pytest.mark.parametrize("function", TRLS.values(), ids=TRLS)
def test_functions_of_all_completions_are_recognised_and_run(registry, function):
    assert is_batched("mine", function)
    reward("mine")(function)
    assert score(["a", "b"], [row(1)], {"mine": 1.0}).parts == {"mine": [1.0, 1.0]}


def unwrapped(*args, **kwargs):
    return ours(*args, **kwargs)


NEITHER = {
    "one parameter": (lambda completion: 1.0, r"takes \(completion\)"),
    "three": (lambda completion, example, weight: 1.0, r"takes \(completion, example, weight\)"),
    "none": (lambda: 1.0, r"takes \(\)"),
    "anything": (unwrapped, r"\(\*args, \*\*kwargs\).*functools.wraps"),
    "positional completions": (lambda completions, /: [], r"\(completions, /\)"),
    "a class": (Ours, "is a class"),
    "no signature": (max, "does not show its parameters"),
    "a module of torch": (torch.nn.Identity(), "functools.wraps"),
}


@pytest.mark.parametrize("function, message", NEITHER.values(), ids=NEITHER)
def test_other_functions_are_refused(registry, function, message):
    with pytest.raises(UserError, match=f"'mine'.*{message}"):
        is_batched("mine", function)


def conversation(problem):
    return [{"role": "system", "content": "Think."}, {"role": "user", "content": problem}]


def test_all_columns_reach_a_batched_function_once_for_each_completion():
    examples = [
        row(1, "4", level=2, note="x"),
        row(2, "5", level=3, completion_ids="no", prompt="p"),
    ]
    batch = Batch(list("abcd"), examples, [[1], [2, 3], [4], []], SimpleNamespace(global_step=7))
    given = keyword_arguments(batch)
    assert given.pop("trainer_state").global_step == 7
    assert given == {
        "prompts": ["Problem 1?", "Problem 1?", "Problem 2?", "Problem 2?"],
        "completions": ["a", "b", "c", "d"],
        "completion_ids": [[1], [2, 3], [4], []],
        "problem": ["Problem 1?", "Problem 1?", "Problem 2?", "Problem 2?"],
        "solution": ["4", "4", "5", "5"],
        "thinking": ["", "", "", ""],
        "images": [[], [], [], []],
        "level": [2, 2, 3, 3],
        "note": ["x", "x", None, None],
    }


def test_a_column_of_the_data_comes_before_what_was_read_from_it():
    raw = {"solution": "<answer> 4 </answer>", "problem": "Problem in the file"}
    given = keyword_arguments(Batch(["a"], [Example("How many?", (), "4", extra=raw)]))
    assert (given["solution"], given["problem"]) == ([raw["solution"]], [raw["problem"]])


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_prompts_and_completions_are_messages_where_the_data_has_messages(column):
    talk = conversation("How many?")
    answered = [*talk, {"role": "assistant", "content": "4"}]
    for messages in (talk, answered):
        given = keyword_arguments(Batch(["a"], [row(1, **{column: messages})]))
        assert given["prompts"] == [talk]  # the answer is no part of the prompt
        assert given["completions"] == [[{"role": "assistant", "content": "a"}]]
    for other in ("How many?", [], ["How many?"], [{"text": "How many?"}], None, {"role": "user"}):
        given = keyword_arguments(Batch(["a"], [row(1, **{column: other})]))
        assert (given["prompts"], given["completions"]) == (["Problem 1?"], ["a"])


def test_a_function_is_given_only_what_it_accepts(registry):
    @reward("narrow")
    def narrow(completions, level, missing=5):
        return [level[i] + missing for i in range(len(completions))]

    assert score(["a"], [row(1, level=2, other=3)], {"narrow": 1.0}).parts == {"narrow": [7.0]}
    reward("wide")(lambda completions, **columns: [len(columns)])
    assert score(["a"], [row(1, level=2, other=3)], {"wide": 1.0}).parts == {"wide": [7.0]}
    with pytest.raises(UserError, match=r"'narrow'.*column 'level'.*row 1 of data.*has problem, "):
        score(["a"], [row(1, other=3)], {"narrow": 1.0})


# --- functions written for TRL and R1-V ----------------------------------------------------------


def r1v_accuracy(completions, solution, **kwargs):
    """As in R1-V's grpo.py, without its call of math-verify."""
    contents = [completion[0]["content"] for completion in completions]
    rewards = []
    for content, sol in zip(contents, solution, strict=True):
        sol_match = re.search(r"<answer>(.*?)</answer>", sol)
        ground_truth = sol_match.group(1).strip() if sol_match else sol.strip()
        content_match = re.search(r"<answer>(.*?)</answer>", content)
        answer = content_match.group(1).strip() if content_match else content.strip()
        rewards.append(1.0 if answer == ground_truth else 0.0)
    return rewards


def either_form(completions, prompts, solution, level, **kwargs):
    """A function that accepts texts and messages, as TRL's documentation recommends."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    return [
        None if weight == 0 else weight * (right in text) + question.count("?")
        for text, question, right, weight in zip(texts, questions, solution, level, strict=True)
    ]


async def either_form_async(completion_ids, trainer_state, level, **kwargs):
    await asyncio.sleep(0)
    progress = trainer_state.global_step / trainer_state.max_steps
    return [
        None if kind == 1 else progress * len(ids)
        for ids, kind in zip(completion_ids, level, strict=True)
    ]


@pytest.fixture
def trainer(model, processor, tmp_path):
    """TRL's trainer with two reward functions; it is asked for rewards, and does not train."""
    trl_package = pytest.importorskip("trl")
    from datasets import Dataset

    return trl_package.GRPOTrainer(
        model,
        reward_funcs=[either_form, either_form_async],
        args=trl_package.GRPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_dict({"prompt": [conversation("how many")]}),
        processing_class=processor.tokenizer,
    )


@pytest.mark.parametrize("form", ["messages", "texts"])
def test_rewards_are_those_that_trls_own_trainer_computes(registry, trainer, form):
    """`_calculate_rewards` of GRPOTrainer is called as the trainer calls it for each batch."""
    levels, solutions = [2, 0, 1], ["4", "5", "6"]
    completions = [
        *("4", "<think>x</think>5", "no"),
        *("<think>", "5", "a 5"),
        *("<think>a</think>6", "6", ""),
    ]
    ids = [[7] * i for i in range(len(completions))]
    questions = [f"Problem {i}?" for i in range(3)]
    asked, said = questions, completions
    if form == "messages":
        asked = [conversation(question) for question in questions]
        said = [[{"role": "assistant", "content": text}] for text in completions]
    inputs = [
        {"prompt": asked[i // 3], "solution": solutions[i // 3], "level": levels[i // 3]}
        for i in range(9)
    ]
    trainer.state.global_step, trainer.state.max_steps = 3, 12
    theirs = trainer._calculate_rewards(inputs, [row["prompt"] for row in inputs], said, ids)

    examples = [
        Example(questions[i], (), solutions[i], extra={"prompt": asked[i], "level": levels[i]})
        for i in range(3)
    ]
    weights = {}
    for function in trainer.reward_funcs:
        reward(function.__name__)(function)
        weights[function.__name__] = 0.5 + len(weights)
    scores = score(
        completions,
        examples,
        weights,
        completion_ids=ids,
        trainer_state=SimpleNamespace(global_step=3, max_steps=12),
    )
    ours = [[math.nan if v is None else v for v in values] for values in scores.parts.values()]
    torch.testing.assert_close(torch.tensor(ours).T, theirs, equal_nan=True)
    assert theirs.isnan().any() and theirs.nansum(0).min() > 0  # each function says something
    weighted = (theirs * torch.tensor(list(weights.values()))).nansum(1)
    torch.testing.assert_close(scores.total.flatten(), weighted)


def test_a_reward_of_trl_is_found_by_its_dotted_path():
    pytest.importorskip("trl")
    name = "trl.rewards:think_format_reward"
    talks = row(1, prompt=conversation("How many?"))
    scores = score(["<think>a</think>4", "4"], [talks], {name: 1.0})
    assert scores.parts == {name: [1.0, 0.0]}


def test_r1vs_function_works_on_messages_and_says_why_it_does_not_on_texts(registry):
    reward("r1v")(r1v_accuracy)
    completions = ["<answer> 4 </answer>", "5"]
    talks = row(1, "<answer> 4 </answer>", prompt=conversation("How many?"))
    assert score(completions, [talks], {"r1v": 1.0}).parts == {"r1v": [1.0, 0.0]}
    for texts in (completions, ["", ""]):
        with pytest.raises(UserError, match=r"(Type|Index)Error.* row 1 .*completions are texts"):
            score(texts, [row(1, "4")], {"r1v": 1.0})
