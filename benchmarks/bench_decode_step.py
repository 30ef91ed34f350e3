"""The operations of one decode step, beside the same in PyTorch and beside the memory's bandwidth.

    python benchmarks/bench_decode_step.py [--models 2B 7B Qwen3-VL-2B] [--rows 8 64 128]
    [--layers 8]

Widths are those of Qwen2-VL 2B and 7B and of Qwen3-VL 2B, in bf16; R is the number of rows. The
linear layers are plain, or have adapters of rank 16, or weights in nf4 with double quantisation, or
both. Beside ours are PyTorch's products, adapters as peft computes them (three more products for
each layer), and weights that are dequantised first, by us or by bitsandbytes. Merged adapters are
plain layers.

Each operation is a CUDA graph of 20 launches, which rotate over sets of weights, keys and logits:
as many sets, up to 20, as together exceed L2. A row shares 600 tokens with seven others and has 256
of its own. The limit is a read's bandwidth in the same run, for the bytes that an operation must
read and write, which is little: weights as they are stored, activations, keys and values, a shared
prefix once. A copy's bandwidth is beside it.

A whole step is the sum of its operations, each as the launch table has it. What runs into one
another shows in layers alone: a CUDA graph of --layers whole layers, as the engine decodes with
them, for each setting of decode_overlap, with 64 rows and a layer's limit.

Prints Markdown tables; the last line is one JSON document. What it takes is found by
`sweep.py decode_…` before.
"""

import itertools
import statistics
from collections.abc import Callable
from functools import partial

import torch
from decode_cases import KINDS, MODELS, operations
from decode_tiles import OVERLAPS
from device_time import read
from measure import finish, make_parser, print_table, release

from mr1_fast.kernels.overlap import decode_overlap, possible_overlaps

LAUNCHES = 20
REPLAYS = 7
LIMIT_BYTES = 2**30
LAYER_KINDS = {"2B": ("", "_lora"), "7B": ("", "_four_bit_lora"), "Qwen3-VL-2B": ("", "_lora")}
"""Kinds of which whole layers are measured."""
ROWS_OF_LAYERS = 64
WHOLE = "whole step"


# --- timing ---------------------------------------------------------------------------------------


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a graph: a median of replays."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call, in a graph of LAUNCHES that go through `calls` in turn."""
    for call in calls[:2]:  # a warm-up, in which kernels are compiled and libraries set up
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()
    return replayed(graph) * 1000 / LAUNCHES


def bandwidths() -> dict[str, float]:
    """Bytes per microsecond that a read reads, and that a copy reads and writes."""
    source = torch.zeros(LIMIT_BYTES, dtype=torch.uint8, device="cuda")
    copied = microseconds([partial(torch.empty_like(source).copy_, source)])
    return {
        "read": LIMIT_BYTES / microseconds([partial(read, source)]),
        "copy": 2 * LIMIT_BYTES / copied,
    }


# --- operations -----------------------------------------------------------------------------------


def measured(model: str, rows: int, kind: str, bandwidth: float) -> list[dict]:
    """A line for each operation and way to compute it, and for the whole step."""
    case = {"model": model, "rows": rows, "kind": kind}
    lines, step, layer_cost = [], {"time": 0.0, "cost": 0}, 0
    for make in operations(MODELS[model], rows, kind):
        operation = make()
        for name, calls in operation.ways.items():
            time = microseconds(calls)
            lines.append(case | line(name, time, operation.cost, bandwidth))
            if name == operation.name:
                step["time"] += operation.times * time
                step["cost"] += operation.times * operation.cost
                layer_cost += operation.cost if operation.times > 1 else 0
        operation = None
        release()
    whole = line(WHOLE, step["time"], step["cost"], bandwidth) | {"layer_cost": layer_cost}
    return [*lines, case | whole]


def line(name: str, time: float, cost: int, bandwidth: float) -> dict:
    """The figures of an operation that takes `time` µs for `cost` bytes."""
    figures = {"microseconds": time, "megabytes": cost / 1e6, "of_read": cost / bandwidth / time}
    return {"operation": name, **figures}


def print_measured(lines: list[dict], rows: list[int]) -> None:
    """Print the table of `measured` for each kind, and what adapters and 4 bits cost."""
    for kind in KINDS:
        table: dict[tuple, list] = {}
        for each in lines:
            if each["kind"] == kind:
                case = each["model"], each["operation"]
                table.setdefault(case, [*case]).append(
                    f"{each['microseconds']:,.1f} ({each['of_read']:.0%})"
                )
        columns = ["model", "operation", *(f"R = {r}" for r in rows)]
        title = f"{words(kind)}: µs, and % of a read's bandwidth"
        print_table(title, columns, list(table.values()))
    whole = {
        (each["model"], each["rows"], each["kind"]): each
        for each in lines
        if each["operation"] == WHOLE
    }
    table = [
        [model, words(kind), r, f"{each['microseconds'] / 1000:.3f}",
         f"{each['microseconds'] / whole[model, r, '']['microseconds']:.2f}",
         f"{1 / each['of_read']:.2f}"]
        for (model, r, kind), each in whole.items()
    ]  # fmt: skip
    columns = ["model", "layers", "R", "ms", "time / plain (merged)", "time / limit"]
    print_table("Whole step, the sum of its operations", columns, table)


def words(kind: str) -> str:
    """The kind of layers in words."""
    bits = "nf4" if "_four_bit" in kind else "plain"
    return bits + " with LoRA" * ("_lora" in kind)


# --- whole layers ---------------------------------------------------------------------------------


def measured_layers(
    model: str, kind: str, layers: int, layer_cost: int, bandwidth: float
) -> list[dict]:
    """A line for each setting of overlap: a layer's microseconds in a graph of several."""
    from decode_layers import random_layers
    from sweep_decode import Replayed

    torch.manual_seed(0)
    with torch.no_grad():
        step = Replayed(
            random_layers(model, kind, layers, ROWS_OF_LAYERS, "cuda", torch.bfloat16), "cuda"
        )
        lines = []
        for setting in (None, *possible_overlaps(OVERLAPS, torch.device("cuda", 0))):
            step(setting)
            time = replayed(step.graphs[setting][0]) * 1000 / layers
            case = {"model": model, "kind": kind, "setting": setting and setting._asdict()}
            lines.append(case | line("layer", time, layer_cost, bandwidth))
    release()
    return lines


def print_layers(lines: list[dict], layers: int) -> None:
    """Print the table of `measured_layers`."""
    table = []
    for each in lines:
        setting = each["setting"] or {"dependent": False, "prefetch_kib": 0}
        launch = "dependent" if setting["dependent"] else "one by one"
        figures = f"{each['microseconds']:.1f}", f"{each['of_read']:.0%}"
        table.append(
            [each["model"], words(each["kind"]), launch, setting["prefetch_kib"], *figures]
        )
    title = f"A layer in a CUDA graph of {layers}, {ROWS_OF_LAYERS} rows"
    columns = ["model", "layers", "launches", "prefetched KiB", "µs", "of a read's bandwidth"]
    print_table(title, columns, table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64, 128])
    parser.add_argument("--layers", type=int, default=8, help="of the graph of whole layers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode_step needs a GPU")
        return
    limits = bandwidths()
    print(", ".join(f"{name}: {limit / 1e3:,.0f} GB/s" for name, limit in limits.items()))
    print(f"decode_overlap: {decode_overlap(torch.device('cuda'))}", flush=True)
    rows = arguments.rows
    cases = itertools.product(arguments.models, rows, KINDS)
    lines = [each for case in cases for each in measured(*case, limits["read"])]
    print_measured(lines, rows)
    costs = {
        (each["model"], each["kind"]): each["layer_cost"]
        for each in lines
        if each["operation"] == WHOLE and each["rows"] == ROWS_OF_LAYERS
    }
    of_layers = [
        each
        for model in arguments.models
        for kind in LAYER_KINDS[model]
        if (model, kind) in costs
        for each in measured_layers(
            model, kind, arguments.layers, costs[model, kind], limits["read"]
        )
    ]
    print_layers(of_layers, arguments.layers)
    results = {"bytes_per_microsecond": limits, "operations": lines, "layers": of_layers}
    finish("decode_step", "cuda", **results)


if __name__ == "__main__":
    main()
