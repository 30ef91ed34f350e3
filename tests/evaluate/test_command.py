"""`python -m mr1_fast.evaluate` on small models: records, figures, files and wrong flags."""

import json
import sys

import pytest

from mr1_fast.accuracy import pass_at_k, wilson_interval
from mr1_fast.errors import UserError
from mr1_fast.evaluate import command as evaluate_command
from mr1_fast.evaluate.settings import parse as parse_evaluate
from mr1_fast.files import write_json
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import TEST_SETS, load_examples

from ..data.pictures import picture, write_lines
from ..data.runs import run


@pytest.fixture
def command(tiny_folder, tmp_path, monkeypatch):
    """Run `python -m mr1_fast.evaluate` in this process; returns what it wrote."""

    def call(*flags):
        path = tmp_path / "out" / "evaluation.json"
        small = ["--samples=10", "--max-new-tokens=5", "--batch-size=4", "--device=cpu"]
        argv = ["--model", str(tiny_folder), *small, "--output", str(path), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
        evaluate_command.evaluate_model(parse_evaluate(sys.argv[1:]))
        assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
        return json.loads(path.read_text(encoding="utf-8"))

    return call


@pytest.mark.parametrize("task", ["counting", "geometry"])
def test_greedy_evaluation_records_every_item(task, command, capsys):
    result = command("--task", task)
    expected = load_examples(task, "drawn", "test", 0).all(10)
    records = result["results"]
    items = [(item.key, item.problem, item.solution) for item in expected]
    assert [(r["key"], r["question"], r["ground_truth"]) for r in records] == items
    for record in records:
        assert [len(record["outputs"]), len(record["correct"])] == [1, 1]
        assert record["correct"][0] == get_task(task).is_correct(
            record["outputs"][0], record["ground_truth"]
        )
    correct = sum(record["correct"][0] for record in records)
    assert (result["accuracy"], result["correct"], result["count"]) == (correct / 10, correct, 10)
    assert result["interval"] == list(wilson_interval(correct, 10))
    assert result["pass_at"] == {"1": correct / 10}
    assert result["config"]["task"] == task and result["config"]["temperature"] == 0
    assert (
        "accuracy 0.0% (95% interval 0.0%–27.8%), 10 items, by the strict judge"
        in capsys.readouterr().out
    )
    again = command("--task", task, "--batch-size=10", "--seed=0")
    assert again["results"] == records  # greedy decoding does not depend on how items are batched


def test_pass_at_k_of_samples(command, capsys):
    flags = ["--num-generations=4", "--temperature=1", "--pass-at", "[1,2,4]"]
    result = command(*flags)
    assert result["pass_at"].keys() == {"1", "2", "4"}
    outputs = [record["outputs"] for record in result["results"]]
    assert all(len(texts) == 4 and len(set(texts)) > 1 for texts in outputs)
    for k in (1, 2, 4):
        assert result["pass_at"][str(k)] == pass_at_k(result["results"], k)
        assert f"pass@{k} " in capsys.readouterr().out or k > 1
    assert command(*flags)["results"] == result["results"]
    drawn_alike = command(*flags, "--seed=1")["results"]
    assert not {tuple(record["outputs"]) for record in drawn_alike} & {
        tuple(texts) for texts in outputs
    }
    # batches differ in what they draw
    assert len({tuple(texts) for texts in outputs}) == 10


def test_results_go_into_a_file_for_r1vs_scripts_too(command, tmp_path):
    records = command("--r1v-output", tmp_path / "r1v.json")["results"]
    found = json.loads((tmp_path / "r1v.json").read_text())["results"]
    assert [(r["question"]["image_path"], r["model_output"]) for r in found] == [
        (record["key"], record["outputs"][0]) for record in records
    ]


def test_every_verdict_is_explained(command, capsys):
    result = command("--explain")
    lines = capsys.readouterr().out.splitlines()
    explained = [line for line in lines if line.startswith("wrong · ")]
    for record, line in zip(result["results"], explained, strict=True):
        assert line.startswith(f"wrong · {record['why'][0]} · ")
        assert line.endswith(record["key"][-20:])


def test_a_published_test_set_has_the_figures_of_both_judges(command, tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    row = {"image_path": "a.png", "question": "How many?", "ground_truth": 3}
    write_lines(tmp_path / TEST_SETS["superclevr200"], [row] * 3)
    result = command("--data", "superclevr200", "--image-root", tmp_path)
    assert (result["judge"], result["count"]) == ("strict", 3)
    assert result["other_judges"].keys() == {"r1v"}
    said = capsys.readouterr().out
    assert "3 items, by the strict judge\naccuracy" in said
    assert "the same outputs, by R1-V's rule" in said
    flipped = command("--data", "superclevr200", "--image-root", tmp_path, "--judge=r1v")
    assert (flipped["judge"], *flipped["other_judges"]) == ("r1v", "strict")


def test_each_split_has_its_own_items(command):
    keys = {
        split: {r["key"] for r in command(f"--split={split}")["results"]}
        for split in ("train", "validation", "test")
    }
    assert all(len(found) == 10 for found in keys.values())
    assert not keys["train"] & keys["validation"] and not keys["validation"] & keys["test"]
    assert not keys["train"] & keys["test"]


def test_the_final_model_answers_as_it_did_at_the_end_of_training(run_args, command, tmp_path):
    run(run_args(tmp_path / "run", max_new_tokens=5, learning_rate=1e-2))
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    outputs = [
        record["outputs"][0] for record in command("--model", tmp_path / "run" / "final")["results"]
    ]
    assert outputs[:4] == [shown["after"]["text"] for shown in result["examples"]]
    assert outputs[:4] != [shown["before"]["text"] for shown in result["examples"]]


def test_right_answers_are_counted(run_args, command, tmp_path):
    """A model that has learnt how solutions look, but hardly counts yet, is right now and then."""
    settings = dict(
        algo="sft",
        num_generations=1,
        train_samples=6,
        prompts_per_step=6,
        steps=40,
        learning_rate=3e-3,
    )
    run(
        run_args(tmp_path / "run", eval_samples=0, save_every=0, lr_schedule="constant", **settings)
    )
    result = command("--model", tmp_path / "run" / "final", "--split=train", "--max-new-tokens=24")
    correct = [record["correct"][0] for record in result["results"]]
    assert result["correct"] == sum(correct) and result["accuracy"] == sum(correct) / 10
    assert 0 < sum(correct) < 10
    for record in result["results"]:
        assert (f"<answer> {record['ground_truth']} </answer>" in record["outputs"][0]) == record[
            "correct"
        ][0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--stepz=3"],
            "unrecognized arguments: --stepz=3: see python -m mr1_fast.evaluate --help",
        ),
        (["--task=chess"], "task is chess, but must be one of counting, geometry"),
        (["--split=testmini"], "the splits train, validation, test"),
        (["--pass-at=[1,2]"], "pass_at is"),
    ],
)
def test_wrong_flags_are_told(flags, message, command, tmp_path):
    with pytest.raises(UserError, match=message):
        command(*flags)
    assert not (tmp_path / "out").exists()


def test_the_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "evaluation.json"
    write_json(path, {"accuracy": 0.5, "text": "β"})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "text": "β"}
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"evaluation.json cannot be written \(.*\): choose another with --output"
    ):
        write_json(tmp_path / "file" / "evaluation.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder cannot be written \(Is a directory\)"):
        write_json(tmp_path / "folder", {})
    assert {file.name for file in tmp_path.iterdir()} == {"deep", "file", "folder"}
