"""Where a training step spends its time: a table of kernels, with their share of the device's time.

    python benchmarks/profile_step.py 2b_full [any flag of python -m mr1_fast.train]

The cases are those of bench_memory.py, under the same memory cap. The second step of two is
profiled, rollout included, and kernels are added up by name; `idle` is the time of the step in
which the device ran none. On a CPU, operators stand in for kernels. The last line is one JSON
document.
"""

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import measure
import torch
from bench_memory import CASES, add_case_arguments, case_config, limit_memory
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mr1_fast.train import train

KINDS = {
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|wgmma|aten::(add)?mm_?$|aten::bmm",
    "attention": r"flash|fmha|attention|attend",
    "fused layers": r"norm_kernel|norm_backward|rotary|silu_mul|quick_gelu|mr1_fast::",
    "loss": r"grpo|logprobs",
    "optimizer": r"adamw|stochastic",
    "copies": r"memcpy|memset|copy|CatArray",
    "reductions": r"reduce|sum",
    "gathers": r"index|embedding|gather|scatter",
    "element-wise": r"elementwise|vectorized",
}
"""What a kernel's name has in it, by kind; the first match counts."""
MOST_KERNELS = 40
"""Kernels that the table names."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def profile_case(case: str, flags: list[str]) -> dict:
    """Train two steps and profile the second; return its seconds, and those of each kernel."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)

    def watch(policy, steps_done: int) -> None:
        if steps_done == 1:
            profiler.start()
        elif steps_done == 2:
            profiler.stop()

    with tempfile.TemporaryDirectory() as scratch:
        folder = train(case_config(case, Path(scratch), flags), watch)
        step = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

    wanted = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        own = event.self_device_time_total if wanted == DeviceType.CUDA else 0
        own = own or event.self_cpu_time_total
        if event.device_type == wanted and own:
            seconds[event.name] += own / 1e6
            launches[event.name] += 1
    rows = [
        {"kernel": name, "kind": kind_of(name), "launches": launches[name], "seconds": taken}
        for name, taken in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    stages = {name: taken for name, taken in step.items() if name.startswith("seconds_")}
    return {"stages": stages, "kernels": rows, "step": sum(stages.values())}


def print_profile(case: str, result: dict) -> None:
    """Print the shares of kinds, and those of the largest kernels."""
    whole, kernels = result["step"], result["kernels"]
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for row in kernels:
        kinds[row["kind"]][0] += row["launches"]
        kinds[row["kind"]][1] += row["seconds"]
    kinds["idle"] = [0, max(0.0, whole - sum(row["seconds"] for row in kernels))]
    stages = ", ".join(f"{name[8:]} {taken:.2f} s" for name, taken in result["stages"].items())
    table = [
        [kind, count or None, f"{taken:.3f}", f"{taken / whole:.1%}"]
        for kind, (count, taken) in sorted(kinds.items(), key=lambda item: -item[1][1])
    ]
    measure.print_table(f"{case}: {stages}", ["kind", "launches", "s", "of the step"], table)
    table = [
        [
            row["kernel"][:80].replace("|", "/"),
            row["kind"],
            row["launches"],
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / whole:.1%}",
        ]
        for row in kernels[:MOST_KERNELS]
    ]
    measure.print_table(case, ["kernel", "kind", "launches", "s", "of the step"], table)


def main() -> None:
    parser = measure.make_parser(__doc__)
    add_case_arguments(parser, ["2b_full"])
    arguments, flags = parser.parse_known_args()
    device, results = measure.pick_device("auto"), {}
    for case in arguments.cases:
        limit_memory(arguments.vram or CASES[case].vram)
        results[case] = profile_case(case, flags)
        print_profile(case, results[case])
        results[case]["kernels"] = results[case]["kernels"][:MOST_KERNELS]
        measure.release()
    measure.finish("profile_step", device, cases=results)


if __name__ == "__main__":
    main()
