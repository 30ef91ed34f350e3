"""The parts of the fused head, for bench_linear_grpo_loss.py: one chunk by stage, rows by sums.

    python benchmarks/bench_linear_grpo_loss.py --stages [--rows 1024 2816]
    python benchmarks/bench_linear_grpo_loss.py --rows 1024 1664 2048 2816

`--stages` times each GEMM of one chunk, the row operation and the cast of dweight. dhidden is
computed by one GEMM, which is what runs, and by k GEMMs over V/k columns each, whose fp32 results
are summed. `--rows` alone times the whole loss at these rows per chunk, with dweight summed in the
weight's dtype and in fp32.
"""

from collections.abc import Callable
from functools import partial

import torch
from measure import Case, gemm_case, megabytes, peak, print_table, time_alternating
from torch import Tensor

from mr1_fast.kernels.grpo.chunks import CHUNK_BYTES
from mr1_fast.kernels.grpo.head import Head, NeedsGradient, head_rows
from mr1_fast.kernels.grpo.linear import grpo_of_head
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.grpo.rows import row_grpo
from mr1_fast.loss.arguments import check_objective

ALL = NeedsGradient(hidden=True, weight=True, bias=False)
WEIGHT = NeedsGradient(hidden=False, weight=True, bias=False)
SPLITS = (2, 4, 8)
GEMMS = "three bare GEMMs"


def objective_of(hidden: Tensor, arguments: dict) -> Objective:
    """The objective of rows (N, D), as the public loss makes it; temperature 1."""
    return check_objective(Objective(**arguments, temperature=1.0), hidden, "token", None)


def default_rows(hidden: Tensor, weight: Tensor) -> int:
    """The rows per chunk that the loss takes by itself."""
    return head_rows(hidden, weight, ALL, CHUNK_BYTES[hidden.device.type])


# --- one chunk by stage ---------------------------------------------------------------------------


def stage_cases(
    hidden: Tensor, weight: Tensor, targets: Tensor, arguments: dict, rows: int
) -> dict[str, tuple[Case, float, str]]:
    """Each stage of a chunk by name: its case, its FLOP or bytes, and the unit of their rate."""
    (v, d), n = weight.shape, min(rows, len(hidden))
    chunk, logits = hidden[:n], hidden.new_empty(n, v)
    torch.mm(chunk, weight.T, out=logits)
    dhidden, results = torch.empty_like(chunk), RowResults.empty(chunk)
    objective = objective_of(hidden, arguments).rows(slice(0, n))
    flop, traffic = 2.0 * n * d * v, 2.0 * logits.nbytes
    calls: dict[str, tuple[Callable, float, str]] = {
        "logits": (lambda: torch.mm(chunk, weight.T, out=logits), flop, "TFLOP/s"),
        "loss and dlogits, in place": (
            lambda: row_grpo(logits, targets[:n], objective, results, logits),
            traffic,
            "TB/s",
        ),
        "dhidden, mm": (lambda: torch.mm(logits, weight, out=dhidden), flop, "TFLOP/s"),
    }
    for k in SPLITS:
        if v % k == 0:
            call = partial(split_dhidden, logits, weight, k, dhidden)
            calls[f"dhidden, bmm of {k} parts"] = call, flop, "TFLOP/s"

    # Rows of two chunks, as a single one is never summed in fp32.
    twice = chunk.repeat(2, 1)
    for in_fp32 in (False, True) if weight.element_size() == 2 else (False,):
        head = Head(twice, weight, None, WEIGHT, n, fp32_accumulation=in_fp32)
        name = "float32" if in_fp32 else str(weight.dtype).removeprefix("torch.")
        add = partial(head.backward, slice(0, n), logits)
        calls[f"dweight, added in {name}"] = add, flop, "TFLOP/s"
        if in_fp32:
            calls["cast of dweight"] = head.gradients, 6.0 * v * d, "TB/s"
    return {
        name: (Case(lambda call=call: (call(), [])), amount, unit)
        for name, (call, amount, unit) in calls.items()
    }


def split_dhidden(dlogits: Tensor, weight: Tensor, k: int, out: Tensor) -> None:
    """Compute dlogits (n, V) @ weight (V, D) as the sum of k products over V/k columns each."""
    n, (v, d) = len(dlogits), weight.shape
    left, right = dlogits.view(n, k, v // k).transpose(0, 1), weight.view(k, v // k, d)
    wide = {"out_dtype": torch.float32} if weight.is_cuda and weight.element_size() == 2 else {}
    out.copy_(torch.bmm(left, right, **wide).sum(0))


def by_stage(hidden: Tensor, weight: Tensor, targets: Tensor, arguments: dict, options) -> dict:
    """Time one chunk by stage, at each of `options.rows`, and print tables."""
    results = []
    for rows in options.rows or [default_rows(hidden, weight)]:
        stages = stage_cases(hidden, weight, targets, arguments, rows)
        skipped: dict[str, str] = {}
        cases = {name: case for name, (case, _, _) in stages.items()}
        time_alternating(cases, 1, options.device, skipped)  # warms up
        times = time_alternating(cases, options.rounds, options.device, skipped)
        table, measured = [], []
        for name, taken in times.items():
            _, amount, unit = stages[name]
            rate = amount / taken["median"]
            measured.append({"stage": name, **taken, "amount": amount, "per_second": rate})
            milliseconds = f"{taken['median'] * 1000:,.3f}"
            table.append([name, milliseconds, f"{rate / 1e12:,.3f} {unit}"])
        print_table(f"One chunk of {rows:,} rows, {_sizes(weight)}", ["stage", "ms", "rate"], table)
        results.append({"rows": rows, "stages": measured, "skipped": skipped})
    return {"width": weight.shape[1], "chunks": results}


# --- the whole loss -------------------------------------------------------------------------------


def whole_case(
    hidden: Tensor, weight: Tensor, targets: Tensor, arguments: dict, rows: int, in_fp32: bool
) -> Case:
    """A case of the loss and its gradients, with so many rows per chunk."""
    objective = objective_of(hidden, arguments)

    def call():
        head = Head(hidden, weight, None, ALL, min(rows, len(hidden)), in_fp32)
        loss, *_, dhidden, dweight, _ = grpo_of_head(head, targets, objective)
        return loss, [dhidden, dweight]

    return Case(call)


def by_rows(hidden: Tensor, weight: Tensor, targets: Tensor, arguments: dict, options) -> dict:
    """Time the whole loss at each of `options.rows` and dtype of the sum, and print a table.

    On a GPU peak memory is measured, too; on a CPU it takes a process of its own.
    """
    own = str(weight.dtype).removeprefix("torch.")
    sums = {own: False, "float32": True}  # one, if the weight has 32 bits
    cases = {
        (rows, name): whole_case(hidden, weight, targets, arguments, rows, in_fp32)
        for rows in options.rows
        for name, in_fp32 in sums.items()
    }
    skipped: dict[str, str] = {}
    named = {f"{rows:,} rows, sum in {name}": case for (rows, name), case in cases.items()}
    named[GEMMS] = gemm_case(hidden, weight)
    time_alternating(named, 1, options.device, skipped)  # warms up
    times = time_alternating(named, options.rounds, options.device, skipped)
    named.pop(GEMMS)
    table, measured = [], []
    for (rows, name), (label, case) in zip(cases, named.items(), strict=True):
        if label not in times:
            continue
        beside = None
        if options.device == "cuda":
            taken = peak(case, options.device)
            beside = taken["peak"] - taken["gradients"]
        of_gemms = times[label]["median"] / times[GEMMS]["median"]
        row = {"rows": rows, "sum": name, **times[label], "of_gemms": of_gemms, "beside": beside}
        measured.append(row)
        milliseconds = f"{row['median'] * 1000:,.1f}"
        table.append([f"{rows:,}", name, milliseconds, f"{of_gemms:.2f}", megabytes(beside)])
    table.append([GEMMS, None, f"{times[GEMMS]['median'] * 1000:,.1f}", "1.00", None])
    columns = ["rows per chunk", "sum in", "ms", "× bare GEMMs", "beside gradients, MiB"]
    print_table(f"N = {len(hidden):,}, {_sizes(weight)}", columns, table)
    gemms = times[GEMMS]
    return {"width": weight.shape[1], "chunks": measured, "gemms": gemms, "skipped": skipped}


def _sizes(weight: Tensor) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"D = {weight.shape[1]:,}, V = {weight.shape[0]:,}, {dtype} on {weight.device.type}"
