"""The native decode attention on a CPU where neighbouring rows share a prefix, and where none do.

    python benchmarks/bench_decode_attention.py [--rounds 20] [--dtypes float32 bfloat16]

Both cases attend to the same tokens: the rows of each group are neighbours, or lie so that no two
neighbours have the same prefix, when each reads its prefix by itself. A row has 1 to 64 (tiny: 14)
tokens of its own. Widths are those of a layer of Qwen2-VL 2B and 7B, of Qwen3-VL 2B and of the tiny
model. Every call takes the next of several pools, as many as hold POOL_BYTES. A third case is the
first with norms of queries and keys, whether the model has them or not.

The limit is a read's bandwidth in the same run, for the bytes that must be read at least: a shared
prefix once, and each row's own tokens. Ratios are between medians of alternating calls. Prints a
Markdown table; the last line is one JSON document.
"""

import itertools
from typing import NamedTuple

import torch
from measure import (
    Case,
    finish,
    make_parser,
    microseconds,
    print_table,
    read_case,
    time_alternating,
)

from mr1_fast.kernels import native
from mr1_fast.kernels.decode.attention_native import attend
from mr1_fast.kernels.layers.head_norms import HeadNorms

POOL_BYTES = 2**26
LIMIT_BYTES = 2**28


class Shape(NamedTuple):
    """A layer's heads and their channels; groups of rows, and tokens that a row attends to."""

    heads: int
    kv_heads: int
    d: int
    groups: int
    group: int
    prefix: int
    own: int


MODELS = {
    "2B": Shape(12, 2, 128, 8, 8, 561, 64),
    "7B": Shape(28, 4, 128, 8, 8, 561, 64),
    "Qwen3-VL-2B": Shape(16, 8, 128, 8, 8, 561, 64),
    "tiny": Shape(4, 2, 32, 16, 8, 50, 14),
}


def spans_of(shape: Shape) -> torch.Tensor:
    """The spans (R, 4) of all rows, a group after the other."""
    row = torch.arange(shape.groups * shape.group, dtype=torch.int32)
    own_start = shape.groups * shape.prefix + row * shape.own
    prefix = torch.full_like(row, shape.prefix)
    return torch.stack(
        [row // shape.group * shape.prefix, prefix, own_start, row % shape.own + 1], dim=1
    )


def apart(spans: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The same rows so that no neighbours share: the first of each group, the second, and so on."""
    return spans.unflatten(0, (shape.groups, shape.group)).transpose(0, 1).flatten(0, 1)


def least_bytes(shape: Shape, spans: torch.Tensor, itemsize: int) -> int:
    """Bytes of keys and values that a call must read: each prefix once, each row's own tokens."""
    tokens = shape.groups * shape.prefix + int(spans[:, 3].sum())
    return 2 * tokens * shape.kv_heads * shape.d * itemsize


def attention_cases(shape: Shape, dtype: torch.dtype) -> dict[str, Case]:
    """The cases, on the same pools."""
    spans = spans_of(shape)
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.d
    size = (shape.groups * (shape.prefix + shape.group * shape.own), kv_heads, d)
    count = -(-POOL_BYTES // (2 * torch.Size(size).numel() * dtype.itemsize))
    pools = [[torch.randn(size).to(dtype) for _ in range(2)] for _ in range(count)]
    qkv = torch.randn(len(spans), heads + 2 * kv_heads, d).to(dtype)
    angles = torch.rand(len(spans), d)
    new = (
        *qkv.split([heads, kv_heads, kv_heads], dim=1),
        *(x.to(dtype) for x in (angles.cos(), angles.sin())),
    )

    norms = HeadNorms(*torch.rand(2, d).add_(0.5).to(dtype), 1e-6)

    def case(spans: torch.Tensor, norms: HeadNorms | None = None) -> Case:
        turns = itertools.cycle(pools)
        return Case(lambda: (attend(*new, *next(turns), spans, d**-0.5, norms), []))

    return {
        "ours, neighbours share": case(spans),
        "ours, none share": case(apart(spans, shape)),
        "ours, heads normed": case(spans, norms),
    }


def measured(model: str, dtype: torch.dtype, rounds: int) -> dict:
    """The times of the cases and of a read, the least bytes, and what they come to."""
    shape, skipped = MODELS[model], {}
    limit = read_case(torch.zeros(LIMIT_BYTES, dtype=torch.uint8))
    cases = {**attention_cases(shape, dtype), "read": limit}
    for case in cases.values():
        case.call()
    times = time_alternating(cases, rounds, "cpu", skipped)
    shared, alone, normed, read = (times[name]["median"] for name in cases)
    needed = least_bytes(shape, spans_of(shape), dtype.itemsize)
    return {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "times": times,
        "bytes": needed,
        "of_read": needed / LIMIT_BYTES * read / shared,
        "ratio": alone / shared,
        "of_norms": normed / shared - 1,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    library, status = native.status()
    if library is None:
        raise SystemExit(f"the native kernels are {status}")
    lines = [
        measured(model, getattr(torch, dtype), arguments.rounds)
        for model, dtype in itertools.product(arguments.models, arguments.dtypes)
    ]
    columns = ["model", "dtype", "neighbours share, µs", "none share, µs", "heads normed, µs", "×"]
    columns += ["% of a read", "norms add"]
    rows = []
    for line in lines:
        taken = [microseconds(times["median"]) for times in line["times"].values()][:3]
        ends = f"{line['ratio']:.2f}", f"{line['of_read']:.0%}", f"{line['of_norms']:.1%}"
        rows.append([line["model"], line["dtype"], *taken, *ends])
    print_table(f"A layer, {torch.get_num_threads()} threads, {status}", columns, rows)
    finish("decode_attention", "cpu", settings=vars(arguments), active=status, results=lines)


if __name__ == "__main__":
    main()
