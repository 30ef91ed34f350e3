"""Synthetic folders of experiments, as `python -m mr1_fast.experiment` writes them."""

import json
import math

import numpy as np
from PIL import Image

TASKS = {
    "counting": {"about": "how many shapes stand in a 4×4 grid", "items": 200, "split": "test"},
    "geometry": {"about": "area or perimeter of a figure", "items": 200, "split": "test"},
}
METHODS = {"base": "base model", "sft": "SFT", "grpo": "GRPO", "grpo-d": "GRPO-D"}
CHANCES = {
    "base": {"counting": (0.25, 0.2)},
    "sft": {"counting": (0.55, 0.1), "geometry": (0.1, 0.45)},
    "grpo": {"counting": (0.5, 0.22), "geometry": (0.27, 0.4)},
    "grpo-d": {"counting": (0.58, 0.25), "geometry": (0.3, 0.46)},
}
"""Variant → task trained → chances of a right answer in counting and in geometry."""


def describe(folder, **changed):
    about = {
        "preset": "tiny",
        "command": "python -m mr1_fast.experiment --preset tiny",
        "date": "2026-11-23",
        "hardware": "2 × Intel Xeon",
        "versions": {"mr1_fast": "0.1.0", "torch": "2.13.0+cpu"},
        "model": "tiny",
        "paper": "2B",
        "tasks": TASKS,
        "axis": {"name": "method", "label": "Method", "numeric": False},
        "variants": [{"name": name, "label": label} for name, label in METHODS.items()],
        "trained": ["counting", "geometry"],
        "seeds": [0, 1, 2],
        "settings": {"steps": 100, "learning_rate": 2e-4},
        "notes": [
            "The base model is tiny after a supervised start.",
            "Test items are the same for every cell.",
        ],
        **changed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(about))
    return about


def bits(chance, seed, count=200):
    """Answers as 0 and 1: right where the difficulty of an item is below `chance`.

    The difficulties are the same for all models, but a tenth of the answers is luck of the seed.
    """
    difficulty = np.random.default_rng(7).random(count)
    luck = np.random.default_rng(seed)
    values = np.where(luck.random(count) < 0.1, luck.random(count), difficulty)
    return "".join("1" if value < chance else "0" for value in values)


def cell_folder(folder, variant, trained, seed):
    return folder.joinpath("cells", variant, *filter(None, [trained]), f"seed{seed}")


def write_cell(folder, variant, trained, seed, correct=None, chances=None, **changed):
    """A finished cell; `correct` is role → mode → bits, drawn where it is not given."""
    place = cell_folder(folder, variant, trained, seed)
    place.mkdir(parents=True, exist_ok=True)
    if correct is None:
        counting, geometry = chances or CHANCES[variant][trained or "counting"]
        number = 1000 * seed + 10 * sum(map(ord, variant + (trained or ""))) % 997
        correct = {
            "counting": {
                "greedy": bits(counting, number),
                "sampled": bits(counting - 0.05, number + 1),
            },
            "geometry": {
                "greedy": bits(geometry, number + 2),
                "sampled": bits(geometry - 0.05, number + 3),
            },
        }
    record = {
        "variant": variant,
        "trained": trained,
        "seed": seed,
        "seconds": {"train": 31.2, "evaluate": 9.8},
    }
    record |= {"steps": 100, "peak_memory": 3 * 2**28, "correct": correct}
    (place / "cell.json").write_text(json.dumps(record | changed))
    return place


def write_curves(folder, variant, trained, seed, steps=100):
    place = cell_folder(folder, variant, trained, seed)
    (place / "run").mkdir(parents=True, exist_ok=True)
    start, end = CHANCES["base"]["counting"], CHANCES.get(variant, CHANCES["grpo"])[trained]
    shares = [
        [a + (b - a) * (1 - math.exp(-step / 30)) for a, b in zip(start, end, strict=True)]
        for step in range(steps)
    ]
    noise = np.random.default_rng(seed).normal(0, 0.02, size=(steps, 2))
    curve = [(step, *(shares[step] + noise[step]).tolist()) for step in range(0, steps, 20)]
    lines = [
        {"step": step, "counting": counting, "geometry": geometry}
        for step, counting, geometry in curve
    ]
    (place / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = []
    for step in range(steps):
        own = float(shares[step][trained == "geometry"] + noise[step][0])
        metrics.append({"step": step, "loss": 0.1})
        if variant != "sft":
            beta = (
                0.07 - 0.001 * step
                if variant == "grpo-d" and step < 30
                else 0.04 + 0.0006 * max(0, step - 30)
            )
            kl = 0.002 * step + abs(noise[step][1])
            metrics[-1] |= {"reward": own + 0.9, "accuracy": own, "kl": kl, "completion_length": 12}
            metrics[-1]["beta"] = beta if variant == "grpo-d" else 0.04
    (place / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in metrics)
    )


def write_samples(folder, variant, trained, seed, **changed):
    place = cell_folder(folder, variant, trained, seed)
    samples = []
    for index in range(4):
        task = ("counting", "geometry")[index // 2]
        if variant == "base":
            (place / "images").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (84, 56), (200, 60 * index, 90)).save(
                place / "images" / f"{task}-{index}.png"
            )
        right = variant == "grpo-d" or index == 0
        output = f"<think>{3 + index} shapes</think><answer> {3 + index if right else 0} </answer>"
        sample = {
            "task": task,
            "problem": f"How many are there in {index}?",
            "solution": str(3 + index),
        }
        samples.append(
            {**sample, "text": output, "correct": right, "image": f"{task}-{index}.png", **changed}
        )
    place.mkdir(parents=True, exist_ok=True)
    (place / "samples.json").write_text(json.dumps(samples))


def write_experiment(folder, **changed):
    """All cells of an experiment, with curves and samples; returns the folder."""
    about = describe(folder, **changed)
    for seed in about["seeds"]:
        write_cell(folder, "base", None, seed)
        write_samples(folder, "base", None, seed)
        for trained in about["trained"]:
            for variant in about["variants"][1:]:
                name = variant["name"]
                chances = None if name in CHANCES else (0.27, 0.35 + 0.1 * variant.get("value", 0))
                write_cell(folder, name, trained, seed, chances=chances)
                write_curves(folder, name, trained, seed)
                write_samples(folder, name, trained, seed)
    return folder
