"""Evaluation while training: the curve, the best weights, patience; training ignores it."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from mr1_fast import train as train_module
from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import UserError
from mr1_fast.log import RunLog
from mr1_fast.report.plots import PLOTS
from mr1_fast.resuming import saved_steps
from mr1_fast.rewards.answers.verdict import Verdict
from mr1_fast.train import train

from ..data.judge import toss, tossing  # noqa: F401  a fixture
from ..data.runs import assert_same_run, curve, metrics, records, run

pytestmark = pytest.mark.usefixtures("tossing")
SETTINGS = dict(steps=5, num_generations=2, eval_samples=8, eval_every=2, keep_best=True)
SETTINGS |= dict(save_every=2, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def few_plots():
    """Plots take half of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.report.plots.PLOTS", PLOTS[:2])
        yield


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def whole(run_args, tmp_path_factory):
    """A finished run that kept its best weights, and the states that evaluation has changed."""
    folder, changed = tmp_path_factory.mktemp("whole") / "run", []

    def spy(run_, steps_done):
        before = random_states()
        evaluate_if_due(run_, steps_done)
        changed.append(before != random_states())

    evaluate_if_due = train_module.evaluate_if_due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.tasks.judge_completion", toss)
        patch.setattr(train_module, "evaluate_if_due", spy)
        run(run_args(folder, **SETTINGS))
    return folder, changed


def random_states():
    """The states of the generators that a step may draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def best_step(folder):
    """The step of the highest accuracy, by the file alone."""
    points = [(-point["accuracy"], point["step"]) for point in curve(folder)]
    return min(points)[1]


def test_the_curve_has_a_point_every_n_steps_and_at_both_ends(whole):
    folder, _ = whole
    points = records(folder / "evaluations.jsonl")
    assert [point["step"] for point in points] == [0, 2, 4, 5]
    assert len({point["accuracy"] for point in points}) > 1
    for point in points:
        assert point["count"] == 8 and point["accuracy"] == point["correct"] / 8
        assert point["interval"][0] <= point["accuracy"] <= point["interval"][1]
        assert point["seconds"] > 0
    before = json.loads((folder / "evaluation.json").read_text())["before"]["greedy"]
    assert before == {name: points[0][name] for name in before}


def test_evaluation_changes_nothing_of_training(whole, run_args, tmp_path):
    folder, changed = whole
    assert len(changed) == 6 and not any(changed)
    run(run_args(tmp_path / "run", **SETTINGS | dict(eval_every=0, keep_best=False)))
    assert metrics(tmp_path / "run") == metrics(folder)
    assert (tmp_path / "run/completions.jsonl").read_bytes() == (
        folder / "completions.jsonl"
    ).read_bytes()
    assert not (tmp_path / "run/evaluations.jsonl").exists()
    assert is_final(tmp_path / "run", folder / "checkpoints/step-000005")


def is_final(run_folder, weights):
    """Whether a run's final model has the trained weights of a folder."""
    final = Qwen2VLForConditionalGeneration.from_pretrained(run_folder / "final").state_dict()
    kept = load_file(weights / "weights.safetensors")
    assert len(kept) > 50
    return all(torch.equal(final[name], value) for name, value in kept.items())


def test_final_is_made_of_the_best_weights(whole):
    folder, _ = whole
    step = best_step(folder)
    assert step < 5, "choose another toss: the last must not be the best"
    assert is_final(folder, folder / f"best/step-{step:06d}")
    assert not is_final(folder, folder / "checkpoints/step-000005")
    assert [path.name for path in (folder / "best").iterdir()] == [f"step-{step:06d}"]

    evaluation = json.loads((folder / "evaluation.json").read_text())
    (point,) = (point for point in curve(folder) if point["step"] == step)
    assert evaluation["final_step"] == step
    assert evaluation["after"]["greedy"] == {
        name: point[name] for name in evaluation["after"]["greedy"]
    }


@pytest.mark.parametrize("when", ["in a step", "before the line of a point"])
def test_a_killed_run_finds_its_best_weights_again(when, whole, run_args, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = parse_train_config(run_args(folder, **SETTINGS))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if when == "in a step":
            train(config, watch=lambda policy, done: kill() if done == 3 else None)
        else:
            evaluation = RunLog.evaluation
            patch.setattr(
                RunLog,
                "evaluation",
                lambda log, record: kill() if record["step"] == 4 else evaluation(log, record),
            )
            train(config)
    assert not (folder / "final").exists()
    run(["--resume", str(folder)])
    assert_same_run(folder, whole[0])


def kill():
    raise Killed


def test_weights_that_were_not_kept_are_told_before_training(run_args, tmp_path):
    folder = tmp_path / "run"
    run(run_args(folder, **SETTINGS | dict(keep_best=False, steps=3)))
    with pytest.raises(UserError, match=r"keep_best is true, but the weights of .*without it\.$"):
        run(["--resume", str(folder), "--steps", "4", "--keep-best"])


def test_damaged_best_weights_are_told_before_training(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    weights = folder / f"best/step-{best_step(folder):06d}/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = metrics(folder)
    with pytest.raises(UserError, match=r"weights\.safetensors is not .*without --keep-best\.$"):
        run(["--resume", str(folder), "--steps", "7"])
    assert metrics(folder) == before


def test_the_best_of_every_checkpoint_stays(run_args, tmp_path, monkeypatch):
    """A run that goes on from a checkpoint may end with the best of before."""
    asked = itertools.count()

    def rising(output, solution, untagged):
        evaluation, item = divmod(next(asked), 8)
        return Verdict(item <= evaluation, "")

    monkeypatch.setattr("mr1_fast.tasks.judge_completion", rising)
    folder = tmp_path / "run"
    config = parse_train_config(run_args(folder, **SETTINGS | dict(steps=9, algo="sft")))
    with pytest.raises(Killed):
        train(config, watch=lambda policy, done: kill() if done == 7 else None)
    assert [point["correct"] for point in curve(folder)] == [1, 3, 4, 5]
    assert saved_steps(folder / "checkpoints") == [4, 6]
    # The newest checkpoint was not there yet when the best of step 6 was kept.
    assert saved_steps(folder / "best") == [2, 4, 6]


def test_training_ends_when_patience_does(run_args, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the strict judge finds no answer right
    folder = tmp_path / "run"
    settings = dict(steps=9, eval_every=1, patience=2, save_every=5, num_generations=2)
    run(run_args(folder, **settings))
    assert "no higher accuracy in 2 evaluations: training ends" in capsys.readouterr().out
    assert len(metrics(folder)) == 2 and (folder / "final").exists()
    assert [point["step"] for point in curve(folder)] == [0, 1, 2]
    assert json.loads((folder / "evaluation.json").read_text())["final_step"] == 2

    shutil.copytree(folder, again := tmp_path / "again")
    run(["--resume", str(again)])  # nothing is left to do
    assert_same_run(again, folder)
    run(["--resume", str(again), "--patience", "3"])
    assert len(metrics(again)) == 3 and metrics(again)[:2] == metrics(folder)
