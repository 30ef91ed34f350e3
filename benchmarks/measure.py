"""What the kernels' benchmarks share: alternating timings, peak memory of one call, a machine's limits, tables.

A case is built by a function of the batch and named in a dict. One that is not ours may be missing or fail: that is a
line, and the run goes on. A failure of ours ends it.
"""

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
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
FLUSH_BYTES = 512 * 2**20
"""Written before each timed call on a GPU, more than any L2 holds."""
FLUSHES = 8
"""Times that they are written: milliseconds in which the host queues the call, as it is ahead in training, too."""
SLOW = 60.0
"""A call that took longer than this many seconds is not timed again."""
SAMPLE = 64
"""Rows of the gradient that are compared with ours."""


class Case(NamedTuple):
    """Something to measure."""

    call: Callable[[], tuple[Tensor, list[Tensor]]]
    """Returns the loss (or any output) and the gradients; the first has a row per token."""
    restore: Callable[[], object] = lambda: None
    """Puts back what `call` overwrites; not timed."""


Builders = dict[str, Callable[..., Case]]


def differentiated(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, frozen: bool
) -> Case:
    """`loss(hidden, weight)` and its gradients; none of a frozen weight."""

    def call():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        value = loss(h, w)
        return value, list(torch.autograd.grad(value, [h] if frozen else [h, w]))

    return Case(call)


@contextlib.contextmanager
def excused(name: str, skipped: dict[str, str]):
    """What fails inside goes into `skipped` and onto one line, unless it is ours."""
    try:
        yield
    except Exception as error:
        if name.startswith("ours"):
            raise
        skipped[name] = (
            f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:160]}"
        )
        print(f"skipped: {name}: {skipped[name]}")


# --- timing -------------------------------------------------------------------------------------------------------


def seconds(case: Case, device: str) -> float:
    """Of one call: between CUDA events, with L2 flushed before and the call queued by then, or on the wall clock."""
    case.restore()
    if device == "cpu":
        start = time.perf_counter()
        case.call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    waste = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(FLUSHES):
        waste.zero_()
    del waste
    begin.record()
    case.call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def warm_up(
    builders: Builders, batch, device: str, against: str | None = None
) -> tuple[dict, dict, dict]:
    """Build and call everything once: the cases that work, how far each is from `against`, why others do not work."""
    cases, first, skipped = {}, {}, {}
    for name, build in builders.items():
        with excused(name, skipped):
            case = build(batch)
            case.restore()
            loss, gradients = case.call()
            if device != "cpu":
                torch.cuda.synchronize()
            gradient = gradients[0].detach() if gradients else loss
            first[name] = (
                loss.detach().double(),
                (gradient[0] if gradient.ndim == 3 else gradient)[:SAMPLE].double(),
            )
            cases[name] = case
        loss = gradients = gradient = case = None
        release()
    if against is None:
        return cases, {}, skipped
    far = {
        n: [_distance(a, b) for a, b in zip(first[n], first[against], strict=True)] for n in cases
    }
    return (
        cases,
        {n: {"loss": loss, "gradient": gradient} for n, (loss, gradient) in far.items()},
        skipped,
    )


def time_alternating(
    cases: dict[str, Case], rounds: int, device: str, skipped: dict[str, str]
) -> dict[str, dict]:
    """Median and least seconds of each case; all are called in turn, `rounds` times. Leaves out what fails."""
    taken = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            if name not in skipped and (not taken[name] or taken[name][0] < SLOW):
                with excused(name, skipped):
                    taken[name].append(seconds(case, device))
    done = {name: times for name, times in taken.items() if name not in skipped}
    return {
        n: {"median": statistics.median(t), "least": min(t), "calls": len(t)}
        for n, t in done.items()
    }


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative difference of `a` from `b`."""
    return ((a - b).norm() / b.norm()).item()


# --- limits -------------------------------------------------------------------------------------------------------


def copy_case(source: Tensor) -> Case:
    """One read and one write of as many bytes as `source` has; touched by the first call."""
    target = torch.empty_like(source)
    return Case(lambda: (target.copy_(source)[0, 0], []))


def gemm_case(hidden: Tensor, weight: Tensor) -> Case:
    """The three products that no implementation avoids, into tensors that exist: 6·N·D·V FLOP and nothing else."""
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def call():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)
        return dhidden[0, 0], []

    return Case(call)


# --- memory -------------------------------------------------------------------------------------------------------


def release() -> None:
    """Give free memory back, so that it does not hide what a call takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak(case: Case, device: str) -> dict[str, int]:
    """Bytes at the worst moment of one call beyond those held before it, and bytes of the gradients it returns.

    GPU: PyTorch's allocator. CPU: the process' resident memory, its high-water mark (VmHWM) set back by writing 5 to
    /proc/self/clear_refs; to be taken in a process that has done nothing else (`peak_in_subprocess`).
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
    """What `script --peak name …` prints last."""
    run = subprocess.run(
        [sys.executable, script, "--peak", name, *arguments], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1])
    return json.loads(run.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    return (
        int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))
        * 1024
    )


# --- output -------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> str:
    """`cuda` where there is one, for "auto"."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict:
    """What the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else cpu.group(1)
        if cpu
        else platform.processor()
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **versions,
    }


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """As Markdown; None is a dash."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |")


def megabytes(value: float | None) -> str | None:
    """Bytes in MiB."""
    return None if value is None else f"{value / 2**20:,.0f}"


def finish(benchmark: str, device: str, **results) -> None:
    """The last line: everything as one JSON document."""
    command = " ".join(["python", *sys.argv])
    document = {"benchmark": benchmark, "command": command, "machine": machine(device), **results}
    print("\n" + json.dumps(document))
