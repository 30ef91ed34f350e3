"""A first run of each family: what it may ask, and that it learns (slow)."""

import json
from dataclasses import replace

import pytest
import torch

from mr1_fast.config import TaskConfig
from mr1_fast.errors import UserError
from mr1_fast.evaluate.command import evaluate_model
from mr1_fast.evaluate.settings import parse as parse_evaluation
from mr1_fast.model.tiny import BUILT_IN_MODELS, tiny_model, tiny_processor
from mr1_fast.start import START, supervised_start

from .data.pictures import picture
from .data.runs import records, run

STEPS, SHARE = 24, 8
"""Steps of a run, and how many of the first and of the last ones are compared."""
EARLY = {
    "tiny-qwen2_5vl": dict(steps=40, prompts_per_step=16),
    "tiny-qwen3vl": dict(steps=40),
    "tiny-text": dict(steps=30),
}
"""The supervised start ends early: a quarter to half of the answers have the form asked for."""


@pytest.mark.slow
@pytest.mark.parametrize("model", EARLY)
def test_the_reward_rises(model, tmp_path, monkeypatch):
    monkeypatch.setitem(START, model, replace(START[model], **EARLY[model]))
    prompts, rate = (16, 7e-4) if model == "tiny-text" else (8, 1e-3)
    learning = [f"--prompts-per-step={prompts}", f"--learning-rate={rate}"]
    words = [f"--model={model}", f"--output={tmp_path}", f"--steps={STEPS}", "--eval-samples=0"]
    run([*words, *learning, "--warmup-fraction=0.1"])
    rewards = [record["reward"] for record in records(tmp_path / "metrics.jsonl")]
    first, last = (sum(part) / SHARE for part in (rewards[:SHARE], rewards[-SHARE:]))
    # It rose by 0.29 to 0.43 with each model and each of two seeds, which differ by 0.07 at most.
    assert last > first + 0.15


WORDS = [
    {"question": f"Add {a} and 5.", "answer": f"{a}+5 = <<{a}+5={a + 5}>>{a + 5}\n#### {a + 5}"}
    for a in range(6)
]
"""Rows as GSM8K has them."""


@pytest.fixture(scope="module", params=["tiny", "tiny-text"])
def fresh(request, tmp_path_factory):
    """The folder of a fresh built-in model, which needs no supervised start."""
    folder, processor = tmp_path_factory.mktemp("fresh"), tiny_processor(request.param)
    torch.manual_seed(0)
    tiny_model(processor, request.param).save_pretrained(folder)
    processor.save_pretrained(folder, BUILT_IN_MODELS[request.param].family.model_type)
    return folder


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("algo", ["grpo-d", "sft"])
def test_rows_of_text_are_trained_on_and_evaluated(algo, fresh, run_args, tmp_path):
    data = write(tmp_path / "train.jsonl", WORDS)
    settings = dict(model=fresh, task="free", data=data, eval_data=data, algo=algo, steps=1)
    run(run_args(tmp_path / "run", **settings))
    shown = (tmp_path / "run" / "report.html").read_text()
    assert "Add 3 and 5." in shown and "&lt;&lt;" not in shown
    output = tmp_path / "evaluation.json"
    words = [f"--model={tmp_path / 'run' / 'final'}", "--task=free", f"--data={data}"]
    evaluate_model(parse_evaluation([*words, f"--output={output}", "--max-new-tokens=4"]))
    truths = [record["ground_truth"] for record in json.loads(output.read_text())["results"]]
    assert truths == [str(a + 5) for a in range(6)]


def test_rows_with_and_without_an_image_go_together(fresh, run_args, tmp_path):
    picture(1).save(tmp_path / "a.png")
    data = write(tmp_path / "train.jsonl", [*WORDS, {**WORDS[0], "image": "a.png"}])
    settings = dict(model=fresh, task="free", data=data, eval_samples=0, steps=1)
    arguments = run_args(tmp_path / "run", prompts_per_step=7, **settings)
    if "vision_config" in json.loads((fresh / "config.json").read_text()):
        run(arguments)
        assert len(records(tmp_path / "run" / "completions.jsonl")) == 7
        return
    with pytest.raises(UserError, match=r"row 7 of .* has an image, but the model reads text"):
        run(arguments)


def test_a_drawn_image_is_nothing_for_a_model_of_text(tmp_path):
    words = ["--model=tiny-text", "--task=counting", f"--output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="has an image, but the model reads text alone: choose"):
        run(words)
    with pytest.raises(UserError, match="has an image, but the model reads text alone: choose"):
        evaluate_model(parse_evaluation(words))
    assert not list(tmp_path.iterdir()), "nothing was trained or written"


def test_a_model_with_images_starts_on_sums(tmp_path, monkeypatch):
    monkeypatch.setenv("MR1_FAST_CACHE", str(tmp_path))
    folder = supervised_start("tiny", [TaskConfig(task="arithmetic")], seed=0, enough=0.0)
    assert "arithmetic-1" in folder.name and (folder / "model.safetensors").exists()
