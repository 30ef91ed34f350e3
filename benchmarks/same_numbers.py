"""Whether a change leaves every number of training as it is: the same runs in two checkouts.

    python benchmarks/same_numbers.py BEFORE AFTER [--runs default sft …] [--keep FOLDER]

BEFORE and AFTER are checkouts of this repository, each with its own `.venv`. Every run is made in
both, from supervised starts that are made anew, and its files are compared: metrics, completions,
evaluations, weights and checkpoints, bit for bit, in all but times and speeds. Takes about ten
minutes a checkout on two cores. The last line is one JSON document; the exit status is 1 where
files differ.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN, SMALL = "mr1_fast.train", ["--eval-samples", "60"]
OFF_POLICY = ["--updates-per-batch", "2", "--importance-cap", "2"]
FEW = ["--test-items", "40", "--settings", '{"steps": 6}']
RUNS = {
    "default": [[TRAIN]],
    "sft": [[TRAIN, "--algo", "sft", "--steps", "40", *SMALL]],
    "figures": [[TRAIN, "--task", "figures", "--steps", "20", *SMALL]],
    "lora": [[TRAIN, "--lora", "--steps", "20", *SMALL, *OFF_POLICY]],
    "resumed": [[TRAIN, "--steps", "20", "--save-every", "10", *SMALL], [TRAIN, "--resume"]],
    "experiment": [["mr1_fast.experiment", "--preset", "tiny", "--seeds", "[0]", *FEW]],
}
"""The commands of each run; its folder is added to each as --output, or as what to resume."""
TIMES = ("seconds", "tflops", "mfu", "date", "command", "output")
"""Beginnings of the names whose values may differ: times, speeds, and where a run is."""


def make(checkout: Path, name: str, folder: Path, cache: Path) -> None:
    """Make one run in a checkout; raises CalledProcessError where a command fails."""
    python, environment = checkout / ".venv/bin/python", {**os.environ, "MR1_FAST_CACHE": cache}
    for command in RUNS[name]:
        if command[-1] == "--resume":  # from the middle, as after a kill
            steps = (folder / "checkpoints").glob("step-*")
            shutil.rmtree(max(steps, key=lambda path: int(path.name.removeprefix("step-"))))
            shutil.rmtree(folder / "final")
            words = [*command, folder]
        else:
            words = [*command, "--output", folder]
        with (folder.parent / f"{name}.log").open("a") as log:
            subprocess.run(
                [python, "-m", *words], cwd=checkout, env=environment, stdout=log, stderr=log
            ).check_returncode()


def content(path: Path) -> object:
    """What a file holds, but for times."""
    if path.suffix == ".safetensors":
        return path.read_bytes()
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [without_times(json.loads(line)) for line in lines]


def without_times(value: object) -> object:
    """The same value without the entries whose names begin as one of TIMES."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith(TIMES)}
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return value


def differing(before: Path, after: Path) -> tuple[int, list[str]]:
    """The number of files that two folders of a run have, and those of other content."""
    kinds = {".json", ".jsonl", ".safetensors"}
    files = {p.relative_to(before) for p in before.rglob("*") if p.suffix in kinds}
    files |= {p.relative_to(after) for p in after.rglob("*") if p.suffix in kinds}
    found = []
    for file in sorted(files):
        one, other = before / file, after / file
        same = one.exists() and other.exists() and content(one) == content(other)
        if not same:
            found.append(str(file))
    return len(files), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", type=Path, help="folder for the runs; finished ones are kept")
    arguments = parser.parse_args()
    keep = arguments.keep or Path(tempfile.mkdtemp())
    results = {}
    for name in arguments.runs:
        for side in ("before", "after"):
            folder = (keep / side / name).resolve()
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists():
                make(getattr(arguments, side).resolve(), name, folder, folder.parent / "cache")
        count, different = differing(keep / "before" / name, keep / "after" / name)
        results[name] = {"files": count, "different": different}
        print(f"{name}: {count} files, {len(different)} differ {different}", flush=True)
    print(json.dumps({"benchmark": "same_numbers", "runs": results}))
    sys.exit(any(result["different"] for result in results.values()))


if __name__ == "__main__":
    main()
