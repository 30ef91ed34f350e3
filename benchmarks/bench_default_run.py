"""The default run over several seeds: accuracy before and after, and seconds of each stage.

    python benchmarks/bench_default_run.py --seeds 0 1 2 [any flag of python -m mr1_fast.train]

With --quick the weights are random, to try the script out.
Prints a Markdown table; the last line is one JSON document.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from bench_memory import make_model
from measure import finish, make_parser, pick_device

from mr1_fast.command_line import parse_train_config
from mr1_fast.train import train

STAGES = ("rollout", "reward", "reference", "update")


def measure(seed: int, flags: list[str]) -> dict:
    """Train with the default settings and `flags`; return accuracies and seconds of each stage."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        output = str(Path(scratch) / "run")
        folder = train(parse_train_config([*flags, "--seed", str(seed), "--output", output]))
        seconds = time.perf_counter() - started
        evaluation = json.loads((folder / "evaluation.json").read_text())
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = {
        mode: [evaluation[when][mode]["accuracy"] for when in ("before", "after")]
        for mode in ("sampled", "greedy")
    }
    medians = {}
    for stage in STAGES:
        values = [step[f"seconds_{stage}"] for step in steps if f"seconds_{stage}" in step]
        medians[stage] = statistics.median(values) if values else 0.0
    return {
        "seed": seed,
        "items": evaluation["after"]["greedy"]["count"],
        **accuracy,
        "seconds": seconds,
        **medians,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="no supervised start")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            make_model("tiny", Path(scratch), "cpu")
            flags += ["--model", scratch]
        runs = [measure(seed, flags) for seed in arguments.seeds]
    print("\n| seed | sampled | greedy | whole run | rollout | reward | reference | update |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        cells = [f"{run[mode][0]:.1%} → {run[mode][1]:.1%}" for mode in ("sampled", "greedy")]
        cells += [f"{run['seconds']:.0f} s", *(f"{run[stage] * 1000:.0f} ms" for stage in STAGES)]
        print(f"| {run['seed']} | {' | '.join(cells)} |")
    finish("default_run", pick_device("auto"), "one run a seed", flags=flags, runs=runs)


if __name__ == "__main__":
    main()
