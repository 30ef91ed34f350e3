"""A step of several processes: few prompts for many, what is logged of it, and its times."""

import json

import pytest
import torch

from mr1_fast import tasks
from mr1_fast.loggers.samples import choose_samples
from mr1_fast.rewards import Scores
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Rollout
from tests.data.gang import gang
from tests.data.judge import toss
from tests.data.runs import curve, metrics, records, run

COUNTED = """
from mr1_fast.rewards import reward


@reward("counted")
def counted(completions, prompts, **columns):
    assert completions  # no function is called with nothing
    return [float(len(text)) for text in completions]
"""


def run_all(world, argv):
    tasks.judge_completion = toss  # some answers are right, by chance
    run(argv)


def completions(folder):
    lines = (folder / "completions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_step_that_refills_few_prompts_is_that_of_one_process(run_args, tmp_path):
    plugin = tmp_path / "rewards.py"
    plugin.write_text(COUNTED)
    settings = dict(plugin=plugin, extra_rewards={"counted": 0.0}, steps=4, seed=1, eval_samples=8)
    settings |= dict(skip_equal_groups="refill", prompts_per_step=4, max_new_tokens=4)
    settings |= dict(overlong_penalty=0.5, learning_rate=3e-3, save_every=2)
    settings |= dict(eval_every=2, keep_best=True, patience=5)
    folders = {size: tmp_path / str(size) for size in (1, 2, 3)}
    for size, folder in folders.items():
        gang(size, run_all, run_args(folder, **settings))
    alone, expected = folders[1], metrics(folders[1])
    sampled = [record["groups_sampled"] for record in expected]
    assert any(sampled_in % 4 in (1, 2) for sampled_in in sampled)  # a round of one or two prompts
    assert len({point["accuracy"] for point in curve(alone)}) > 1
    for folder in (folders[2], folders[3]):
        assert completions(folder) == completions(alone)
        assert curve(folder) == curve(alone)
        assert (folder / "evaluation.json").read_bytes() == (alone / "evaluation.json").read_bytes()
        for found, record in zip(metrics(folder), expected, strict=True):
            assert found == pytest.approx(record, rel=1e-5, abs=1e-6)
        timed, of_one = (records(each / "metrics.jsonl")[0] for each in (folder, alone))
        assert timed.keys() == of_one.keys() | {"seconds_wait"}
        assert timed["seconds_wait"] > 0
        assert "waits" in (folder / "report.html").read_text()


def test_the_log_shows_prompts_first_whose_images_are_there():
    examples = load_examples("counting", "drawn", "train", 0).take(0, 6)
    rollout = Rollout(
        examples=examples,
        prompts=[object() if row % 2 == 0 else None for row in range(6)],
        completions=[torch.tensor([1])] * 12,
        texts=["a", "b"] * 6,
        reasons=["eos"] * 12,
        logprobs=[],
        num_generations=2,
    )
    scores = Scores(torch.tensor([[0.0, 1.0]] * 6), {}, [""] * 12)
    keys = [sample.key for sample in choose_samples(rollout, scores)]
    assert keys[::2] == [examples[row].key for row in (0, 2, 4, 1)]
