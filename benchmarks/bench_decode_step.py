"""The operations of one decode step, each beside the same in PyTorch and beside the memory's bandwidth.

    python benchmarks/bench_decode_step.py [--models 2B 7B] [--rows 1 8 32 64 128] [--sweep [--in-gemm]]

Widths are Qwen2-VL's, in bf16. Each operation is a CUDA graph of 20 launches, on weights, keys and logits that rotate
and are together larger than L2; a row has 600 tokens in common with seven others, and 256 of its own. The limit is a
copy's bandwidth in the same run, for what an operation must read and write: weights, activations, keys and values, a
shared prefix once.

A whole step, from these: per layer norm_linear, attend, o_proj, norm_swiglu and down_proj, then head and draw. "update
in GEMM" are the fused operations without an update, which o_proj and down_proj then add to the residual.

--sweep: other tiles (decode_linear_triton.TILES), and the best for each operation and R. Prints Markdown tables; the
last line is one JSON document.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from measure import finish, print_table, release
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from mr1_fast.kernels.decode import add_rms_norm, attend, sample, silu_mul
from mr1_fast.kernels.decode_linear import norm_linear, norm_swiglu

LAUNCHES = 20
REPLAYS = 7
PREFIX, OWN, GROUP = 600, 256, 8
EPS = 1e-6
COPY_BYTES = 2**30


@dataclass
class Shape:
    """Widths of a model: D, F, heads, kv heads, layers, V."""

    d: int
    f: int
    heads: int
    kv_heads: int
    layers: int
    v: int

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.d, self.kv_heads * HEAD, self.kv_heads * HEAD


HEAD = 128
MODELS = {"2B": Shape(1536, 8960, 12, 2, 28, 151_936), "7B": Shape(3584, 18944, 28, 4, 28, 152_064)}
STEP = {"norm_linear": True, "attend": True, "o_proj": True, "norm_swiglu": True, "down_proj": True, "head": False,
        "sample": False}  # fmt: skip
"""Operations of a step, and whether each layer has them."""
IN_GEMM = " (update in GEMM)"


# --- timing -------------------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, in a graph of LAUNCHES that go through `calls` in turn."""
    for call in calls[:2]:  # compiled, and libraries set up
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()
    times = []
    for _ in range(REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(times[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes a microsecond, read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / microseconds([lambda: target.copy_(source)])


# --- what is timed ------------------------------------------------------------------------------------------------


class Data:
    """Tensors of one model and R, as many sets of each kind as are larger than L2 together."""

    def __init__(self, shape: Shape, rows: int, device: str, l2: int):
        self.shape, self.rows, self.device, self.l2 = shape, rows, device, l2
        self.residual, self.update, self.attended = (self.random(rows, shape.d) for _ in range(3))
        self.gated = self.random(rows, shape.f)
        self.norm = self.random(shape.d)

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def sets(self, *sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
        """Random weights of these sizes."""
        total = sum(2 * torch.Size(size).numel() for size in sizes)
        count = min(LAUNCHES, max(1, -(-3 * self.l2 // total)))
        return [tuple(self.random(*size, scale=size[-1] ** -0.5) for size in sizes) for _ in range(count)]

    def qkv(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        biases = [self.random(n) for n in self.shape.widths]
        return [(list(weights), biases) for weights in self.sets(*((n, self.shape.d) for n in self.shape.widths))]


def normed(data: Data) -> tuple[Tensor, Tensor]:
    """PyTorch's own addition and norm."""
    residual = data.residual + data.update
    return residual, rms_norm(residual, residual.shape[1:], data.norm, EPS)


def projections(data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and ways to compute queries, keys and values."""
    sets, d, r = data.qkv(), data.shape.d, data.rows
    n = sum(data.shape.widths)

    def ours(update, weights, biases):
        return norm_linear(data.residual, update, data.norm, EPS, weights, biases)

    def apart(norm, weights, biases):
        x = norm()[1]
        return [linear(x, *each) for each in zip(weights, biases, strict=True)]

    return 2 * (n * d + r * (3 * d + n)), {
        "norm_linear": [partial(ours, data.update, *each) for each in sets],
        "norm_linear" + IN_GEMM: [partial(ours, None, *each) for each in sets],
        "add_rms_norm, 3 linear": [partial(apart, partial(our_norm, data), *each) for each in sets],
        "PyTorch: add, rms_norm, 3 linear": [partial(apart, partial(normed, data), *each) for each in sets],
    }


def our_norm(data: Data) -> tuple[Tensor, Tensor]:
    return add_rms_norm(data.residual, data.update, data.norm, EPS)


def gatings(data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and ways to compute the gated layer."""
    d, f, r = data.shape.d, data.shape.f, data.rows
    sets = data.sets((f, d), (f, d))

    def ours(update, gate, up):
        return norm_swiglu(data.residual, update, data.norm, EPS, gate, up)

    def apart(norm, gating, gate, up):
        x = norm()[1]
        return gating(linear(x, gate), linear(x, up))

    return 2 * (2 * f * d + r * (3 * d + f)), {
        "norm_swiglu": [partial(ours, data.update, *each) for each in sets],
        "norm_swiglu" + IN_GEMM: [partial(ours, None, *each) for each in sets],
        "add_rms_norm, 2 linear, silu_mul": [partial(apart, partial(our_norm, data), silu_mul, *each) for each in sets],
        "PyTorch: add, rms_norm, 2 linear, silu, mul": [
            partial(apart, partial(normed, data), lambda gate, up: silu(gate) * up, *each) for each in sets
        ],
    }


def products(name: str, x: Tensor, data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and cuBLAS' products with o_proj or down_proj, also added to the residual."""
    sets, d = data.sets((data.shape.d, x.shape[1])), data.shape.d
    residual = data.residual.clone()
    return 2 * (d * x.shape[1] + data.rows * (x.shape[1] + d)), {
        name: [partial(linear, x, *each) for each in sets],
        name + IN_GEMM: [partial(residual.addmm_, x, weight.T) for (weight,) in sets],
    }


def heads(data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and cuBLAS' product with the head."""
    d, v, r = data.shape.d, data.shape.v, data.rows
    return 2 * (v * d + r * (d + v)), {"head": [partial(linear, data.residual, *each) for each in data.sets((v, d))]}


def attentions(data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and attention over shared prefixes and rows' own tokens."""
    shape, r = data.shape, data.rows
    groups = -(-r // GROUP)
    tokens = groups * PREFIX + r * OWN
    pool = tokens, shape.kv_heads, HEAD
    q, k, v = (data.random(r, n // HEAD, HEAD) for n in shape.widths)
    angles = data.random(r, HEAD), data.random(r, HEAD)
    row = torch.arange(r, dtype=torch.int32)
    spans = [
        row // GROUP * PREFIX,
        torch.full_like(row, PREFIX),
        groups * PREFIX + row * OWN,
        torch.full_like(row, OWN),
    ]
    spans = torch.stack(spans, dim=1).to(data.device)
    cost = 2 * (2 * tokens * shape.kv_heads * HEAD + 2 * r * shape.d)
    return cost, {"attend": [partial(attend, q, k, v, *angles, *each, spans, HEAD**-0.5)
                             for each in data.sets(pool, pool)]}  # fmt: skip


def draws(data: Data) -> tuple[int, dict[str, list[Callable]]]:
    """Bytes, and the draw from logits."""
    shape, r = data.shape, data.rows
    uniform = torch.rand(r, device=data.device)
    return 2 * r * shape.v, {"sample": [partial(sample, each, uniform, 1.0, (151_655, 151_656))
                                        for (each,) in data.sets((r, shape.v))]}  # fmt: skip


def measured(model: str, rows: int, device: str, l2: int, bandwidth: float) -> list[dict]:
    """A line for each operation and way."""
    data = Data(MODELS[model], rows, device, l2)
    builders = (projections, attentions, partial(products, "o_proj", data.attended), gatings,
                partial(products, "down_proj", data.gated), heads, draws)  # fmt: skip
    lines = []
    for build in builders:
        cost, ways = build(data)
        for name, calls in ways.items():
            time = microseconds(calls)
            figures = {"microseconds": time, "megabytes": cost / 1e6, "of_copy": cost / bandwidth / time}
            lines.append({"model": model, "rows": rows, "operation": name, **figures})
        ways = calls = None
        release()
    return lines + steps(MODELS[model], lines)


def steps(shape: Shape, lines: list[dict]) -> list[dict]:
    """Whole steps, as the sum of their operations."""
    of = {line["operation"]: line for line in lines}
    found = []
    for way in ("", IN_GEMM):
        parts = [(shape.layers if each else 1, of.get(name + way, of[name])) for name, each in STEP.items()]
        whole = {key: sum(n * part[key] for n, part in parts) for key in ("microseconds", "megabytes")}
        of_copy = sum(n * part["microseconds"] * part["of_copy"] for n, part in parts) / whole["microseconds"]
        found.append(lines[0] | whole | {"operation": "whole step" + way, "of_copy": of_copy})
    return found


# --- sweep --------------------------------------------------------------------------------------------------------

OPTIONS = {
    ("linear", 8): ((16,), (8,), (128, 256, 512), (4, 8), (4, 6)),
    ("linear", 16): ((16, 32), (8, 16), (256,), (4, 8), (3, 4)),
    ("linear", 32): ((16, 32, 64), (8, 16, 32), (256,), (4, 8), (4,)),
    ("linear", 64): ((16, 32, 64), (16, 32, 64), (128, 256), (4, 8), (4,)),
    ("linear", 128): ((32, 64), (16, 32, 64), (128, 256), (4, 8), (4,)),
    ("swiglu", 8): ((64, 128), (8,), (128, 256), (4, 8), (3, 5)),
    ("swiglu", 16): ((64, 128), (16,), (128, 256), (4, 8), (3, 5)),
    ("swiglu", 32): ((64, 128), (32,), (128,), (4, 8), (3, 4, 5)),
    ("swiglu", 64): ((64, 128, 256), (32, 64), (64, 128), (4, 8), (3, 4)),
    ("swiglu", 128): ((128,), (64, 128), (64, 128), (8,), (3, 4, 5)),
}
"""Values of a tile's fields that are tried together."""


def tiles(operation: str, rows: int) -> list:
    """Those of OPTIONS that fit, and those in use."""
    from mr1_fast.kernels.decode_linear_triton import TILES, Tile

    case = operation, min(max(8, 1 << (rows - 1).bit_length()), 128)
    tried = [Tile(*each) for each in itertools.product(*OPTIONS[case])]
    fit = [t for t in tried if (t.columns + 2 * t.rows) * t.depth * (t.stages - 1) <= 160 * 2**10
           and 1 <= t.columns * t.rows / t.warps / 32 <= 64]  # fmt: skip
    return list(dict.fromkeys([*TILES[case], *fit]))


def swept(models: list[str], rows: list[int], device: str, l2: int, update: bool) -> list[dict]:
    """A line for each tile."""
    lines = []
    for r, model in itertools.product(rows, models):
        data = Data(MODELS[model], r, device, l2)
        for operation in ("linear", "swiglu"):
            lines += [{"model": model, "rows": r, "operation": operation, "update": update, **line}
                      for line in swept_case(data, operation, data.update if update else None)]  # fmt: skip
            release()
    return lines


def swept_case(data: Data, operation: str, update: Tensor | None) -> list[dict]:
    """Tiles and their times."""
    from triton.runtime.errors import OutOfResources

    from mr1_fast.kernels import decode_linear_triton as fused

    function = fused.norm_linear if operation == "linear" else fused.norm_swiglu
    sets = data.qkv() if operation == "linear" else data.sets(*[(data.shape.f, data.shape.d)] * 2)

    def calls(tile) -> list[Callable]:
        return [partial(function, data.residual, update, data.norm, EPS, *each, tile=tile) for each in sets]

    def compiles(tile) -> bool:
        try:
            calls(tile)[0]()
        except OutOfResources:
            return False
        return True

    tried = tiles(operation, data.rows)
    with ThreadPoolExecutor() as pool:  # Triton gives up Python's lock while it compiles
        fit = [compiles(tried[0]), *pool.map(compiles, tried[1:])]
    return [{"tile": list(tile), "microseconds": microseconds(calls(tile))}
            for tile, fits in zip(tried, fit, strict=True) if fits]  # fmt: skip


def print_sweep(lines: list[dict]) -> None:
    """The three best tiles of each case."""
    key = lambda line: (line["model"], line["operation"], line["rows"], line["update"])  # noqa: E731
    table = []
    for case, group in itertools.groupby(sorted(lines, key=key), key=key):
        best = sorted(group, key=lambda line: line["microseconds"])[:3]
        shown = [f"{tuple(line['tile'])} {line['microseconds']:.1f}" for line in best]
        table.append([*case, *shown, *[None] * (3 - len(shown))])
    title = "Best tiles (columns, rows, depth in bytes, warps, stages) and their µs"
    print_table(title, ["model", "operation", "R", "update", "1st", "2nd", "3rd"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64, 128])
    parser.add_argument("--sweep", action="store_true", help="try other tiles, and nothing else")
    parser.add_argument("--in-gemm", action="store_true", help="sweep without an update")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode_step needs a GPU")
        return
    device = "cuda"
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e3:,.0f} GB/s, read and written")
    results = {"copy_bytes_per_microsecond": bandwidth}
    if arguments.sweep:
        results["tiles"] = swept(arguments.models, arguments.rows, device, l2, not arguments.in_gemm)
        print_sweep(results["tiles"])
    else:
        lines = [
            line for m in arguments.models for r in arguments.rows for line in measured(m, r, device, l2, bandwidth)
        ]
        for model in arguments.models:
            ours = [line for line in lines if line["model"] == model]
            cells = {(line["operation"], line["rows"]): line for line in ours}
            table = [
                [
                    name,
                    *(
                        f"{cells[name, r]['microseconds']:,.1f} ({cells[name, r]['of_copy']:.0%})"
                        for r in arguments.rows
                    ),
                ]
                for name in dict.fromkeys(line["operation"] for line in ours)
            ]
            print_table(f"{model}: µs, and % of a copy's bandwidth", ["", *(f"R = {r}" for r in arguments.rows)], table)
        results["operations"] = lines
    finish("bench_decode_step", device, **results)


if __name__ == "__main__":
    main()
