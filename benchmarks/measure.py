"""Shared by the benchmarks: alternating timings, peak memory, limits of the machine, tables.

What is measured is a `Case`: a function of the batch builds it, and a dict of such functions names
it. If a case of another library is missing or fails, one line says so and the run goes on; the name
of a case of ours begins with "ours", and its failure ends the run.

A figure is a median of calls that alternate with those of all other cases, and so is the limit that
it is divided by: a copy, or a read where an operation writes next to nothing.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from device_time import Seconds, Stopwatch, read
from sources import digest
from torch import Tensor

from mr1_fast.kernels.tuned import architecture

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
"""Packages whose versions the JSON document holds."""
STATISTIC = "median of alternating calls"
"""What a time in a document is, unless the benchmark says otherwise."""
SLOW = 60.0
"""Seconds: a call that took longer is not timed again."""
SAMPLE = 64
"""Rows of the gradient that are compared with ours."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `description`, a script's docstring, as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


class Case(NamedTuple):
    """Something to measure."""

    call: Callable[[], tuple[Tensor, list[Tensor]]]
    """Returns the loss (or another output) and the gradients, the first with a row per token."""
    restore: Callable[[], object] = lambda: None
    """Restores what `call` overwrites; it is not timed."""


Builders = dict[str, Callable[..., Case]]


def differentiated(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, frozen: bool
) -> Case:
    """A case of `loss(hidden, weight)` and its gradients, without that of a frozen weight."""

    def call():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        value = loss(h, w)
        return value, list(torch.autograd.grad(value, [h] if frozen else [h, w]))

    return Case(call)


@contextlib.contextmanager
def excused(name: str, skipped: dict[str, str]):
    """Note in `skipped` why the case fails and print one line; raise if the case is ours."""
    try:
        yield
    except Exception as error:
        if name.startswith("ours"):
            raise
        message = (str(error) or "no message").splitlines()[0][:160]
        skipped[name] = f"{type(error).__name__}: {message}"
        print(f"skipped: {name}: {skipped[name]}")


# --- timing ---------------------------------------------------------------------------------------


def warm_up(
    builders: Builders, batch, device: str, against: str | None = None
) -> tuple[dict, dict, dict]:
    """Build and call every case once.

    Return three dicts by name: the cases that work; the relative difference of each one's loss and
    gradient from those of `against`; and why the other cases do not work.
    """
    cases, first, skipped = {}, {}, {}
    for name, build in builders.items():
        with excused(name, skipped):
            case = build(batch)
            case.restore()
            loss, gradients = case.call()
            if device != "cpu":
                torch.cuda.synchronize()
            gradient = gradients[0].detach() if gradients else loss
            rows = gradient[0] if gradient.ndim == 3 else gradient
            first[name] = {"loss": loss.detach().double(), "gradient": rows[:SAMPLE].double()}
            cases[name] = case
        loss = gradients = gradient = rows = case = None
        release()
    if against is None:
        return cases, {}, skipped
    off = {
        name: {key: _distance(value, first[against][key]) for key, value in first[name].items()}
        for name in cases
    }
    return cases, off, skipped


def time_alternating(
    cases: dict[str, Case], rounds: int, device: str, skipped: dict[str, str]
) -> dict[str, dict]:
    """Seconds of each case, as `summary` has them; all are called in turn, `rounds` times.

    A case that fails is left out and noted in `skipped`.
    """
    taken = {name: [] for name in cases}
    stopwatches = {name: Stopwatch(device) for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            if name not in skipped and (not taken[name] or taken[name][0].device < SLOW):
                with excused(name, skipped):
                    taken[name].append(stopwatches[name](case.restore, case.call))
    return {name: summary(times) for name, times in taken.items() if name not in skipped}


def summary(taken: list[Seconds]) -> dict:
    """Median and least seconds, the host's median, and the number of calls.

    `exposed` counts the calls in which the GPU may have waited for the host.
    """
    device = [each.device for each in taken]
    host = [each.host for each in taken if each.host is not None]
    return {
        "median": statistics.median(device),
        "least": min(device),
        "host": statistics.median(host) if host else None,
        "calls": len(taken),
        "exposed": sum(not each.hidden for each in taken),
    }


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative difference of `a` from `b`."""
    return ((a - b).norm() / b.norm()).item()


# --- limits ---------------------------------------------------------------------------------------


def copy_case(source: Tensor) -> Case:
    """A case that copies `source`: one read and one write of its bytes."""
    target = torch.empty_like(source)
    return Case(lambda: (target.copy_(source)[0, 0], []))


def read_case(source: Tensor) -> Case:
    """A case that reads `source`, whose bytes are a multiple of 4: one read of them, no write."""
    return Case(lambda: (read(source), []))


def gemm_case(hidden: Tensor, weight: Tensor) -> Case:
    """A case of the three matrix products that every implementation needs: 6·N·D·V FLOP.

    `hidden` (N, D), `weight` (V, D); the results go into existing tensors.
    """
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def call():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)
        return dhidden[0, 0], []

    return Case(call)


# --- memory ---------------------------------------------------------------------------------------


def release() -> None:
    """Return free memory to the system, so that it does not hide what a call allocates."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak(case: Case, device: str) -> dict[str, int]:
    """Peak bytes of one call beyond those in use before it, and bytes of the gradients it returns.

    On a GPU PyTorch's allocator counts them. On a CPU it is the process' resident memory, whose
    high-water mark (VmHWM) is reset by writing 5 to /proc/self/clear_refs: measure it in a process
    that has done nothing else (`peak_in_subprocess`).
    """
    case.restore()
    release()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        _, gradients = case.call()
        top = _resident("VmHWM")
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, gradients = case.call()
        torch.cuda.synchronize()
        top = torch.cuda.max_memory_allocated()
    return {"peak": top - before, "gradients": sum(g.numel() * g.element_size() for g in gradients)}


def peak_in_subprocess(script: str, name: str, arguments: Iterable) -> dict[str, int]:
    """Run `script --peak name …` and return the JSON of its last line. RuntimeError if it fails."""
    command = [sys.executable, script, "--peak", name, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1])
    return json.loads(run.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status).group(1))


# --- output ---------------------------------------------------------------------------------------


def pick_device(name: str) -> str:
    """The device that --device names; "auto" is cuda if there is a GPU, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict:
    """Name of the device, number of threads, and versions of CUDA and of PACKAGES."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = cpu.group(1) if cpu else platform.processor()
    threads = torch.get_num_threads()
    return {"device": name, "threads": threads, "cuda": torch.version.cuda, **versions}


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table in Markdown; a cell of None becomes a dash."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |")


def megabytes(value: float | None) -> str | None:
    """Bytes as a number of MiB."""
    return None if value is None else f"{value / 2**20:,.0f}"


def microseconds(seconds: float | None) -> str | None:
    """Seconds as a number of microseconds."""
    return None if seconds is None else f"{seconds * 1e6:,.0f}"


def finish(benchmark: str, device: str, statistic: str = STATISTIC, **results) -> None:
    """Print the last line of a benchmark: settings, machine and results as one JSON document.

    `sources` is the digest of the files that the results depend on, and of launch settings in use.
    """
    document = {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "sources": digest(benchmark, architecture(torch.device(device))),
        "statistic": statistic,
        **results,
    }
    print("\n" + json.dumps(document))
