"""The operations of one decode step, beside the same in PyTorch and beside the memory's bandwidth.

    python benchmarks/bench_decode_step.py [--models 2B 7B] [--rows 1 8 32 64 128] [--sweep]

Widths are those of Qwen2-VL, in bf16; R is the number of rows. Each operation is a CUDA graph of 20
launches, which rotate over sets of weights, keys and logits: as many sets, up to 20, as together
exceed L2. A row shares 600 tokens with seven others and has 256 of its own. The limit is a read's
bandwidth in the same run, for the bytes that an operation must read and write, which is little:
weights, activations, keys and values, a shared prefix once. A copy's bandwidth is beside it.

A whole step is the sum of its operations: in each layer add_rms_norm twice, linears, attend,
o_proj, swiglu and down_proj; after the layers the last norm, head and sample.

--sweep instead times other tiles (linear_triton.TILES) and other blocks, stages and splits of
attend. Prints Markdown tables; the last line is one JSON document.
"""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from device_time import read
from measure import finish, make_parser, print_table, release
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
LIMIT_BYTES = 2**30
LAYER = {"add_rms_norm": 2, "linears": 1, "attend": 1, "o_proj": 1, "swiglu": 1, "down_proj": 1}
"""Operations of a layer, and how often it has them."""
AFTER_LAYERS = ("add_rms_norm", "head", "sample")
SHARED_BYTES = 200 * 2**10
"""Bytes of shared memory that a tile of the sweep may take."""
ACCUMULATORS = 128
"""Registers a thread may use for its part of the product; with more it spills."""
TILES = {
    "linears": ((64,), (16, 32, 64), (64, 128, 256), (4, 8), (3, 4, 5)),
    "swiglu": ((128, 256), (32, 64, 128), (64, 128), (4, 8), (3, 4, 5)),
}
"""Columns, rows, depth, warps and stages of the sweep."""
ATTEND = ((64, 128, 256), (2, 3, 4), (1, 2, 3, 4, 6, 8))
"""BLOCK_BYTES, STAGES and splits of the sweep."""

Ways = tuple[int, dict[str, list[partial]]]
"""The bytes that an operation must move; way to compute it → calls with different data."""


class Shape(NamedTuple):
    """Sizes of a model: width of hidden states, MLP, queries and keys; layers; vocabulary."""

    d: int
    f: int
    q: int
    kv: int
    layers: int
    v: int


MODELS = {
    "2B": Shape(1536, 8960, 1536, 256, 28, 151_936),
    "7B": Shape(3584, 18944, 3584, 512, 28, 152_064),
}


# --- timing ---------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call, in a graph of LAUNCHES that go through `calls` in turn."""
    for call in calls[:2]:  # a warm-up, in which kernels are compiled and libraries set up
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
    milliseconds = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return milliseconds * 1000 / LAUNCHES


def bandwidths() -> dict[str, float]:
    """Bytes per microsecond that a read reads, and that a copy reads and writes."""
    source = torch.zeros(LIMIT_BYTES, dtype=torch.uint8, device="cuda")
    copied = microseconds([partial(torch.empty_like(source).copy_, source)])
    return {
        "read": LIMIT_BYTES / microseconds([partial(read, source)]),
        "copy": 2 * LIMIT_BYTES / copied,
    }


# --- what is timed --------------------------------------------------------------------------------


def random(*size: int) -> Tensor:
    """A random bf16 tensor whose rows have a norm of about 1."""
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16).mul_(size[-1] ** -0.5)


def sets(*sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """Sets of random tensors of these sizes, as many as exceed L2 three times, up to LAUNCHES."""
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
    """A matrix product by cuBLAS; `depth` and `columns` name fields of Shape."""
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


def samplings(shape: Shape, r: int) -> Ways:
    uniform = torch.rand(r, device="cuda")
    calls = [
        partial(sample, *each, uniform, 1.0, (151_655, 151_656)) for each in sets((r, shape.v))
    ]
    return 2 * r * shape.v, {"sample": calls}


BUILDERS = (norms, projections, attentions, partial(product, "o_proj", "d", "d"), gatings,
            partial(product, "down_proj", "f", "d"), partial(product, "head", "d", "v"),
            samplings)  # fmt: skip


def measured(model: str, rows: int, bandwidth: float) -> list[dict]:
    """A line for each operation and way to compute it, and for the whole step."""
    taken, shape = {}, MODELS[model]
    for build in BUILDERS:
        cost, ways = build(shape, rows)
        taken |= {name: (microseconds(calls), cost) for name, calls in ways.items()}
    times = [(n * shape.layers, name) for name, n in LAYER.items()]
    times += [(1, name) for name in AFTER_LAYERS]
    taken["whole step"] = tuple(sum(n * taken[name][i] for n, name in times) for i in (0, 1))
    release()
    return [
        {
            "model": model,
            "rows": rows,
            "operation": name,
            "microseconds": time,
            "megabytes": cost / 1e6,
            "of_read": cost / bandwidth / time,
        }
        for name, (time, cost) in taken.items()
    ]


def print_measured(lines: list[dict], rows: list[int]) -> None:
    """Print the table of `measured`."""
    table: dict[tuple, list] = {}
    for line in lines:
        case = line["model"], line["operation"]
        table.setdefault(case, [*case]).append(
            f"{line['microseconds']:,.1f} ({line['of_read']:.0%})"
        )
    columns = ["model", "operation", *(f"R = {r}" for r in rows)]
    print_table("µs, and % of a read's bandwidth", columns, list(table.values()))


# --- sweep ----------------------------------------------------------------------------------------


def tiles(operation: str, rows: int) -> list:
    """The tiles of the sweep that may fit and suit this number of rows."""
    least = rows / 2 if operation == "swiglu" else 0
    return [
        t for t in itertools.starmap(linear_triton.Tile, itertools.product(*TILES[operation]))
        if least <= t.rows <= max(32, rows) and t.columns * t.rows <= ACCUMULATORS * 32 * t.warps
        and (t.columns + t.rows) * t.depth * 2 * (t.stages - 1) <= SHARED_BYTES
    ]  # fmt: skip


def if_fits(time: Callable, calls: list[Callable]) -> float | None:
    """`time(calls)`, or None if the kernel needs more shared memory than there is."""
    try:
        return time(calls)
    except OutOfResources:
        return None


def swept(model: str, rows: int) -> list[dict]:
    """A line for each operation and setting that fits."""
    times = {}
    for operation, build in (("linears", projections), ("swiglu", gatings)):
        function = getattr(linear_triton, operation)
        calls = build(MODELS[model], rows)[1][operation]
        cases = {
            (operation, *t): [partial(function, *c.args, tile=t) for c in calls]
            for t in tiles(operation, rows)
        }
        calls[0]()  # sets Triton up
        with ThreadPoolExecutor() as pool:  # Triton releases Python's lock while it compiles
            list(pool.map(partial(if_fits, lambda calls: calls[0]()), cases.values()))
        times |= {key: if_fits(microseconds, calls) for key, calls in cases.items()}
    calls = attentions(MODELS[model], rows)[1]["attend"]
    for block_bytes, stages, splits in itertools.product(*ATTEND):
        tried = [partial(attention_triton.attend, *call.args, splits=splits) for call in calls]
        with mock.patch.multiple(attention_triton, BLOCK_BYTES=block_bytes, STAGES=stages):
            times["attend", block_bytes, stages, splits] = if_fits(microseconds, tried)
    release()
    case = {"model": model, "rows": rows}
    return [
        {**case, "operation": operation, "setting": setting, "microseconds": time}
        for (operation, *setting), time in times.items()
        if time
    ]


def print_swept(lines: list[dict]) -> None:
    """Print the three best settings of each operation, model and number of rows."""
    cases: dict[tuple, list[dict]] = {}
    for line in lines:
        cases.setdefault((line["operation"], line["model"], line["rows"]), []).append(line)
    table = []
    for case, tried in sorted(cases.items(), key=lambda item: item[0]):
        best = sorted(tried, key=lambda line: line["microseconds"])[:3]
        cells = [f"{tuple(line['setting'])} {line['microseconds']:.1f}" for line in best]
        table.append([*case, *cells])
    title = (
        "Best tiles (columns, rows, depth, warps, stages), best (BLOCK_BYTES, STAGES, splits) of "
        "attend, and their µs"
    )
    print_table(title, ["operation", "model", "R", "1st", "2nd", "3rd"], table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--rows", nargs="+", type=int, help="default 1 8 32 64 128, with --sweep 32 64 128"
    )
    parser.add_argument("--sweep", action="store_true", help="time other settings instead")
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
        limits = bandwidths()
        print(", ".join(f"{name}: {limit / 1e3:,.0f} GB/s" for name, limit in limits.items()))
        lines = [line for case in cases for line in measured(*case, limits["read"])]
        print_measured(lines, rows)
        results = {"bytes_per_microsecond": limits, "operations": lines}
    finish("decode_step", "cuda", **results)


if __name__ == "__main__":
    main()
