"""A long run of a tiny model, watched from outside: what grows with its steps, and what must not.

    python benchmarks/soak.py [--minutes 10] [--steps 5000] [any flag of python -m mr1_fast.train]

The run ends after the steps or the minutes, whichever comes first. It has what a long run has: a
report, checkpoints, evaluations on the way, and answers that math-verify checks in a process of its
own. Every few seconds the script reads, from /proc and from the run's folder, memory, descriptors,
threads, child processes, and the sizes of files; now and then it writes the report itself, and
takes the seconds of CPU. Slopes are those of least squares over steps, without the first third.

Prints a table with a verdict on each bound; the last line is one JSON document, and the status is 1
if a bound is broken.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_memory import make_model
from measure import finish, make_parser, print_table

from mr1_fast.report.run_report import write_report

EVERY, REPORT_EVERY = 3.0, 30.0
"""Seconds between two samples, and between two reports of the script's own."""
WARM_UP = 1 / 3
"""The part of the samples that no slope is made of: caches fill, plots get their points."""
SMALL = dict(
    task="arithmetic",
    judge="r1v",
    device="cpu",
    prompts_per_step=2,
    num_generations=2,
    max_new_tokens=6,
    save_every=50,
    eval_every=100,
    eval_samples=8,
    recompute="none",
)
"""Settings under which a step takes a fraction of a second."""


class Bound(NamedTuple):
    """What is sampled, and how far it may grow."""

    what: str
    unit: str
    slope: float | None
    """The largest growth per 1,000 steps; None for what grows by design."""
    most: float | None = None
    """The largest value at any time."""


BOUNDS = {
    "memory": Bound("resident memory", "MiB", 4.0),
    "descriptors": Bound("open descriptors", "", 0.5),
    "threads": Bound("threads", "", 0.5),
    "children": Bound("child processes", "", 0.5, 6),
    "zombies": Bound("dead children that wait for the run", "", 0.5, 3),
    "checkpoints": Bound("folders in checkpoints/", "", 0.5, 4),
    "report": Bound("report.html", "kB", 5.0, 1000),
    "completions_page": Bound("completions.html", "kB", None, 12_000),
    "metrics": Bound("metrics.jsonl", "kB", None),
    "completions": Bound("completions.jsonl", "kB", None),
    "report_seconds": Bound("writing the report", "s of CPU", 0.3),
    "step_seconds": Bound("a step, with its share of all else", "s of CPU", 0.02),
}
"""Reading metrics.jsonl takes longer with each step; its plots have no more points."""


def sample(process: int, run: Path) -> dict[str, float]:
    """Read what a process and its run's folder hold now."""
    proc = Path("/proc") / str(process)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    states = [state for _, state in children(process)]
    ticks = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))
    size = {
        "report": "report.html",
        "completions_page": "completions.html",
        "metrics": "metrics.jsonl",
        "completions": "completions.jsonl",
    }
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "children": len(states),
        "zombies": states.count("Z"),
        "checkpoints": sum(1 for _ in (run / "checkpoints").glob("*")),
        "cpu": ticks / os.sysconf("SC_CLK_TCK"),
        **{
            name: (run / file).stat().st_size / 1000
            for name, file in size.items()
            if (run / file).exists()
        },
    }


def children(parent: int) -> list[tuple[int, str]]:
    """The processes whose parent is `parent`, each with its state; Z is a dead one."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                state, its_parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has ended
            if int(its_parent) == parent:
                found.append((int(path.name), state))
    return found


def steps_done(run: Path) -> int:
    """The step of the last whole line in the log, plus 1."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def watch(process: subprocess.Popen, run: Path) -> list[dict[str, float]]:
    """Sample a run until it ends; each sample has the steps that were done by then."""
    samples, next_report = [], time.monotonic() + REPORT_EVERY
    while process.poll() is None:
        time.sleep(EVERY)
        steps = steps_done(run)
        if not steps:
            continue
        try:
            found = {"steps": steps, **sample(process.pid, run)}
        except (OSError, KeyError):  # it has just ended
            break
        if time.monotonic() > next_report:
            started = time.process_time()
            write_report(run, live=True)
            found["report_seconds"] = time.process_time() - started
            next_report = time.monotonic() + REPORT_EVERY
        if samples and steps > samples[-1]["steps"]:
            spent = found["cpu"] - samples[-1]["cpu"]
            found["step_seconds"] = spent / (steps - samples[-1]["steps"])
        samples.append(found)
    return samples[:-1]  # the last one may be of a process that ends


def slope(samples: list[dict[str, float]], name: str) -> tuple[float, float, float] | None:
    """Growth per 1,000 steps by least squares after the warm-up, the last value and the largest."""
    known = [(each["steps"], each[name]) for each in samples if name in each]
    late = known[int(len(known) * WARM_UP) :]
    if len(late) < 3 or late[0][0] == late[-1][0]:
        return None
    steps, values = np.array(late, dtype=float).T
    growth = np.polyfit(steps, values, 1)[0]
    return 1000 * float(growth), float(values[-1]), max(value for _, value in known)


def judge(samples: list[dict[str, float]]) -> dict[str, dict]:
    """Compare the slope and the largest value of each thing with its bound."""
    found = {}
    for name, bound in BOUNDS.items():
        if (figures := slope(samples, name)) is None:
            found[name] = {"holds": False, "why": "too few samples"}
            continue
        growth, last, most = figures
        holds = (bound.slope is None or growth <= bound.slope) and (
            bound.most is None or most <= bound.most
        )
        found[name] = {"per_1000_steps": growth, "last": last, "most": most, "holds": holds}
    return found


def show(found: dict[str, dict], steps: int, minutes: float) -> None:
    """Print the table of slopes and verdicts."""
    rows = []
    for name, figures in found.items():
        what, unit, growth, most = BOUNDS[name]
        if "why" in figures:
            rows.append([what, unit, None, None, None, None, figures["why"]])
            continue
        numbers = [f"{figures[key]:,.3f}" for key in ("per_1000_steps", "last", "most")]
        limits = [f"≤ {growth:g} per 1,000"] if growth is not None else []
        limits += [f"≤ {most:g}"] if most is not None else []
        verdict = "holds" if figures["holds"] else "BROKEN"
        rows.append([what, unit, *numbers, ", ".join(limits) or "by design", verdict])
    columns = ["what", "unit", "growth per 1,000 steps", "last", "largest", "bound", "verdict"]
    print_table(f"{steps:,} steps in {minutes:.1f} minutes", columns, rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=5000)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        run, model = Path(scratch) / "run", Path(scratch) / "model"
        if not any(flag.startswith("--model") for flag in flags):
            make_model("tiny-text", model, "cpu")
            flags = [f"--model={model}", *flags]
        given = SMALL | {"steps": arguments.steps, "max_hours": arguments.minutes / 60}
        command = [sys.executable, "-m", "mr1_fast.train", f"--output={run}"]
        command += [f"--{name}={value}" for name, value in given.items()]
        started = time.monotonic()
        with (Path(scratch) / "log").open("w+") as log:
            process = subprocess.Popen([*command, *flags], stdout=log, stderr=subprocess.STDOUT)
            samples = watch(process, run)
            if process.wait():
                log.seek(0)
                sys.exit(
                    f"the run has failed, with status {process.returncode}:\n{log.read()[-3000:]}"
                )
        minutes, steps = (time.monotonic() - started) / 60, steps_done(run)
    found = judge(samples)
    show(found, steps, minutes)
    statistic = f"least squares over samples each {EVERY:g} s"
    finish("soak", "cpu", statistic, steps=steps, minutes=minutes, figures=found, samples=samples)
    sys.exit(int(not all(figures["holds"] for figures in found.values())))


if __name__ == "__main__":
    main()
