"""Running experiments: each cell once, equal budgets, interruptions, failures, and the presets."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml

from mr1_fast import start as start_module
from mr1_fast.accuracy import judged
from mr1_fast.config import TaskConfig
from mr1_fast.errors import Stopped, UserError
from mr1_fast.experiment import run_cell, scales, studies
from mr1_fast.experiment.__main__ import main
from mr1_fast.experiment.cards import CARDS
from mr1_fast.experiment.command import make_experiment
from mr1_fast.experiment.description import settings_of
from mr1_fast.experiment.presets import find_preset, known_presets
from mr1_fast.experiment.scales import SCALES
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.experiment.studies import GRPO_D, SFT_ANSWER, SFT_SOLUTION, Study, Variant
from mr1_fast.integrity import CHECKSUMS, checksum, checksums, sealed
from mr1_fast.kl_schedule import AccuracyKL, DynamicKL, TargetKL
from mr1_fast.profiles import BUILT_IN
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import TEST_SETS, load_examples

from ..data.pictures import encoded, picture, write_lines

RECIPES = Path(__file__).parents[2] / "recipes"
FAULT = """
from pathlib import Path
from mr1_fast.rewards import reward


@reward("fragile")
def fragile(completion, example):
    if not Path(__file__).with_name("mended").exists():
        raise RuntimeError("the reward\\nbroke")
    return 0.0
"""


@pytest.fixture
def quick(tiny_folder, plugin, monkeypatch):
    """`quick(output, *flags)` runs three steps of a fresh model, with a reward for letters."""
    tiny = SCALES["tiny"]
    shared = {
        "steps": 3,
        "prompts_per_step": 2,
        "num_generations": 3,
        "max_new_tokens": 6,
        "save_every": 1,
    }
    shared |= {"plugin": str(plugin), "extra_rewards": {"letters": 1.0}, "learning_rate": 1e-3}
    scale = replace(
        tiny,
        model=str(tiny_folder),
        settings={**tiny.settings, **shared, "device": "cpu"},
        seeds=(0,),
        curve_every=2,
        curve_items=3,
    )
    monkeypatch.setitem(scales.SCALES, "quick", scale)
    # Of the pages, that of the experiment has plots; those of its runs would take most of the time.
    monkeypatch.setattr("mr1_fast.report.plots.plot_element", lambda *_: "")

    def run_quick(output: Path, *flags: str) -> Path:
        main(["--preset", "quick", "--output", str(output), "--test-items", "5", *flags])
        return output

    return run_quick


def use_methods(monkeypatch, *variants: Variant, trained=("counting",)) -> None:
    monkeypatch.setitem(studies.STUDIES, "method", Study("method", "Method", variants, trained))


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def metrics(cell: Path) -> list[dict]:
    """What training recorded, without what differs from run to run."""
    lines = [json.loads(line) for line in (cell / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds_", "tflops_")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in lines
    ]


def test_every_cell_is_trained_tested_on_both_tasks_and_run_once(
    quick, monkeypatch, tmp_path, capsys
):
    methods = (SFT_SOLUTION, studies.GRPO, GRPO_D)
    use_methods(monkeypatch, *methods, trained=("counting", "geometry"))
    output = quick(tmp_path / "out")
    shown = capsys.readouterr().out
    assert [line.split("]")[0] for line in shown.splitlines()[:-1]] == [
        f"[{n}/7" for n in range(1, 8)
    ]
    names = {
        "base/seed0",
        *(f"{m.name}/{r}/seed0" for m in methods for r in ("counting", "geometry")),
    }
    cells = {
        str(path.parent.relative_to(output / "cells")): path.parent
        for path in output.rglob("cell.json")
    }
    assert set(cells) == names
    for name, cell in cells.items():
        record = json.loads((cell / "cell.json").read_text())
        parts = name.split("/")
        assert (record["variant"], record["trained"]) == (
            parts[0],
            parts[1] if len(parts) == 3 else None,
        )
        assert record["steps"] == (3 if record["trained"] else 0)
        for role in ("counting", "geometry"):
            for mode in ("greedy", "sampled"):
                results = json.loads((cell / f"{role}-{mode}.json").read_text())
                right = [
                    result["extracted_answer"] == result["ground_truth"]
                    for result in results["results"]
                ]
                assert (
                    record["correct"][role][mode] == "".join(str(int(each)) for each in right)
                    and len(right) == 5
                )
                assert results["accuracy"] == pytest.approx(100 * sum(right) / 5)
        assert (cell / "run" / "final" / "model.safetensors").exists() == bool(record["trained"])
        assert not (cell / "run" / "checkpoints").exists()
        if record["trained"]:
            points = [json.loads(line) for line in (cell / "curve.jsonl").read_text().splitlines()]
            assert [point["step"] for point in points] == [0, 2, 3]
            assert all(point.keys() == {"step", "counting", "geometry"} for point in points)
    assert len(list((output / "cells/base/seed0/images").iterdir())) == 8
    assert (
        "GRPO-D" in (output / "report.html").read_text()
        and "GRPO-D" in (output / "report.md").read_text()
    )

    before = stamps(output / "cells")
    quick(output)
    assert stamps(output / "cells") == before


def test_more_seeds_join_an_experiment(quick, monkeypatch, tmp_path):
    use_methods(monkeypatch, SFT_SOLUTION)
    output = quick(tmp_path / "out")
    before = stamps(output / "cells")
    quick(output, "--seeds", "[1]")
    about = json.loads((output / "experiment.json").read_text())
    commands = about["command"].splitlines()
    assert about["seeds"] == [0, 1] and len(commands) == 2
    assert "--seeds" not in commands[0] and commands[1].endswith("--seeds '[1]'")
    assert about["date"].count(";") <= 1 and ";" not in about["versions"]["torch"]
    assert {
        path: stamp for path, stamp in stamps(output / "cells").items() if path in before
    } == before
    assert len(list(output.rglob("cell.json"))) == 4


def test_grpo_and_grpo_d_see_the_same_prompts_and_begin_with_the_same_samples(
    quick, monkeypatch, tmp_path
):
    use_methods(monkeypatch, studies.GRPO, GRPO_D)
    output = quick(tmp_path / "out")
    seen = []
    for method in ("grpo", "grpo-d"):
        lines = (
            (output / f"cells/{method}/counting/seed0/run/completions.jsonl")
            .read_text()
            .splitlines()
        )
        seen.append([json.loads(line) for line in lines])
    assert [(line["step"], line["key"]) for line in seen[0]] == [
        (line["step"], line["key"]) for line in seen[1]
    ]
    first = [[line["completions"] for line in lines if line["step"] == 0] for lines in seen]
    assert first[0] == first[1]


@pytest.mark.parametrize("name", SCALES)
def test_methods_differ_in_nothing_but_their_algorithm(name, tmp_path):
    experiment = make_experiment(ExperimentConfig(preset=name, output=str(tmp_path)))
    for role in ("counting", "geometry"):
        found = {}
        for cell in experiment.cells():
            if cell.trained == role and cell.seed == 0:
                found[cell.variant.name] = vars(experiment.settings(cell))
        has_reasoning = experiment.scale.tasks[role].has_reasoning
        targets = ["answer", "solution"] if has_reasoning else ["answer"]
        assert found.keys() == {"grpo", "grpo-d", *(f"sft-{target}" for target in targets)}
        different = {
            name for name, value in found["grpo"].items() if found["grpo-d"][name] != value
        }
        assert different == {"algo", "beta_shape", "output"}  # the path of β is what they are
        assert [found[name]["beta_shape"] for name in ("grpo", "grpo-d")] == ["constant", "grpo-d"]
        of_sft = (
            set()
            if experiment.scale.model in BUILT_IN
            else {"learning_rate", "lr_schedule", "warmup_fraction"}
        )
        for target in targets:
            sft = found[f"sft-{target}"]
            assert sft["sft_target"] == target
            different = {name for name, value in found["grpo"].items() if sft[name] != value}
            different -= {"sft_target"}
            assert different == {"algo", "output"} | of_sft  # R1-V's own, at the real scale
        beta = {"counting": (0.04, 0.1, 0.04), "geometry": (0.0, 0.02, 0.01)}[role]
        assert tuple(found["grpo-d"][name] for name in ("beta_min", "beta_max", "beta")) == beta


@pytest.mark.parametrize("when", ["in a step", "before its evaluation"])
def test_an_interrupted_cell_goes_on_and_ends_as_if_nothing_had_happened(
    when, quick, monkeypatch, tmp_path
):
    use_methods(monkeypatch, GRPO_D)
    whole = quick(tmp_path / "whole") / "cells/grpo-d/counting/seed0"

    def note_signal_and_train(config, watch, world):
        def stop_in_a_step(policy, done):
            watch(policy, done)
            if done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(config, stop_in_a_step, world)

    def interrupt_or_test(experiment, config, cell, folder):
        if cell.trained:
            raise KeyboardInterrupt
        return test(experiment, config, cell, folder)

    test, train = run_cell._test, run_cell.train
    told = pytest.raises(Stopped, match="stopped: run the command again to go on")
    with monkeypatch.context() as patch, told as stopped:
        if when == "in a step":
            patch.setattr(run_cell, "train", note_signal_and_train)
        else:
            patch.setattr(run_cell, "_test", interrupt_or_test)
        quick(tmp_path / "out")
    assert stopped.value.status == (143 if when == "in a step" else 130)
    cell = tmp_path / "out/cells/grpo-d/counting/seed0"
    assert not (cell / "cell.json").exists() and not (cell / "failed.json").exists()
    assert "GRPO-D" in (tmp_path / "out/report.html").read_text()
    if when == "before its evaluation":  # and then a bit of the trained model is another
        model = cell / "run/final/model.safetensors"
        model.write_bytes(model.read_bytes()[:-9] + b"\1" + model.read_bytes()[-8:])
    quick(tmp_path / "out")
    made_again = "is not what was trained" in (cell / "log.txt").read_text()
    assert made_again == (when == "before its evaluation")
    assert min(line["grad_norm"] for line in metrics(whole)) > 0 and metrics(cell) == metrics(whole)
    for name in ("run/final/model.safetensors", "curve.jsonl", "counting-sampled.json"):
        assert (cell / name).read_bytes() == (whole / name).read_bytes()


def test_a_failed_cell_is_told_and_tried_again(quick, monkeypatch, tmp_path, capsys):
    plugin = tmp_path / "fault.py"
    plugin.write_text(FAULT)
    fragile = Variant(
        "fragile", "fragile", {"plugin": str(plugin), "extra_rewards": {"fragile": 0.1}}
    )
    use_methods(monkeypatch, fragile, SFT_SOLUTION)
    output = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"1 cell failed .fragile · counting · seed 0: .*the reward broke.* again"
    ):
        quick(output)
    assert "fragile · counting · seed 0: FAILED: The reward 'fragile'" in capsys.readouterr().out
    failed = json.loads((output / "cells/fragile/counting/seed0/failed.json").read_text())
    assert "\n" not in failed["error"] and "RuntimeError" in failed["traceback"]
    assert (output / "cells/sft-solution/counting/seed0/cell.json").exists()
    assert "the reward broke" in (output / "report.html").read_text()
    (tmp_path / "mended").touch()
    before = stamps(output / "cells/sft-solution")
    quick(output)
    assert not list(output.rglob("failed.json"))
    assert stamps(output / "cells/sft-solution") == before


def test_a_dry_run_tells_what_is_to_do_and_writes_nothing(quick, monkeypatch, tmp_path, capsys):
    use_methods(monkeypatch, SFT_SOLUTION)
    quick(tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == [
        "base model · seed 0",
        "SFT on worked solutions · counting · seed 0",
    ]
    assert all("to do" in line for line in lines[1:3])
    assert lines[3].startswith("all that is left") and float(lines[3].split()[-1]) > 0
    quick(tmp_path / "out")
    capsys.readouterr()
    quick(tmp_path / "out", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert all("finished" in line for line in lines[1:3]) and lines[3].split()[-1] == "0.0"


def test_a_dry_run_claims_no_time_that_nobody_measured(tmp_path, capsys):
    main(["--preset", "small", "--seeds", "[0]", "--output", str(tmp_path / "out"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "GRPO-D · geometry · seed 0" in shown and "nobody has measured the time" in shown
    assert not any(word in shown for word in ("minutes", "H100", "all that is left"))


def test_a_dry_run_tells_hours_on_each_card_and_which_were_measured(tmp_path, capsys):
    main(["--preset", "qwen2vl_2b", "--output", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:52].strip(): line.split()[-4:-1] for line in lines}
    assert "SFT on worked solutions · geometry · seed 0" not in cells  # its data have none
    measured, other, slowest = map(float, cells["GRPO-D · geometry · seed 0"])
    # 500 steps of 13.5 s, and 954 items are answered twice
    assert measured == pytest.approx((500 * 13.5 + 2 * 954 * 0.04) / 3600, abs=0.05)
    assert 3 * measured < other < slowest
    assert lines[-3].startswith("H100: measured") and lines[-2].startswith(
        "RTX 4090 and RTX 3090: estimated"
    )


def test_the_times_of_the_real_scale_are_those_that_the_benchmarks_recorded():
    scale = SCALES["qwen2vl_2b"]
    folder = RECIPES.parent / "benchmarks/results/nvidia-h100-80gb-hbm3"
    whole = json.loads((folder / "memory_2b.json").read_text())
    assert whole["machine"]["device"] == f"NVIDIA {CARDS[scale.measured_on].name}"
    step = whole["cases"]["2b_full"]
    stages = {name: value for name, value in step.items() if name.startswith("seconds_")}
    assert scale.measured["grpo"] == pytest.approx(sum(stages.values()), rel=0.01)
    assert scale.decoding["grpo"] == pytest.approx(stages["seconds_rollout"], rel=0.01)
    answers = json.loads((folder / "rollout.json").read_text())["long"]
    prompts, group = answers["settings"]["prompts"], answers["settings"]["group"]
    ours = answers["rows"][0]
    drawing = (ours["median"] - ours["first_tokens"]) / (prompts * group)
    assert scale.decoding["evaluation"] == pytest.approx(drawing, rel=0.01)
    reading = ours["first_tokens"] / prompts  # each item is a prompt of its own
    assert scale.measured["evaluation"] == pytest.approx(drawing + reading, rel=0.01)


def test_another_experiment_in_the_same_folder_is_refused(quick, monkeypatch, tmp_path):
    use_methods(monkeypatch, SFT_SOLUTION)
    output = quick(tmp_path / "out")
    before = stamps(output)
    with pytest.raises(
        UserError, match="holds an experiment with other settings: choose another --output"
    ):
        quick(output, "--settings", '{"steps": 4}')
    assert stamps(output) == before
    (output / "cells/base/seed0/cell.json").write_text('{"correct": 1}')
    with pytest.raises(
        UserError, match=r"cell\.json is damaged .*: remove it, and run the experiment again"
    ):
        quick(output)
    (output / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"experiment\.json is damaged"):
        quick(output)


def test_no_more_items_are_promised_than_a_test_set_has(quick, monkeypatch, tmp_path):
    """A list of two items on disk, and five are asked for."""
    for index in range(2):
        picture(index).save(tmp_path / f"{index}.png")
    rows = [
        {"image_path": f"{index}.png", "question": "?", "ground_truth": 3} for index in range(2)
    ]
    listed = write_lines(tmp_path / "test.jsonl", rows)
    scale = scales.SCALES["quick"]
    counting = replace(scale.tasks["counting"], test={"task": "counting", "data": listed})
    tasks = {**scale.tasks, "counting": counting}
    monkeypatch.setitem(scales.SCALES, "quick", replace(scale, tasks=tasks, curve_every=0))
    use_methods(monkeypatch, SFT_SOLUTION)
    output = quick(tmp_path / "out")
    tasks = json.loads((output / "experiment.json").read_text())["tasks"]
    assert [tasks[role]["items"] for role in ("counting", "geometry")] == [2, 5]
    assert "SFT" in (output / "report.md").read_text()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preset": "huge"}, "preset is 'huge', but the presets are tiny, tiny_alpha"),
        ({"test_items": 0}, "test_items is 0, but must be at least 1"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], but must be different"),
        ({"settings": {"algo": "grpo"}}, "settings has algo, which the preset's cells decide"),
        ({"settings": {"push_to_hub": "me/x", "open": True}}, "settings has open, push_to_hub, wh"),
        ({"settings": {"eval_every": 5, "keep_best": True}}, "settings has eval_every, keep_best"),
        ({"settings": {"patience": 2, "save": "adapter"}}, "settings has patience, save, which"),
        ({"settings": {"beta_shape": "linear-up"}}, "settings has beta_shape, which preset tiny v"),
        ({"settings": {"stepz": 1}}, "stepz"),
        (
            {"settings": {"model": "tiny-text"}},
            "settings has the model tiny-text, which reads text",
        ),
        (
            {"preset": "tiny_beta", "settings": {"beta": 0.02}},
            "settings has beta, which preset tiny_beta varies",
        ),
        (
            {"preset": "tiny_schedules", "settings": {"beta": 0.02}},
            "settings has beta, which preset tiny_schedules",
        ),
        ({"settings": {"steps": -1}}, "steps is -1, but must be at least 1"),
    ],
)
def test_what_no_experiment_could_mean_is_told_in_one_sentence(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_experiment(ExperimentConfig(output=str(tmp_path), **settings))


def test_another_model_may_take_the_presets_place(tiny_folder, tmp_path):
    settings = {"model": str(tiny_folder)}
    experiment = make_experiment(
        ExperimentConfig(preset="qwen2vl_2b", output=str(tmp_path), settings=settings)
    )
    assert experiment.base(0) == str(tiny_folder)
    assert {experiment.settings(cell).model for cell in experiment.cells()} == {str(tiny_folder)}


def test_missing_test_images_show_before_anything_is_written(tmp_path):
    with pytest.raises(
        UserError, match=r"superclevr200 needs image_root.*--counting-images is the image_root"
    ):
        main(["--preset", "qwen2vl_2b", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", known_presets())
def test_every_preset_plans_cells_that_can_be_trained(name, tmp_path):
    experiment = make_experiment(ExperimentConfig(preset=name, output=str(tmp_path), seeds=[0]))
    cells = experiment.cells()
    assert (
        len({cell.folder(tmp_path) for cell in cells})
        == len(cells)
        > len(experiment.study.variants)
    )
    assert all(not experiment.settings(cell).eval_samples for cell in cells)

    told = settings_of(experiment)  # what experiment.json says is what the cells are trained with
    for cell in cells[1:]:
        made = told["variants"][cell.variant.name]
        values = {**told, **told[cell.trained], **made, **made.get(cell.trained, {})}
        found = vars(experiment.settings(cell))
        named = values.keys() & found.keys() - {"eval_samples", "preset"}
        assert {name: found[name] for name in named} == {name: values[name] for name in named}
        assert experiment.study.settings.keys() <= named


def test_ablations_vary_what_the_paper_varies(tmp_path):
    def values(preset: str, setting: str, role: str = "geometry") -> list:
        experiment = make_experiment(
            ExperimentConfig(preset=preset, output=str(tmp_path), seeds=[0])
        )
        cells = [cell for cell in experiment.cells() if cell.trained == role]
        return [getattr(experiment.settings(cell), setting) for cell in cells]

    assert values("tiny_alpha", "format_weight") == [0, 0.25, 0.5, 0.75, 1]
    assert values("tiny_beta", "beta") == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    assert values("tiny_generations", "num_generations") == [4, 8, 16]
    assert values("tiny_schedules", "algo") == ["grpo"] * 2 + ["grpo-d"] * 6
    assert values("tiny_schedules", "beta_shape")[2:] == [
        "grpo-d",
        "reversed",
        "linear-up",
        "linear-down",
        "accuracy",
        "target-kl",
    ]


@pytest.mark.parametrize("role, low, high", [("counting", 0.04, 0.1), ("geometry", 0.0, 0.02)])
def test_the_paths_of_beta_over_the_steps_have_one_mean(role, low, high):
    def mean(**path) -> float:
        schedule = DynamicKL(**path, total_steps=10_000)
        return sum(map(schedule, range(10_000))) / 10_000

    papers = mean(beta_min=low, beta_max=high)
    constant = studies.constant_beta(30).by_role[role]["beta"]
    assert constant == pytest.approx(30 * papers, rel=1e-3)
    for shape in ("grpo-d", "reversed", "linear-up", "linear-down"):
        path = studies.scheduled_beta(30, shape).by_role[role]
        assert mean(**path, shape=shape) == pytest.approx(30 * papers, rel=1e-3), shape
    by_accuracy = AccuracyKL(**studies.accuracy_beta(30, at=0.3).by_role[role])
    by_accuracy.observe_accuracy(0.3)
    assert by_accuracy(0) == pytest.approx(30 * papers, rel=1e-3)
    by_kl = dict(studies.target_kl(30, 0.02).by_role[role])
    assert TargetKL(target=by_kl.pop("target_kl"), **by_kl)(0) == pytest.approx(constant)


@pytest.mark.parametrize(
    "preset, role, name",
    [
        ("qwen2vl_2b", "counting", "qwen2vl_2b_counting_24gb"),
        ("qwen2vl_2b", "geometry", "qwen2vl_2b_geometry_24gb"),
        ("qwen3vl_2b", "counting", "qwen3vl_2b_full_24gb"),
    ],
)
def test_the_real_scale_trains_as_the_recipes_do(preset, role, name, tmp_path):
    experiment = make_experiment(ExperimentConfig(preset=preset, output=str(tmp_path)))
    cell = next(c for c in experiment.cells() if c.trained == role and c.variant is GRPO_D)
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    different = {
        name for name, value in recipe.items() if getattr(experiment.settings(cell), name) != value
    }
    assert different <= {
        "preset",
        "data",
    }  # auto is the task's; counting's samples have R1's reasoning, for SFT


def test_the_real_scale_runs_on_data_in_its_published_layout(tiny_folder, monkeypatch, tmp_path):
    """All of the preset but its size: the model is tiny, the sets hold a few pictures.

    The first answer to each test set is replaced by one that R1-V's rule alone calls right.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {
        "counting": {
            "thinking": ["<think> three items </think>"] * 4,
            "solution": ["<answer> 3 </answer>"] * 4,
        },
        "geometry": {"solution": ["<answer> 145° </answer>"] * 4},  # no reasoning
    }
    lists = {
        "counting": ("images/superCLEVR_new_{}.png", 3),
        "geometry": ("Geo170K/images/test/{}.png", "145°"),
    }
    said = {"counting": "<answer>3</answer> or <answer>4</answer>", "geometry": "It is 145°."}

    def with_a_careless_answer(policy, config, *others):
        records = answers(policy, config, *others)
        records[0]["outputs"] = [said[config.task]]
        return judged(records, get_task(config.task).judge(config.judge))

    answers = run_cell.answers
    monkeypatch.setattr(run_cell, "answers", with_a_careless_answer)
    methods = (SFT_ANSWER, SFT_SOLUTION, studies.GRPO)
    use_methods(monkeypatch, *methods, trained=("counting", "geometry"))
    scale = scales.SCALES["qwen2vl_2b"]
    tasks, images = {}, {}
    for role, columns in rows.items():
        pictures = [
            {"bytes": encoded(picture(index)), "path": f"{index}.png"} for index in range(4)
        ]
        table = datasets.Dataset.from_dict(
            {"image": pictures, "problem": ["How many?"] * 4, **columns}
        )
        (tmp_path / role / "data").mkdir(parents=True)
        table.cast_column("image", datasets.Image()).to_parquet(
            tmp_path / role / "data/train-00000-of-00001.parquet"
        )
        images[role], (path, answer) = tmp_path / f"{role}-images", lists[role]
        (images[role] / path).parent.mkdir(parents=True)
        for index in range(2):
            picture(index).save(images[role] / path.format(index))
        items = [
            {"image_path": f"./{path.format(i)}", "question": "How many?", "ground_truth": answer}
            for i in (0, 1)
        ]
        write_lines(images[role] / TEST_SETS[scale.tasks[role].test["data"]], items)
        train = {**scale.tasks[role].train, "data": str(tmp_path / role), "steps": 2}
        tasks[role] = replace(scale.tasks[role], train=train, items=2)
    monkeypatch.setitem(
        scales.SCALES, "qwen2vl_2b", replace(scale, model=str(tiny_folder), tasks=tasks)
    )
    settings = {
        "optimizer": "adamw",
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_new_tokens": 6,
    }
    roots = [
        "--counting-images",
        str(images["counting"]),
        "--geometry-images",
        str(images["geometry"]),
    ]
    output = tmp_path / "out"
    main(
        [
            "--preset",
            "qwen2vl_2b",
            "--output",
            str(output),
            "--settings",
            json.dumps(settings),
            *roots,
        ]
    )
    cells = {str(path.parent.relative_to(output / "cells")) for path in output.rglob("cell.json")}
    assert cells == {
        "base/seed0",
        *(f"{name}/{role}/seed0" for name in ("sft-answer", "grpo") for role in rows),
        "sft-solution/counting/seed0",
    }
    for role, (path, answer) in lists.items():
        results = json.loads((output / f"cells/grpo/{role}/seed0/{role}-greedy.json").read_text())[
            "results"
        ]
        paths = [f"./{path.format(index)}" for index in range(2)]
        assert [result["question"]["image_path"] for result in results] == paths
        assert [result["ground_truth"] for result in results] == [answer] * 2
    record = json.loads((output / "cells/grpo/geometry/seed0/cell.json").read_text())
    by_strict, by_r1v = record["correct"], record["other_judges"]["r1v"]
    for role in rows:
        assert by_strict[role] == {"greedy": "00", "sampled": "00"}
        assert by_r1v[role] == {"greedy": "10", "sampled": "10"}
    report = (output / "report.md").read_text()
    assert "6 of 6 cells finished" in report and "missing" not in report
    line = next(line for line in report.splitlines() if line.startswith("| + SFT on answers"))
    strict, r1v, published = (cell.split()[0] for cell in line.split("|")[2:5])
    assert (strict, r1v, published) == ("0.0%", "50.0%", "68.50%")


@pytest.mark.parametrize("scale", ["tiny", "small"])
@pytest.mark.parametrize("role", ["counting", "geometry"])
def test_a_thousand_test_items_share_nothing_with_training(scale, role):
    task = find_preset(scale)[0].tasks[role]
    count = 1000 if scale == "tiny" else 300
    drawn = {
        split: load_examples(split=split, seed=0, **task.test).all(count)
        for split in ("train", "test")
    }
    assert task.items >= 1000
    # What is asked of a figure does not count: no figure is in both, whatever the question.
    parameters = {
        split: {e.key.removeprefix("area ").removeprefix("perimeter ") for e in drawn[split]}
        for split in drawn
    }
    images = {
        split: {hashlib.sha256(e.images[0].tobytes()).digest() for e in drawn[split]}
        for split in drawn
    }
    assert not parameters["train"] & parameters["test"] and not images["train"] & images["test"]
    assert len(images["test"]) == count and len({e.key for e in drawn["test"]}) > 0.97 * count


def test_a_start_on_two_tasks_is_made_once_and_depends_on_them(monkeypatch):
    monkeypatch.setitem(
        start_module.START, "tiny", replace(start_module.START["tiny"], steps=5, prompts_per_step=4)
    )
    seen = []
    original = start_module.solution_batches
    monkeypatch.setattr(
        start_module,
        "solution_batches",
        lambda p, examples, n: seen.append(examples) or original(p, examples, n),
    )
    tasks = [TaskConfig(task="counting", difficulty=2), TaskConfig(task="figures", difficulty=1)]
    folder = start_module.supervised_start("tiny", tasks, seed=0, enough=0.0)
    assert len(seen) == 5 and all(
        ["items" in e.problem for e in step] == [True, True, False, False] for step in seen
    )
    before = stamps(folder)
    assert (
        start_module.supervised_start("tiny", tasks, seed=0, enough=0.0) == folder
        and stamps(folder) == before
    )
    assert len(seen) == 5
    assert start_module.supervised_start("tiny", tasks[:1], seed=0, enough=0.0) != folder


def test_an_experiment_keeps_its_start_and_trains_on_items_that_are_new_to_it(
    monkeypatch, tmp_path
):
    monkeypatch.setitem(
        start_module.START, "tiny", replace(start_module.START["tiny"], steps=5, prompts_per_step=4)
    )
    monkeypatch.setenv("MR1_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(scales.SCALES, "tiny", replace(SCALES["tiny"], start_accuracy=1e-9))
    seen = []
    original = start_module.solution_batches
    monkeypatch.setattr(
        start_module,
        "solution_batches",
        lambda p, examples, n: seen.extend(examples) or original(p, examples, n),
    )
    experiment = make_experiment(ExperimentConfig(output=str(tmp_path / "out")))
    start = Path(experiment.base(0))
    before = stamps(start)
    assert start.is_relative_to(tmp_path / "out") and (start / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "cache")
    assert experiment.base(0) == str(start) and stamps(start) == before and len(seen) == 20
    # A damaged one is replaced by the same, and by no other.
    damaged = bytearray(whole := (start / "model.safetensors").read_bytes())
    damaged[-3] ^= 1
    (start / "model.safetensors").write_bytes(damaged)
    assert experiment.base(0) == str(start) and len(seen) == 40
    assert (start / "model.safetensors").read_bytes() == whole
    (start / CHECKSUMS).write_text(
        sealed({"files": checksums(start) | {"a": checksum(Path(__file__))}})
    )
    with pytest.raises(
        UserError, match=r"seed0 is damaged \(a is missing\), and these versions make"
    ):
        experiment.base(0)
    (start / CHECKSUMS).unlink()  # as experiments of earlier versions are
    assert experiment.base(0) == str(start) and len(seen) == 40
    images = {e.images[0].tobytes() for e in seen}
    for cell in experiment.cells()[1:]:
        config = experiment.settings(cell)
        trained = load_examples(
            config.task, config.data, "train", config.seed, config.difficulty
        ).take(0, 16)
        assert not images & {e.images[0].tobytes() for e in trained}
