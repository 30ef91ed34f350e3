"""Compile every Triton kernel for GPUs that are not here, and show what each compilation needs.

    python benchmarks/compile_table.py

What is compiled is exactly what a launch would compile: the real launchers run on meta tensors,
with a stand-in for the driver that names the target. The loss has 65,536 × V logits, the optimizer
a weight of V × 1,536, decoding 64 rows, a layer 6,144. Registers, spills, shared memory and the
width of memory accesses are read from the machine code, and instructions per element are counted:
of the loss and the optimizer, whose programs are straight, all of a thread's, and of
log-probabilities those of the loop. Settings that a sweep may choose have rows of their own. For
another version of Triton, put it first in PYTHONPATH. Prints a Markdown table; the last line is one
JSON document. The exit status is 1 if a limit is exceeded.
"""

import json
import math
import sys

import torch
import triton
from compile_launches import (
    LAYERS,
    MODELS,
    launch_adamw,
    launch_decode,
    launch_four_bit,
    launch_layers,
    launch_logprobs,
    launch_loss,
)
from decode_linear import launch_linear
from machine_code import captured, examine
from triton.backends.compiler import GPUTarget

from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.grpo import logprobs_triton, rows_triton

NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 120)]
TARGETS = [*NVIDIA, GPUTarget("hip", "gfx942", 64)]
"""Triton's names of A100, RTX 3090, RTX 4090, H100, RTX 5090 and MI300X, with threads per warp."""
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99, "gfx942": 64}
"""KB of shared memory that one program may use."""
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
"""Of A100, RTX 3090, RTX 4090, H100 and RTX 5090."""
SHORT_ACCESSES = 2
"""16-bit accesses that a kernel may have: the target's logit is read alone."""
MORE_SHORT_ACCESSES = {"attend": 7, "attend of normed heads": 13, "linears": 12}
"""16-bit accesses of the kernels that need more.

Attention reads the new token's angles, key (twice) and value, and writes two values, a channel a
thread; norms have weights for each key and query that it reads, twice in a prefix, too. Linear
layers read biases, one or two columns a thread, or write the output of few rows.
"""
ELEMENTS = {"grpo": "TILE", "logprobs": "BLOCK", "adamw": "TILE"}
"""The constant of a kernel that says how many elements its instructions are counted for."""
MOST_INSTRUCTIONS = {
    ("grpo", 2): 23,
    ("grpo", 4): 34,
    ("logprobs", 2): 11,
    ("logprobs", 4): 11.5,
    ("adamw", 2): 175,
}
"""Instructions per element, by kernel and bytes of an element, of the default settings.

An H100 can issue 18 to 20 in the time in which it copies a 16-bit element, and 130 in that in which
it moves an optimizer's 14 bytes. The optimizer's count holds the code for special cases of roots
and divisions, which hardly runs: 25 of it.
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def launch_decode_linear(dtype: torch.dtype, arch) -> None:
    """Launch the linear layers of decoding with the tiles for this target."""
    launch_linear(dtype, SHARED_LIMIT[arch] * 2**10, MULTIPROCESSORS[arch])


def loss_table(
    dtypes: list[str], vocabularies: list[int], targets: list[GPUTarget] = TARGETS
) -> list[dict]:
    """One row per target, dtype, V and kernel of the loss."""
    rows = []
    for target in targets:
        for dtype in dtypes:
            for v in vocabularies:
                labels = {"dtype": dtype, "V": v, "setting": None}
                with captured(target) as compiled:
                    launch_loss(DTYPES[dtype], v)
                    launch_logprobs(DTYPES[dtype], v)
                rows += _worst(compiled, target, labels)
    return rows


def variants_table(dtype: str, v: int, target: GPUTarget) -> list[dict]:
    """One row per setting of the loss and of log-probabilities that is not the default."""
    rows = []
    for launch, variants in (
        (launch_loss, rows_triton.LOSS_VARIANTS),
        (launch_logprobs, logprobs_triton.LOGPROBS_VARIANTS),
    ):
        for tile in variants[1:]:
            with captured(target) as compiled:
                launch(DTYPES[dtype], v, tile=tile)
            setting = "/".join(map(str, tile))
            rows += _worst(compiled, target, {"dtype": dtype, "V": v, "setting": setting})
    return rows


def adamw_table(targets: list[GPUTarget] = TARGETS, tiles=(None,)) -> list[dict]:
    """One row per target, tile and kernel of the optimizer, over all kinds of weights."""
    rows = []
    for target in targets:
        for tile in tiles:
            with captured(target) as compiled:
                launch_adamw(tile=tile)
            setting = tile and "/".join(map(str, tile))
            worst = _worst(compiled, target, {"dtype": "both", "V": None, "setting": setting})
            rows += [row for row in worst if tile is None or row["kernel"] == "adamw"]
    return rows


def decode_table(dtypes: list[str], targets: list[GPUTarget] = NVIDIA, models=MODELS) -> list[dict]:
    """One row per target, dtype and kernel of a decode step, over the models."""
    rows = []
    for target in targets:
        for dtype in dtypes:
            with captured(target) as compiled:
                launch_decode(DTYPES[dtype], models)
                launch_four_bit(DTYPES[dtype], models)
                if dtype != "fp32":  # in fp32, PyTorch computes linear layers
                    launch_decode_linear(DTYPES[dtype], target.arch)
            compiled = [(_decode_name(*each), each[1]) for each in compiled]
            rows += _worst(compiled, target, {"dtype": dtype, "V": None, "setting": None})
    return rows


def _decode_name(name: str, kernel) -> str:
    """Tell attention with norms of heads apart, which reads their weights, too."""
    if name != "attend":
        return name
    constants = {kernel.src.fn.arg_names[i] for i, *_ in kernel.src.constants}
    return name if "Q_NORM" in constants else f"{name} of normed heads"


def layers_table(
    dtypes: list[str], targets: list[GPUTarget] = TARGETS, layers=LAYERS
) -> list[dict]:
    """One row per target, dtype and kernel of a layer, over the layers."""
    rows = []
    for target in targets:
        for dtype in dtypes:
            with captured(target) as compiled:
                launch_layers(DTYPES[dtype], layers)
            labels = {"dtype": dtype, "V": None, "setting": None}
            named = [(f"layer {name}", kernel) for name, kernel in compiled]
            rows += _worst(named, target, labels)
    return rows


def _worst(compiled: list[tuple], target: GPUTarget, settings: dict) -> list[dict]:
    """One row per kernel, with the worst value of each figure over the kernel's variants."""
    worst: dict[str, dict] = {}
    size = 4 if settings["dtype"] == "fp32" else 2
    choose = {"registers": max, "spills": max, "shared": max, "short": max, "wide": min}
    for name, kernel in compiled:
        figures = examine(kernel, target)
        row = worst.setdefault(name, {**figures, "variants": 0})
        row["variants"] += 1
        row |= {key: worse(row[key], figures[key]) for key, worse in choose.items()}
        row["instructions"] = max(
            row.get("instructions") or 0, _instructions_per_element(name, kernel, figures)
        )
    label = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    rows = []
    for name, row in worst.items():
        fits = (
            row["spills"] == 0
            and row["shared"] <= SHARED_LIMIT[target.arch]
            and row["wide"] > 0
            and row["short"] <= MORE_SHORT_ACCESSES.get(name, SHORT_ACCESSES)
        )
        if settings["setting"] is None:
            fits &= row["instructions"] <= MOST_INSTRUCTIONS.get((name, size), math.inf)
        rows.append({"target": label, **settings, "kernel": name, **row, "fits": fits})
    return rows


def _instructions_per_element(name: str, kernel, figures: dict) -> float:
    """Instructions that a thread issues for each of its elements; 0 where they are not counted."""
    if name not in ELEMENTS or figures["total"] is None:
        return 0.0
    constants = {
        kernel.src.fn.arg_names[i]: value for (i, *_), value in kernel.src.constants.items()
    }
    elements = constants[ELEMENTS[name]] / (32 * kernel.metadata.num_warps)
    return round(figures["loop" if name == "logprobs" else "total"] / elements, 1)


def main() -> None:
    rows = loss_table(list(DTYPES), [151_936])
    for target in TARGETS:
        rows += variants_table("bf16", 151_936, target)
    rows += adamw_table() + adamw_table(NVIDIA, step_triton.ADAMW_VARIANTS[1:])
    rows += decode_table(list(DTYPES)) + layers_table(list(DTYPES))
    columns = ["target", "dtype", "kernel", "setting", "variants", "registers", "spills"]
    table = [
        [
            *("–" if row[column] is None else row[column] for column in columns),
            f"{row['shared']:.1f}",
            f"{row['wide']} / {row['short']}",
            row["instructions"] or "–",
            "yes" if row["fits"] else "NO",
        ]
        for row in rows
    ]
    columns += ["shared KB", "128/16-bit accesses", "instructions per element", "fits"]
    for cells in (columns, ["---"] * len(columns), *table):
        print(f"| {' | '.join(map(str, cells))} |")
    print(json.dumps({"benchmark": "compile_table", "triton": triton.__version__, "rows": rows}))
    sys.exit(not all(row["fits"] for row in rows))


if __name__ == "__main__":
    main()
