"""Find the fastest launch settings of our kernels on this GPU, and write them to the table.

    python benchmarks/sweep.py grpo [grpo_cuda logprobs adamw linear decode_attend decode_linears …]
    [--seconds 120] [--table PATH]

First every setting of a kernel's list is compared with fp64; a wrong one is left out and named, and
the exit status is then 1. The others are timed in turn, for at most --seconds, and the fastest in
the mean of all sizes and modes is written to mr1_fast/kernels/tuned.json, which the launchers read,
if it beats the default by more than noise. If it does not, the architecture has no entry, and the
default stands. Nothing is written on a CPU, where kernels run in Triton's interpreter.

Decode's linear layers have an entry for each number of rows, and the name of a family, such as
decode_swiglu_four_bit, stands for all of its entries. With --check only the comparison is made, on
fresh data again and again (of the loss 200 times): an error that comes and goes is a race. With
--compile every setting is launched on few rows, so that Triton's cache on the disk has it. Prints
Markdown tables, and a JSON document for each kernel, one for all of decode's, and one for all with
--check.
"""

import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from device_time import Stopwatch
from measure import finish, make_parser, pick_device, print_table, release, summary
from sources import TABLE
from sweep_checks import DEFAULT, Size, Variant, check, label, setting, show_checked

from mr1_fast.files import write_json
from mr1_fast.kernels import tuned

LEAST_GAIN = 0.02
"""Share of the default's time that a setting must save to be written: less may be noise."""
MOST_ROUNDS = 30
"""Rounds after which medians no longer change."""
CHECKS_BEFORE_SWEEP = 3

# --- time -----------------------------------------------------------------------------------------


def time_variants(kernel, variants: list[Variant], dtype, device: str, seconds: float) -> dict:
    """Time the variants in turn on all sizes and in all modes: variant → case → `summary`."""
    sizes = kernel.sizes()
    times: dict[str, dict[str, dict]] = {label(variant): {} for variant in variants}
    for size in sizes:
        inputs = kernel.inputs(size, dtype, device, 0)
        launches = {mode: kernel.prepare(inputs, mode) for mode in kernel.modes}
        cases = [(mode, variant) for mode in kernel.modes for variant in variants]
        watches = {case: Stopwatch(device) for case in cases}
        taken = {case: [] for case in cases}
        stop = time.monotonic() + seconds / len(sizes)
        for turn in range(MOST_ROUNDS + 1):
            for mode, variant in cases:
                launch = launches[mode]
                once = watches[mode, variant](
                    launch.restore, partial(launch.call, setting(variant))
                )
                if turn:  # the first one is a warm-up
                    taken[mode, variant].append(once)
            if turn and time.monotonic() > stop:
                break
        for (mode, variant), each in taken.items():
            times[label(variant)][f"{mode}, {size}"] = summary(each)
        inputs = launches = launch = None
        release()
    return times


def relative_times(times: dict[str, dict[str, dict]]) -> dict[str, float]:
    """Geometric mean over all cases of a variant's median / the default's."""
    default = times[DEFAULT]
    return {
        name: math.exp(
            statistics.fmean(
                math.log(cases[case]["median"] / default[case]["median"]) for case in default
            )
        )
        for name, cases in times.items()
    }


def winner(ratios: dict[str, float], variants: list[Variant]) -> tuple | None:
    """The fastest setting, if it saves more than LEAST_GAIN of the default's time."""
    settings = [each for each in variants if not isinstance(each, str)]
    best = min(settings, key=lambda each: ratios[label(each)], default=None)
    return best if best is not None and ratios[label(best)] < 1 - LEAST_GAIN else None


def write_entry(table: Path, architecture: str, kernel: str, best: tuple | None) -> None:
    """Set the kernel's entry on the architecture, or remove it; others stay as they are."""
    entries = json.loads(table.read_text()) if table.exists() else {}
    of_architecture = entries.setdefault(architecture, {})
    of_architecture.pop(kernel, None)
    if best is not None:
        of_architecture[kernel] = best._asdict()
    kept = {name: each for name, each in sorted(entries.items()) if each}
    write_json(table, kept, "choose another with --table")


def sweep(kernel, arguments) -> dict:
    """Check and time a kernel's settings, and write the winner; return what was found."""
    device, dtype = arguments.device, arguments.dtype
    checks = min(CHECKS_BEFORE_SWEEP, arguments.repeats or CHECKS_BEFORE_SWEEP)
    checked = check(kernel, kernel.checked_sizes(), checks, dtype, device)
    show_checked(kernel.name, checked)
    results = {"wrong": checked.wrong, "too_large": checked.too_large}
    if DEFAULT in checked.right:
        times = time_variants(kernel, checked.right, dtype, device, arguments.seconds)
        ratios = relative_times(times)
        best = winner(ratios, checked.right)
        table = [
            [name, *(f"{case['median'] * 1e3:,.3f}" for case in cases.values()), f"{ratio:.3f}"]
            for (name, cases), ratio in zip(times.items(), ratios.values(), strict=True)
        ]
        table.sort(key=lambda row: row[-1])
        title = f"{kernel.name}: ms, best first; {dtype} on {device}"
        print_table(title, ["setting", *times[DEFAULT], "time / default's"], table)
        architecture = tuned.architecture(torch.device(device))
        found = "the default stands" if best is None else label(best)
        if architecture is not None:
            write_entry(arguments.table, architecture, kernel.name, best)
            print(f"\n{kernel.name} on {architecture}, in {arguments.table.name}: {found}")
        results |= {"architecture": architecture, "best": best and best._asdict()}
        results |= {"times": times, "of_default": ratios}
    release()
    return results


def sweep_all(kernels: list, arguments) -> bool:
    """Sweep kernels, print a document for each benchmark; return whether all were right."""
    right = True
    for benchmark, group in itertools.groupby(kernels, key=lambda kernel: kernel.benchmark):
        found = {kernel.name: sweep(kernel, arguments) for kernel in group}
        right &= not any(results["wrong"] for results in found.values())
        alone = list(found) == [benchmark.removeprefix("sweep_")]
        results = next(iter(found.values())) if alone else {"kernels": found}
        finish(benchmark, arguments.device, **results)
    return right


# --- runs -----------------------------------------------------------------------------------------


def all_kernels() -> dict:
    """Name in the table of launch settings → how to try the kernel."""
    # Imported when the interpreter is chosen.
    from sweep_decode import decode_kernels
    from sweep_kernels import AdamW, Logprobs, Loss, NativeLoss
    from sweep_linear import Linear

    kernels = Loss(), NativeLoss(), Logprobs(), AdamW(), Linear(), *decode_kernels()
    return {kernel.name: kernel for kernel in kernels}


def compile_all(kernels: list, dtype: torch.dtype, device: str) -> None:
    """Launch every variant of the kernels on few rows, in threads: Triton lets others run."""

    def launch_once(kernel, size: Size, mode: str, variant: Variant) -> None:
        inputs = kernel.inputs(size, dtype, device, 0)
        launch = kernel.prepare(inputs, mode)
        launch.restore()
        with contextlib.suppress(Exception):  # a check reports it
            launch.call(setting(variant))

    work = {}
    for kernel in filter(lambda kernel: kernel.compiles_alone, kernels):
        for size in kernel.checked_sizes():
            size = size._replace(rows=kernel.rows_to_compile or size.rows)
            for mode, variant in itertools.product(kernel.modes, kernel.variants()):
                # A family's kernels are the same for all numbers of rows.
                compiled = kernel.family, size[1:], mode, variant
                work.setdefault(compiled, (kernel, size, mode, variant))
    # The interpreter is no compiler, and not made for threads.
    with ThreadPoolExecutor(1 if device == "cpu" else os.cpu_count()) as pool:
        list(pool.map(lambda each: launch_once(*each), work.values()))
    print(f"compiled {len(work)} launches")


def check_all(kernels: list, arguments) -> bool:
    """Check every kernel, print one document; return whether all variants were right."""
    results = {}
    for kernel in kernels:
        repeats = arguments.repeats or kernel.repeats
        how = repeats, arguments.dtype, arguments.device, arguments.seconds
        checked = check(kernel, kernel.checked_sizes(), *how)
        show_checked(f"{kernel.name}, {checked.rounds} times", checked)
        results[kernel.name] = {**checked._asdict(), "right": [*map(label, checked.right)]}
        release()
    finish("check", arguments.device, statistic="largest error / bound", kernels=results)
    return not any(result["wrong"] for result in results.values())


class Tiny:
    """A kernel with sizes that Triton's interpreter gets through."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def sizes(self) -> list[Size]:
        return [self.kernel.tiny]

    def checked_sizes(self) -> list[Size]:
        return self.sizes()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("kernels", nargs="*", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=120, help="of timing, or of --check, for a kernel"
    )
    parser.add_argument("--repeats", type=int, help="checks on fresh data; the kernel's own number")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the winner is written")
    parser.add_argument("--check", action="store_true", help="compare with fp64, again and again")
    parser.add_argument("--compile", action="store_true", help="fill Triton's cache on the disk")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script out")
    arguments = parser.parse_args()
    device = arguments.device = pick_device(arguments.device)
    arguments.dtype = getattr(torch, arguments.dtype)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    known = all_kernels()
    families = list(dict.fromkeys(kernel.family for kernel in known.values()))
    unknown = set(arguments.kernels) - {*known, *families}
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: expected kernels among {', '.join(families)}")
    chosen = set(arguments.kernels) or {*families}
    kernels = [kernel for kernel in known.values() if chosen & {kernel.name, kernel.family}]
    for kernel in list(kernels):
        if reason := kernel.missing(device):
            print(f"skipped: {kernel.name}: {reason}")
            kernels.remove(kernel)
    if arguments.quick:
        kernels = [Tiny(kernel) for kernel in kernels]
    # An empty table: the default is the choice by arithmetic, whatever was found before.
    with mock.patch.object(tuned, "read_table", dict):
        if arguments.compile:
            compile_all(kernels, arguments.dtype, device)
            return
        right = (check_all if arguments.check else sweep_all)(kernels, arguments)
    sys.exit(not right)


if __name__ == "__main__":
    main()
