"""Does it fit on its card? Two steps of training under a memory cap; each phase's peak, planned and
measured.

    python benchmarks/bench_memory.py 2b_full 7b_qlora [any flag of python -m mr1_fast.train]

The cases are recipes, each under the cap of its card, with random weights and images of 401,408
pixels, the most that `max_pixels` allows. Random weights hardly ever end an answer, so nearly every
completion has all its tokens. Flags apply to all cases. `tiny` and `tiny-qwen3vl` take the same
path with built-in models; on a CPU nothing is measured. The last line is one JSON document.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import measure
import torch
from PIL import Image
from random_models import use_token_ids

from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.model.families import auto_class, family_of
from mr1_fast.model.known import find_model_config
from mr1_fast.model.tiny import family_processor
from mr1_fast.plan.plan import make_plan, usable_bytes
from mr1_fast.train import train

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = ["--device", "cpu", "--prompts-per-step", "2", "--max-new-tokens", "8"]


class Case(NamedTuple):
    """A run that is measured."""

    flags: list[str]
    target: float | None = None
    """The most GiB that it should take."""
    vram: float = 24.0
    """Memory of the card to mimic, in GB."""
    image: tuple[int, int] = (896, 448)
    """Width and height of the images, in pixels."""


def recipe(name: str, target: float = 23.0, vram: float = 24.0) -> Case:
    """The run of a recipe on a card of so many GB."""
    return Case(["--config", f"{RECIPES}/{name}.yaml"], target, vram)


def small(name: str) -> Case:
    """A run of a built-in model, to try the script out."""
    return Case(["--model", name, *SMALL], image=(96, 96))


CASES = {
    "2b_full": recipe("qwen2vl_2b_counting_24gb"),
    "7b_qlora": recipe("qwen2vl_7b_lora_24gb"),
    "qwen3vl_2b_full": recipe("qwen3vl_2b_full_24gb"),
    "qwen3vl_4b_lora": recipe("qwen3vl_4b_lora_24gb"),
    "qwen3vl_8b_qlora": recipe("qwen3vl_8b_qlora_24gb"),
    "qwen2_5vl_3b_full": recipe("qwen2_5vl_3b_full_24gb"),
    "qwen2_5vl_7b_qlora": recipe("qwen2_5vl_7b_qlora_24gb"),
    "qwen3vl_2b_lora": recipe("qwen3vl_2b_lora_16gb", target=14.0, vram=14.6),
    "tiny": small("tiny"),
    "tiny-qwen3vl": small("tiny-qwen3vl"),
}


def make_model(name: str, folder: Path, device: str) -> None:
    """Save a model of `name`'s shape with random weights, and a built-in model's processor."""
    config = find_model_config(name)
    family = family_of(config)
    processor = family_processor(family)
    use_token_ids(config, processor, family)
    with torch.device(device):
        model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder, config.model_type)


def make_data(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write images of noise and a data file with R1-V's columns; return the file."""
    generator = torch.Generator().manual_seed(0)
    shape = size[1], size[0], 3
    problem = "How many different items are there in the image?"
    lines = []
    for index in range(count):
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        name = f"{index}.png"
        Image.fromarray(pixels.numpy()).save(folder / name)
        row = {"image": name, "problem": problem, "solution": "<answer> 3 </answer>"}
        lines.append(json.dumps(row))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def case_config(case: str, scratch: Path, flags: list[str]) -> TrainConfig:
    """Write a case's model and data into `scratch`; return the settings of two steps of it."""
    run = CASES[case]
    name = parse_train_config(run.flags).model
    make_model(name, scratch / "model", "cuda" if torch.cuda.is_available() else "cpu")
    measure.release()
    data = make_data(scratch, run.image, count=16)
    own = ["--model", str(scratch / "model"), "--data", str(data), "--image-root", str(scratch)]
    own += ["--output", str(scratch / "run"), "--steps", "2"]
    own += ["--eval-samples", "0", "--save-every", "0"]
    return parse_train_config([*run.flags, *own, *flags])


def add_case_arguments(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """Add the arguments that say which cases run, and on how much memory."""
    parser.add_argument("cases", nargs="*", choices=CASES, default=default)
    text = "memory of the card to mimic, GB; by default that of each case"
    parser.add_argument("--vram", type=float, help=text)


def limit_memory(vram: float) -> None:
    """Let the process use no more of a GPU, if there is one, than a card of `vram` GB has."""
    if not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, usable_bytes(vram) / whole))


def measure_case(case: str, vram: float, flags: list[str]) -> dict:
    """Train two steps, as a user would; return planned and measured GiB of each phase."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        config = case_config(case, scratch, flags)
        plan = make_plan(config, find_model_config(config.model), usable=usable_bytes(vram))
        metrics = scratch / "run" / "metrics.jsonl"
        try:
            train(config)
        finally:  # also what a run that failed or was stopped has written
            if metrics.exists():
                print(metrics.read_text(), flush=True)
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    # PyTorch's allocator counts tensors only: without CUDA's own workspace.
    planned = {
        name: (plan.total(name) - use.get("workspace", 0)) / 2**30
        for name, use in plan.phases.items()
    }
    measured = {}
    for phase in planned:
        peaks = [step[f"peak_gib_{phase}"] for step in steps if f"peak_gib_{phase}" in step]
        measured[phase] = max(peaks, default=None)
    seconds = {key: value for key, value in steps[-1].items() if key.startswith("seconds_")}
    return {
        "planned": planned,
        "measured": measured,
        "target": CASES[case].target,
        "cap": usable_bytes(vram) / 2**30,
        "completion_length": steps[-1]["completion_length"],
        **seconds,
    }


def main() -> None:
    parser = measure.make_parser(__doc__)
    add_case_arguments(parser, ["2b_full", "7b_qlora"])
    arguments, flags = parser.parse_known_args()
    # An exception, unlike the signal itself, lets measure_case print what the run has measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    device, results, failed = measure.pick_device("auto"), {}, {}
    for case in arguments.cases:
        vram = arguments.vram or CASES[case].vram
        limit_memory(vram)
        try:
            results[case] = measure_case(case, vram, flags)
        except UserError as error:  # out of memory, with advice
            failed[case] = str(error)
            print(f"{case}: {error}")
        measure.release()
    rows = [
        [case, phase, f"{planned:.2f}", None if peak is None else f"{peak:.2f}", result["target"]]
        for case, result in results.items()
        for (phase, planned), peak in zip(
            result["planned"].items(), result["measured"].values(), strict=True
        )
    ]
    measure.print_table("GiB of tensors", ["case", "phase", "planned", "measured", "target"], rows)
    measure.finish("memory", device, cases=results, failed=failed)


if __name__ == "__main__":
    main()
