"""A step of several processes: few prompts for many, what is logged of it, and its times."""

import json

import pytest
import torch

from mr1_fast.command_line import parse_train_config
from mr1_fast.loggers.samples import choose_samples
from mr1_fast.rewards import Scores
from mr1_fast.tasks.data import load_examples
from mr1_fast.train import train
from mr1_fast.types import Rollout
from tests.data.gang import gang
from tests.data.runs import metrics
from tests.test_signal_groups import SOME

COUNTED = """
from mr1_fast.rewards import reward

@reward("counted")
def counted(completions, prompts, **columns):
    assert completions  # a function is never called with nothing
    return [float(len(text)) for text in completions]
"""


def run_all(world, argv):
    config = parse_train_config(argv)
    train(config)


def completions(folder):
    lines = (folder / "completions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("size", [2, 3])
def test_a_round_of_fewer_prompts_than_processes_refills_as_one_process(size, run_args, tmp_path):
    plugin = tmp_path / "some.py"
    plugin.write_text(SOME + COUNTED.replace("from mr1_fast.rewards import reward\n", ""))
    folders = []
    for processes in (1, size):
        folders.append(tmp_path / str(processes))
        settings = dict(plugin=plugin, extra_rewards={"some": 1.0, "counted": 0.0}, eval_every=2)
        settings |= dict(skip_equal_groups="refill", prompts_per_step=4, max_new_tokens=4)
        settings |= dict(overlong_penalty=2, keep_best=True, save_every=2, patience=5)
        gang(processes, run_all, run_args(folders[-1], **settings))
    alone, shared = folders
    assert completions(shared) == completions(alone)
    sizes = [record["groups_sampled"] for record in metrics(alone)]
    assert sizes == [record["groups_sampled"] for record in metrics(shared)]
    print(sizes)
    for name in ("evaluation.json", "evaluations.jsonl"):
        assert (shared / name).exists(), name
    for found, expected in zip(metrics(shared), metrics(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    timed = json.loads((shared / "metrics.jsonl").read_text().splitlines()[0])
    expected = json.loads((alone / "metrics.jsonl").read_text().splitlines()[0])
    assert timed.keys() == expected.keys() | {"seconds_wait"}
    assert 0 < timed["seconds_wait"] < sum(v for k, v in timed.items() if "seconds" in k)
