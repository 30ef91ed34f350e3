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
from decode_linear import launch_linear
from machine_code import captured, examine
from triton.backends.compiler import GPUTarget

from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.adamw.state import Scalars, State
from mr1_fast.kernels.decode import attention_triton, operations_triton
from mr1_fast.kernels.four_bit import dequantise_triton
from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.kernels.grpo import logprobs_triton, rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.layers import (
    gate_triton,
    norm_rotary_triton,
    norm_triton,
    rotary_triton,
)
from mr1_fast.kernels.layers.head_norms import HeadNorms

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
MODELS = (
    (12, 2, 1536, 8960, 151_936, False),
    (28, 4, 3584, 18_944, 152_064, False),
    (16, 8, 2048, 6144, 151_936, True),
    (32, 8, 2560, 9728, 151_936, True),
)
"""Heads, key heads, hidden size, MLP size and vocabulary, and whether heads are normed: Qwen2-VL 2B
and 7B, Qwen3-VL 2B and 4B."""
LAYERS = (
    (1536, 12, 2, 128, 8960, False),
    (3584, 28, 4, 128, 18_944, False),
    (2048, 16, 2, 128, 11_008, False),
    (1280, 16, 16, 80, 5120, False),
    (2048, 16, 8, 128, 6144, True),
    (2560, 32, 8, 128, 9728, True),
    (1024, 16, 16, 64, 4096, True),
    (1152, 16, 16, 72, 4304, True),
)
"""Hidden size, heads, key heads, channels of a head, MLP size, and whether it is Qwen3-VL's.

They are text of Qwen2-VL 2B and 7B and of Qwen2.5-VL 3B, and the vision tower of Qwen2-VL; then
text of Qwen3-VL 2B and 4B, and the vision towers of its 4B and 8B."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def launch_loss(
    dtype: torch.dtype,
    v: int,
    device: str = "meta",
    n: int = 65_536,
    tile: rows_triton.LossTile | None = None,
) -> None:
    """Launch the loss in every variant that compiles differently; with `tile` in one alone."""
    like = dict(device=device)
    logits = torch.empty(n, v, dtype=dtype, **like)
    targets = torch.empty(n, dtype=torch.int64, **like)
    rows = [torch.empty(n, **like) for _ in range(5)]
    scalar = torch.empty((), **like)
    results = RowResults.empty(logits)
    for surrogate in ("clip", "cispo", "sapo") if tile is None else ("clip",):
        objective = Objective(
            *rows[:2],
            scalar,
            scalar,
            *rows[2:],
            surrogate=surrogate,
            bias_corrected_kl=surrogate == "clip",
        )
        rows_triton.row_grpo(logits, targets, objective, results, logits, tile)


def launch_logprobs(
    dtype: torch.dtype, v: int, tile: logprobs_triton.LogprobsTile | None = None
) -> None:
    """Launch log-probabilities; without `tile` with their gradient, which has no settings."""
    logits = torch.empty(65_536, v, dtype=dtype, device="meta")
    rows = [torch.empty(len(logits), device="meta") for _ in range(3)]
    targets, scalar = rows[0].long(), torch.empty((), device="meta")
    statistics = rows_triton.row_logprobs(logits, targets, scalar, rows[0], tile)
    if tile is None:
        rows_triton.row_logprobs_backward(
            logits, targets, scalar, *statistics[1:], *rows[:2], logits
        )
        rows_triton.scale_(logits, scalar)


def launch_adamw(device: str = "meta", n: int = 151_936 * 1536, tile=None) -> None:
    """Launch the optimizer's kernels for each kind of weight; gradients have the weight's dtype."""
    like = dict(device=device)
    scalars, factor = Scalars.at(1, 1e-6, (0.9, 0.98), 1e-8, 0.01), torch.empty((), **like)
    added = torch.empty(n, dtype=torch.bfloat16, **like)
    for dtype, remainder in (
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float32, False),
    ):
        weight = torch.empty(n, dtype=dtype, **like)
        state = State.zeros(weight, remainder)
        step_triton.adamw_(weight, weight, state, scalars, (1, 2), factor, tile)
        step_triton.add_stochastic_(added, weight, (1, 2))


def launch_decode(dtype: torch.dtype, models=MODELS, device: str = "meta", rows: int = 64) -> None:
    """Launch a decode step's attention, of one row and of several, and its sampling."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for heads, kv_heads, _, _, v, is_normed in models:
        pool = empty(2**16, kv_heads, 128)
        norms = HeadNorms(empty(128), empty(128), 1e-6) if is_normed else None
        for n in (1, rows):
            q, new, angle = empty(n, heads, 128), empty(n, kv_heads, 128), empty(n, 128)
            spans = empty(n, 4, dtype=torch.int32)
            attention_triton.attend(q, new, new, angle, angle, pool, pool, spans, 0.09, norms)
        for temperature in (1.0, 0.0):
            uniform = empty(rows, dtype=torch.float32)
            operations_triton.sample(empty(rows, v), uniform, temperature, (151_655, 151_656))


def launch_decode_linear(dtype: torch.dtype, arch) -> None:
    """Launch the linear layers of decoding with the tiles for this target."""
    launch_linear(dtype, SHARED_LIMIT[arch] * 2**10, MULTIPROCESSORS[arch])


def launch_four_bit(dtype: torch.dtype, models=MODELS, device: str = "meta") -> None:
    """Dequantise the weights of queries, keys and values of each model, scales in 8 and 32 bits."""

    def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    for heads, kv_heads, d, *_ in models:
        lengths = [128 * heads, 128 * kv_heads, 128 * kv_heads]
        out = torch.empty(sum(lengths), d, dtype=dtype, device=device)
        fp32 = torch.float32
        nested = empty(256, fp32), empty(d, fp32), empty(1, fp32)[0], 256
        for scales, second in ((torch.uint8, nested), (fp32, ())):
            weights = [
                FourBitWeight(
                    empty(n * d // 2, torch.uint8),
                    empty(16, fp32),
                    empty(n * d // 64, scales),
                    (n, d),
                    64,
                    *second,
                )
                for n in lengths
            ]
            dequantise_triton.dequantise(weights, out)


def launch_layers(
    dtype: torch.dtype, layers=LAYERS, device: str = "meta", tokens: int = 6144
) -> None:
    """Launch the element-wise kernels of layers, forward and backward.

    A layer whose heads all have keys of their own is one of the vision tower, with LayerNorm, fp32
    angles, biases and a GELU. Text layers of Qwen3-VL norm heads and have no biases.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for hidden, heads, kv_heads, d, mlp, is_qwen3 in layers:
        is_vision = heads == kv_heads
        x, weight, up = empty(tokens, hidden), empty(hidden), empty(tokens, mlp)
        bias = weight if is_vision else None
        for update in (x, None):
            norm_triton.add_norm(x, update, weight, bias, 1e-6)
        norm_triton.norm_backward(x, None, x, weight, bias, 1e-6, False, False, 528)
        _, _, partial = norm_triton.norm_backward(x, x, x, weight, bias, 1e-6, True, True, 528)
        norm_triton.norm_gradients(partial, weight)
        width = (heads + 2 * kv_heads) * d
        cos = empty(tokens, d, dtype=torch.float32 if is_vision else dtype)
        qkv = empty(tokens, width)
        if is_qwen3 and not is_vision:
            normed = empty(d), empty(d), 1e-6, cos, cos
            q, k = norm_rotary_triton.norm_rotary(qkv, *normed, heads, kv_heads)
            for with_weights in (True, False):
                norm_rotary_triton.norm_rotary_backward(q, k, k, qkv, *normed, with_weights, 528)
        else:
            q, k, v = rotary_triton.rotary(qkv, empty(width), cos, cos, heads, kv_heads)
            rotary_triton.rotary_backward(q, k, v, cos, cos)
        if is_vision:
            kind = "tanh" if is_qwen3 else "quick"
            gate_triton.gelu(up, kind)
            gate_triton.gelu_backward(up, up, kind)
        else:
            gate_triton.silu_mul(empty(tokens, 2 * mlp), None)
            gate_triton.silu_mul_backward(up, empty(tokens, 2 * mlp), None)


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
