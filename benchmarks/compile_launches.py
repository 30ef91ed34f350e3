"""Launches of every Triton kernel without numbers, of real sizes, which compile it.

They take meta tensors as they take a GPU's.
"""

import torch

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
