"""A bad row among good ones is named before the first step, or left out: whole runs."""

import json

import pytest
from PIL import Image

from mr1_fast.command_line import parse_train_config
from mr1_fast.data_check import check_data
from mr1_fast.errors import UserError
from mr1_fast.preparing import load_data

from .data.models import tiny_policy
from .data.runs import run

ROW = {"image": "a.png", "problem": "How many?", "solution": "3"}
THIN = dict(size=(2048, 9))
BAD_ROWS = {
    "too large": (dict(size=(800, 600)), {"max_pixels": 10_000}, "has 800×600 pixels"),
    "too thin": (THIN, {}, "2048×9"),
    "truncated": (dict(cut=True), {}, "cannot be decoded"),
    "missing": (dict(row={"image": "gone.png"}), {}, "gone.png .* is missing"),
    "too long": (dict(row={"problem": "so " * 3000}), {}, r"has \d+ tokens"),
    "mark": (dict(row={"problem": "<image> or <image>?"}), {}, "2"),
    "empty": (dict(row={"solution": " "}), {}, "has no 'solution'"),
    "solution": (dict(row={"solution": "9" * 2000}), {}, "too long, so no answer can be right"),
    "list": (dict(row={"solution": ["3", "three"]}), {}, "several values in 'solution'"),
}


def data(folder, size=(56, 56), cut=False, row=()):
    """A folder with 40 rows, of which the 38th differs."""
    folder.mkdir()
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    Image.new("RGB", size, "red").save(folder / "bad.png")
    if cut:
        content = (folder / "bad.png").read_bytes()
        (folder / "bad.png").write_bytes(content[: len(content) // 2])
    rows = [dict(ROW) for _ in range(40)]
    rows[37] |= {"image": "bad.png"} | dict(row)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture
def arguments(run_args, tmp_path):
    """The arguments of a run on such data, with one bad row or with the settings given."""

    def call(bad, **settings):
        settings |= {"data": data(tmp_path / "data", **bad), "eval_samples": 0, "steps": 2}
        return run_args(tmp_path / "run", **settings)

    return call


@pytest.mark.parametrize("bad, settings, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_late_bad_row_is_named_before_anything_is_written(
    bad, settings, message, arguments, tmp_path
):
    with pytest.raises(UserError, match=r"^1 row of .*row 38 of .*/data.*") as raised:
        run(arguments(bad, **settings))
    assert raised.match(message) and raised.match("--bad-rows skip.$")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Folder of a fresh tiny model of text alone."""
    policy, folder = tiny_policy(family="qwen3"), tmp_path_factory.mktemp("text")
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder, "qwen3")
    return folder


def test_an_image_for_a_model_of_text_is_named_or_left_out(text_folder, run_args, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [{"problem": "How many?", "solution": "3"} for _ in range(3)] + [ROW]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = dict(model=text_folder, data=str(tmp_path / "train.jsonl"), eval_samples=0, steps=1)
    with pytest.raises(UserError, match=r"^1 row of .*row 4 of .* has an image, but the model rea"):
        run(run_args(tmp_path / "run", **settings))
    config = parse_train_config(run_args(tmp_path / "run", bad_rows="skip", **settings))
    source, _ = load_data(config)
    check_data(source, config)
    assert len(source.indices) == 3


def test_a_drawn_task_with_images_is_refused_before_the_first_step(text_folder, run_args, tmp_path):
    with pytest.raises(UserError, match="has an image, but the model reads text alone"):
        run(run_args(tmp_path / "run", model=text_folder, task="counting"))
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_left_out_on_request(arguments, tmp_path, capsys):
    run(arguments(dict(cut=True, row={"problem": "Bad?"}), bad_rows="skip", prompts_per_step=20))
    assert "left out 1 row of" in capsys.readouterr().out
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 40 and {json.loads(line)["problem"] for line in lines} == {"How many?"}


def test_a_thin_image_is_padded_with_shrink_images(arguments, tmp_path):
    run(arguments(THIN, shrink_images=True, prompts_per_step=40, num_generations=2))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "problem",
    [
        "<|vision_start|><|image_pad|><|vision_end|>How many?",
        "What does <|image_pad|> or <|im_end|> mean?",
    ],
)
def test_special_tokens_in_a_problem_do_no_harm(problem, arguments, tmp_path):
    """The first is how data of Qwen users marks an image; the second is text."""
    run(arguments(dict(row={"problem": problem}), prompts_per_step=40, num_generations=2))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_first_prompt_is_shown_once(arguments, capsys):
    run(arguments({}, prompt_suffix="Be brief.\x1b[2J", system_prompt="You count."))
    said = capsys.readouterr().out
    assert said.count("the first prompt:") == 1
    assert "You count." in said and "How many? Be brief.\\x1b[2J" in said and "\x1b[2J" not in said


def test_a_row_without_a_worked_solution_is_named_or_left_out(run_args, tmp_path, capsys):
    worked = ROW | {"image": None, "thinking": "One, two, three."}
    lines = [json.dumps(row) for row in [worked] * 3 + [worked | {"thinking": " "}]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings = dict(data=str(tmp_path / "rows.jsonl"), eval_samples=0, prompts_per_step=3, steps=1)
    # What is good for GRPO is remembered, but does not count for supervised training.
    run(run_args(tmp_path / "grpo", **settings))
    with pytest.raises(UserError, match=r"^1 row of .*row 4 of .* has no 'thinking'"):
        run(run_args(tmp_path / "run", algo="sft", **settings))
    run(run_args(tmp_path / "run", algo="sft", bad_rows="skip", **settings))
    assert "left out 1 row of" in capsys.readouterr().out
