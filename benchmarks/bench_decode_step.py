"""The operations of one decode step, each beside the same in PyTorch and beside the memory's bandwidth.

    python benchmarks/bench_decode_step.py [--models 2B 7B] [--rows 1 8 32 64 128] [--sweep]

Widths are Qwen2-VL's, in bf16. Each operation is a CUDA graph of 20 launches, on weights, keys and logits that rotate:
as many sets, up to 20, as are larger than L2 together. A row has 600 tokens in common with seven others, and 256 of its
own. The limit is a copy's bandwidth in the same run, for what an operation must read and write: weights, activations,
keys and values, a shared prefix once.

A whole step is the sum of these: per layer add_rms_norm twice, linears, attend, o_proj, swiglu and down_proj, then the
last norm, head and sample.

--sweep: other tiles (linear_triton.TILES) and other blocks, stages and splits of attend, and nothing else; R is
32, 64 and 128 unless told. Prints Markdown tables; the last line is one JSON document.
"""

import argparse
import itertools
import statistics
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from measure import finish, print_table, release
from torch import Tensor
from torch.nn.functional import linear, silu
from triton.runtime.errors import OutOfResources

from mr1_fast.kernels.decode import attention_triton, linear_triton
from mr1_fast.kernels.decode.linear import linears, swiglu
from mr1_fast.kernels.decode.operations import add_rms_norm, attend, sample, silu_mul

LAUNCHES = 20
REPLAYS = 7
PREFIX, OWN, GROUP = 600, 256, 8
HEAD = 128
COPY_BYTES = 2**30
STEP = {"add_rms_norm": 2, "linears": 1, "attend": 1, "o_proj": 1, "swiglu": 1, "down_proj": 1}
"""Operations of a layer, and how often it has them."""
LAST = ("add_rms_norm", "head", "sample")
SHARED_BYTES, ACCUMULATORS = 200 * 2**10, 128
"""What a tile of the sweep takes at most, and registers of a thread for its product: with more it spills."""
TILES = {
    "linears": ((64,), (16, 32, 64), (64, 128, 256), (4, 8), (3, 4, 5)),
    "swiglu": ((128, 256), (32, 64, 128), (64, 128), (4, 8), (3, 4, 5)),
}
"""Columns, rows, depth, warps and stages of the sweep."""
ATTEND = ((64, 128, 256), (2, 3, 4), (1, 2, 3, 4, 6, 8))
"""BLOCK_BYTES, STAGES and splits of the sweep."""

Ways = tuple[int, dict[str, list[partial]]]
"""Bytes, and calls with different data for each way to compute something."""
Shape = namedtuple("Shape", "d f q kv layers v")
"""Widths of a model: hidden, MLP, queries, keys; layers, vocabulary."""
MODELS = {
    "2B": Shape(1536, 8960, 1536, 256, 28, 151_936),
    "7B": Shape(3584, 18944, 3584, 512, 28, 152_064),
}


# --- timing -------------------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, in a graph of LAUNCHES that go through `calls` in turn."""
    for call in calls[:2]:  # compiled, and libraries set up
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return (
        statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        * 1000
        / LAUNCHES
    )


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    return 2 * COPY_BYTES / microseconds([partial(torch.empty_like(source).copy_, source)])


# --- what is timed ------------------------------------------------------------------------------------------------


def random(*size: int) -> Tensor:
    """Rows of length 1, about."""
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16).mul_(size[-1] ** -0.5)


def sets(*sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """Random tensors of these sizes, several times."""
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    total = sum(2 * torch.Size(size).numel() for size in sizes)
    return [[random(*size) for size in sizes] for _ in range(min(LAUNCHES, -(-3 * l2 // total)))]


def norms(shape: Shape, r: int) -> Ways:
    d = shape.d
    return 2 * (4 * r * d + d), {
        "add_rms_norm": [partial(add_rms_norm, random(r, d), random(r, d), random(d), 1e-6)]
    }


def projections(shape: Shape, r: int) -> Ways:
    d, widths = shape.d, (shape.q, shape.kv, shape.kv)
    n, x, biases = sum(widths), random(r, d), [random(n) for n in widths]
    weights = sets(*((n, d) for n in widths))
    return 2 * (n * d + n + r * (d + n)), {
        "linears": [partial(linears, x, each, biases) for each in weights],
        "3 F.linear": [
            partial(lambda *args: [*map(linear, *args)], [x] * 3, each, biases) for each in weights
        ],
    }


def gatings(shape: Shape, r: int) -> Ways:
    d, f = shape.d, shape.f
    x, weights = random(r, d), sets((f, d), (f, d))
    apart = lambda gating, gate, up: gating(linear(x, gate), linear(x, up))  # noqa: E731
    return 2 * (2 * f * d + r * (d + f)), {
        "swiglu": [partial(swiglu, x, *each) for each in weights],
        "2 F.linear, silu_mul": [partial(apart, silu_mul, *each) for each in weights],
        "PyTorch: 2 F.linear, silu, mul": [
            partial(apart, lambda a, b: silu(a) * b, *each) for each in weights
        ],
    }


def product(name: str, depth: str, columns: str, shape: Shape, r: int) -> Ways:
    """cuBLAS'."""
    k, n = getattr(shape, depth), getattr(shape, columns)
    x = random(r, k)
    return 2 * (n * k + r * (k + n)), {name: [partial(linear, x, *each) for each in sets((n, k))]}


def attentions(shape: Shape, r: int) -> Ways:
    groups = -(-r // GROUP)
    tokens = groups * PREFIX + r * OWN
    pool = tokens, shape.kv // HEAD, HEAD
    row = torch.arange(r, dtype=torch.int32, device="cuda")
    prefix_len, own_len = (torch.full_like(row, n) for n in (PREFIX, OWN))
    spans = torch.stack(
        [row // GROUP * PREFIX, prefix_len, groups * PREFIX + row * OWN, own_len], dim=1
    )
    new = [random(r, n // HEAD, HEAD) for n in (shape.q, shape.kv, shape.kv)] + [
        random(r, HEAD),
        random(r, HEAD),
    ]
    calls = [partial(attend, *new, *each, spans, HEAD**-0.5) for each in sets(pool, pool)]
    return 4 * (tokens * shape.kv + r * shape.q), {"attend": calls}


def draws(shape: Shape, r: int) -> Ways:
    uniform = torch.rand(r, device="cuda")
    calls = [
        partial(sample, *each, uniform, 1.0, (151_655, 151_656)) for each in sets((r, shape.v))
    ]
    return 2 * r * shape.v, {"sample": calls}


BUILDERS = (norms, projections, attentions, partial(product, "o_proj", "d", "d"), gatings,
            partial(product, "down_proj", "f", "d"), partial(product, "head", "d", "v"), draws)  # fmt: skip


def measured(model: str, rows: int, bandwidth: float) -> list[dict]:
    """A line for each operation and way, and for the whole step."""
    taken, shape = {}, MODELS[model]
    for build in BUILDERS:
        cost, ways = build(shape, rows)
        taken |= {name: (microseconds(calls), cost) for name, calls in ways.items()}
    parts = [(n * shape.layers, taken[name]) for name, n in STEP.items()] + [
        (1, taken[name]) for name in LAST
    ]
    taken["whole step"] = tuple(sum(n * part[i] for n, part in parts) for i in (0, 1))
    release()
    return [
        {"model": model, "rows": rows, "operation": name, "microseconds": time, "megabytes": cost / 1e6,
         "of_copy": cost / bandwidth / time} for name, (time, cost) in taken.items()
    ]  # fmt: skip


def print_measured(lines: list[dict], rows: list[int]) -> None:
    table: dict[tuple, list] = {}
    for line in lines:
        case = line["model"], line["operation"]
        table.setdefault(case, [*case]).append(
            f"{line['microseconds']:,.1f} ({line['of_copy']:.0%})"
        )
    columns = ["model", "operation", *(f"R = {r}" for r in rows)]
    print_table("µs, and % of a copy's bandwidth", columns, list(table.values()))


# --- sweep --------------------------------------------------------------------------------------------------------


def tiles(operation: str, rows: int) -> list:
    """Of TILES those that may fit, and suit so many rows."""
    least = rows / 2 if operation == "swiglu" else 0
    return [
        t for t in itertools.starmap(linear_triton.Tile, itertools.product(*TILES[operation]))
        if least <= t.rows <= max(32, rows) and t.columns * t.rows <= ACCUMULATORS * 32 * t.warps
        and (t.columns + t.rows) * t.depth * 2 * (t.stages - 1) <= SHARED_BYTES
    ]  # fmt: skip


def if_fits(time: Callable, calls: list[Callable]) -> float | None:
    """None where shared memory does not suffice."""
    try:
        return time(calls)
    except OutOfResources:
        return None


def swept(model: str, rows: int) -> list[dict]:
    """A line for each operation and setting that fits."""
    times = {}
    for operation, build in (("linears", projections), ("swiglu", gatings)):
        function, calls = (
            getattr(linear_triton, operation),
            build(MODELS[model], rows)[1][operation],
        )
        cases = {
            (operation, *t): [partial(function, *c.args, tile=t) for c in calls]
            for t in tiles(operation, rows)
        }
        calls[0]()  # Triton is set up
        with ThreadPoolExecutor() as pool:  # Triton gives up Python's lock while it compiles
            list(pool.map(partial(if_fits, lambda calls: calls[0]()), cases.values()))
        times |= {key: if_fits(microseconds, calls) for key, calls in cases.items()}
    calls = attentions(MODELS[model], rows)[1]["attend"]
    before = attention_triton.BLOCK_BYTES, attention_triton.STAGES
    for key in itertools.product(*ATTEND):
        attention_triton.BLOCK_BYTES, attention_triton.STAGES, splits = key
        tried = [partial(attention_triton.attend, *call.args, splits=splits) for call in calls]
        times["attend", *key] = if_fits(microseconds, tried)
    attention_triton.BLOCK_BYTES, attention_triton.STAGES = before
    release()
    return [
        {"model": model, "rows": rows, "operation": operation, "setting": setting, "microseconds": time}
        for (operation, *setting), time in times.items() if time
    ]  # fmt: skip


def print_swept(lines: list[dict]) -> None:
    """The three best settings of each case."""
    table = []
    for case in sorted({(line["operation"], line["model"], line["rows"]) for line in lines}):
        ours = [line for line in lines if (line["operation"], line["model"], line["rows"]) == case]
        best = sorted(ours, key=lambda line: line["microseconds"])[:3]
        table.append(
            [*case, *(f"{tuple(line['setting'])} {line['microseconds']:.1f}" for line in best)]
        )
    title = "Best tiles (columns, rows, depth, warps, stages), best (BLOCK_BYTES, STAGES, splits) of attend, and their µs"
    print_table(title, ["operation", "model", "R", "1st", "2nd", "3rd"], table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--sweep", action="store_true", help="try other tiles, and nothing else")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode_step needs a GPU")
        return
    rows = arguments.rows or ([32, 64, 128] if arguments.sweep else [1, 8, 32, 64, 128])
    cases = list(itertools.product(arguments.models, rows))
    if arguments.sweep:
        results = {"settings": [line for case in cases for line in swept(*case)]}
        print_swept(results["settings"])
    else:
        bandwidth = copy_bandwidth()
        print(f"copy: {bandwidth / 1e3:,.0f} GB/s, read and written")
        lines = [line for case in cases for line in measured(*case, bandwidth)]
        print_measured(lines, rows)
        results = {"copy_bytes_per_microsecond": bandwidth, "operations": lines}
    finish("bench_decode_step", "cuda", **results)


if __name__ == "__main__":
    main()
