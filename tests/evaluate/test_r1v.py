"""R1-V's results files: the published ones come out again, and model output does no harm."""

import json
from pathlib import Path

import pytest

from mr1_fast.accuracy import evaluate
from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.evaluate.r1v import write_r1v_results
from mr1_fast.model.load import make_policy
from mr1_fast.rewards import math_check
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import load_examples

DATA = Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published outputs are not here")
HANGS = r"\boxed{" + "(" * 4000 + "}"
"""Keeps math-verify busy for longer than anyone would wait."""


def record(key, question, truth, *outputs):
    """A record of outputs before any judge has seen them."""
    return {"key": key, "question": question, "ground_truth": truth, "outputs": list(outputs)}


def published_results(name):
    """A published file's text, its results, and what `evaluate` would record of its outputs."""
    text = (DATA / name).read_text(encoding="utf-8")
    results, records = json.loads(text)["results"], []
    for result in results:
        question = result["question"]
        names = question["image_path"], question["question"], str(question["ground_truth"])
        records.append(record(*names, result["model_output"]))
    return text, results, records


@published
def test_the_published_counting_file_is_written_byte_for_byte(tmp_path):
    text, results, records = published_results("superclevr200_qwen2vl_2b_instruct_outputs.json")
    write_r1v_results(tmp_path / "results.json", records, "counting")
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == text
    assert (len(results), sum(result["extracted_answer"] is None for result in results)) == (
        200,
        45,
    )


@published
def test_the_published_geometry_file_is_written_but_for_upper_case(tmp_path):
    text, results, records = published_results("geoqa_test_qwen2vl_7b_instruct_outputs.json")
    write_r1v_results(tmp_path / "results.json", records, "geometry")
    # An output that was cut off at a formula. math-verify has since come to read all symbols as
    # lower case.
    assert [
        index
        for index, result in enumerate(results)
        if result["extracted_answer"] == "(C*D)/((A*B))"
    ] == [354]
    text = text.replace(
        '"extracted_answer": "(C*D)/((A*B))"', '"extracted_answer": "(c*d)/((a*b))"'
    )
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == text
    assert (len(results), sum(result["extracted_answer"] is None for result in results)) == (
        754,
        17,
    )


def test_the_layout_of_each_task(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_r1v_results(
        path, [record("a.png", "Wie β?", "4", "<answer> 4 </answer>", "no")], "counting"
    )
    assert path.read_text() == (
        '{\n  "accuracy": 100.0,\n  "results": [\n    {\n'
        '      "question": {\n        "image_path": "a.png",\n'
        '        "question": "Wie \\u03b2?",\n'
        '        "ground_truth": 4\n      },\n      "ground_truth": 4,\n'
        '      "model_output": "<answer> 4 </answer>",\n      "extracted_answer": 4\n    }\n  ]\n}'
    )
    write_r1v_results(
        path, [record("a.png", "Wie β?", "4°", "x", "<answer> 4 </answer>")], "geometry"
    )
    assert path.read_text(encoding="utf-8") == (
        '{\n  "accuracy": 0.0,\n  "results": [\n    {\n'
        '      "question": {\n        "image_path": "a.png",\n'
        '        "question": "Wie β?",\n        "ground_truth": "4°"\n'
        '      },\n      "ground_truth": "4°",\n'
        '      "model_output": "x",\n      "extracted_answer": null,\n'
        '      "is_correct": false\n    }\n  ]\n}'
    )
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("task", ["counting", "geometry", "figures"])
def test_records_of_an_evaluation(task, model, processor, tmp_path):
    examples = load_examples(task, "drawn", "test", 0).all(3)
    policy = make_policy(model, processor, ModelConfig(device="cpu"))
    judge = get_task(task).judge("strict")
    records = evaluate(
        policy, judge, examples, Sampling(max_new_tokens=4, temperature=1.0), num_generations=2
    )
    write_r1v_results(tmp_path / "results.json", records, task)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    for result, example, made in zip(results, examples, records, strict=True):
        truth = example.solution if task == "geometry" else int(example.solution)
        question = {"image_path": example.key, "question": example.problem, "ground_truth": truth}
        assert (result["question"], result["ground_truth"]) == (question, truth)
        assert result["model_output"] == made["outputs"][0]


def test_what_counts_as_an_integer(tmp_path):
    outputs = [
        "<answer>\n 12 </answer><answer>3</answer>",
        "<answer>12.5</answer>",
        "12",
        f"<answer>{'9' * 5000}</answer>",
    ]
    records = [record("a.png", "?", truth, output) for output in outputs for truth in ("12", "2.5")]
    write_r1v_results(tmp_path / "results.json", records, "counting")
    written = json.loads((tmp_path / "results.json").read_text())
    assert [result["extracted_answer"] for result in written["results"]] == [12, 12, *[None] * 6]
    assert [result["ground_truth"] for result in written["results"]] == [12, "2.5"] * 4
    assert written["accuracy"] == 12.5


def test_an_output_that_is_never_read_through_has_no_answer(tmp_path):
    outputs = ["<answer> 1 </answer>", HANGS, "<answer> 2.5 </answer>", r"$9^{9^{9^{9}}}$", ""]
    records = [record("a.png", "?", "1", output) for output in outputs]
    write_r1v_results(tmp_path / "results.json", records, "geometry")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    answers = ["1", None, "2.50000000000000", "9**(9**(9**9))", None]
    assert [result["extracted_answer"] for result in results] == answers


def test_a_missing_math_verify_is_told(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('gone')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math_check._client.stop()  # one that started before has math-verify
    with pytest.raises(
        UserError, match=r"math-verify cannot be imported \(gone\): run `pip install"
    ):
        write_r1v_results(tmp_path / "results.json", [record("a.png", "?", "4", "4")], "geometry")
    assert [file.name for file in tmp_path.iterdir()] == ["math_verify.py"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        UserError, match=r"folder cannot be written \(Is a directory\): choose another path"
    ):
        write_r1v_results(tmp_path / "folder", [record("a.png", "?", "4", "4")], "counting")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
