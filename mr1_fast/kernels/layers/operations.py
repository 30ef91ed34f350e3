"""The public operations of layers: which back end takes a call, by device and dtype."""

from functools import lru_cache

import torch

from ..dispatch import use_triton
from . import layers_native, reference

COLUMNS_PER_MULTIPROCESSOR = 8192
"""Columns of all rows that a multiprocessor works on at a time in the backward of a norm."""
MOST_PARTS_PER_MULTIPROCESSOR = 16
HEAD_COLUMNS = 2048
"""Columns of all heads that a program works on at a time in the backward of their norms."""
GELUS = ("quick", "tanh")
"""Approximations of GELU: x · sigmoid(1.702 x), and the one by a hyperbolic tangent."""
INTERPRETED_PARTS = 3
"""Parts under Triton's interpreter: few, so that a program goes through several rows."""


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Compute the norm of each row of x (T, D), times weight (D,): (T, D).

    Without a bias it is the RMS norm, r = x / √(mean x² + ε), rounded to the dtype of x before it
    is multiplied with the weight, as in transformers. With a bias (D,) it is LayerNorm, rounded
    once. All tensors have one dtype.
    """
    if use_triton(x):
        from . import norm_triton

        return norm_triton.add_norm(x, None, weight, bias, eps)[1]
    if bias is None and layers_native.takes(x, weight):
        return layers_native.norm(x, weight, eps)
    return reference.norm_ref(x, weight, bias, eps)


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the residual x + update, rounded to its dtype, and its `norm`: (T, D) each."""
    if use_triton(x):
        from . import norm_triton

        return norm_triton.add_norm(x, update, weight, bias, eps)
    if bias is None and layers_native.takes(x, weight) and update.dtype is x.dtype:
        return layers_native.add_norm(x, update, weight, eps)
    return reference.add_norm_ref(x, update, weight, bias, eps)


def norm_backward(
    dnormed: torch.Tensor,
    dresidual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    with_normed: bool,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradient by the rows x (T, D) that were normed, and by the weights.

    dnormed: (T, D), the gradient by the normed rows.
    dresidual: (T, D) or None, the gradient that reaches x past the norm: it is added to dx before
    dx is rounded.

    Returns dx (T, D); the normed rows (T, D), computed again, if `with_normed`; and the sums over
    rows that give dweight, and dbias where there is a bias, if `with_weights`: (parts, 1 or 2, D)
    in fp32 (fp64 for fp64), whose parts the caller adds up. What is not wanted has shape (0,).
    """
    inputs = dnormed, dresidual, x, weight, bias, eps, with_normed, with_weights
    if use_triton(x):
        from . import norm_triton

        return norm_triton.norm_backward(*inputs, sum_parts(x))
    return reference.norm_backward_ref(*inputs)


def norm_gradients(partial: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add up the parts (parts, 1 or 2, D) that `norm_backward` gives: (1 or 2, D).

    The first row is the gradient by the weight, the second that by the bias, in the dtype of
    `weight` (D,).
    """
    if use_triton(weight):
        from . import norm_triton

        return norm_triton.norm_gradients(partial, weight)
    return partial.sum(0).to(weight.dtype)


def sum_parts(x: torch.Tensor) -> int:
    """Return in how many parts `norm_backward` gives the sums over the rows of x.

    It is a constant of the device and the width, so that the same rows give the same bits. Meta
    tensors have one part, though they may stand for a GPU's: there, the parts are a few MB.
    """
    return _parts(x, int(x.shape[1]))


def head_sum_parts(qkv: torch.Tensor) -> int:
    """Return in how many parts `norm_rotary_backward` gives its sums, as `sum_parts` does."""
    return _parts(qkv, HEAD_COLUMNS)


def _parts(x: torch.Tensor, columns: int) -> int:
    """Return the programs on the device of x that hold so many columns at a time."""
    if not use_triton(x):
        return 1
    if not x.is_cuda:
        return INTERPRETED_PARTS
    padded = 1 << (columns - 1).bit_length()
    parts = max(1, COLUMNS_PER_MULTIPROCESSOR // padded)
    return _multiprocessors(x.device) * min(parts, MOST_PARTS_PER_MULTIPROCESSOR)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def rotary(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the bias, and rotate queries and keys by their positions' angles.

    qkv: (T, (H + 2K)·d), heads of queries, then of keys, then of values; rows may lie apart.
    bias: ((H + 2K)·d,) or None, added first, which rounds to the dtype of qkv.
    cos, sin: (T, d). Sections of M-RoPE and the two dimensions of the vision tower are already in
    them. Products are rounded to their dtype, as in transformers, whose vision tower rotates in
    fp32 whatever the model's dtype; the results are rounded to the dtype of qkv.
    heads, kv_heads: H and K.

    Returns the rotated queries (T, H, d) and keys (T, K, d), and the values (T, K, d).
    """
    if use_triton(qkv):
        from . import rotary_triton

        return rotary_triton.rotary(qkv, bias, cos, sin, heads, kv_heads)
    return reference.rotary_ref(qkv, bias, cos, sin, heads, kv_heads)


def rotary_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient by qkv, (T, (H + 2K)·d), which is that by the sum with the bias, too.

    dq: (T, H, d); dk, dv: (T, K, d); only the channels of a head must be adjacent.
    """
    if use_triton(dq):
        from . import rotary_triton

        return rotary_triton.rotary_backward(dq, dk, dv, cos, sin)
    return reference.rotary_backward_ref(dq, dk, dv, cos, sin)


def norm_rotary(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the RMS `norm` of each head of queries and keys, and rotate it.

    qkv: (T, (H + 2K)·d), heads of queries, then of keys, then of values; rows may lie apart.
    q_weight, k_weight: (d,), of the dtype of qkv, which multiply each normed query and key.
    cos, sin, heads, kv_heads: as in `rotary`.

    Returns the queries (T, H, d) and the keys (T, K, d). Values stay in qkv, which the gradient
    needs anyway.
    """
    inputs = qkv, q_weight, k_weight, eps, cos, sin, heads, kv_heads
    if use_triton(qkv):
        from . import norm_rotary_triton

        return norm_rotary_triton.norm_rotary(*inputs)
    return reference.norm_rotary_ref(*inputs)


def norm_rotary_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient by qkv, (T, (H + 2K)·d), and by the weights of the norms.

    dq, dk, dv: as in `rotary_backward`; dv, the gradient by the values, is copied.

    Also returns the sums over heads that give the gradients by q_weight and by k_weight, if
    `with_weights`: (parts, 2, d) in fp32 (fp64 for fp64), for `norm_gradients` to add up; else
    they have shape (0,).
    """
    inputs = dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, with_weights
    if use_triton(qkv):
        from . import norm_rotary_triton

        return norm_rotary_triton.norm_rotary_backward(*inputs, head_sum_parts(qkv))
    return reference.norm_rotary_backward_ref(*inputs)


def silu_mul(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute silu(gate) · up, (T, F), of gate_up (T, 2F), which has the gates first.

    bias: (2F,) or None, added first, which rounds to the dtype of gate_up.
    """
    if use_triton(gate_up):
        from . import gate_triton

        return gate_triton.silu_mul(gate_up, bias)
    if layers_native.takes(gate_up, bias):
        return layers_native.silu_mul(gate_up, bias)
    return reference.silu_mul_ref(gate_up, bias)


def silu_mul_backward(
    dout: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient by gate_up (T, 2F), and once more the output (T, F).

    dout: (T, F), the gradient by the output.
    """
    if use_triton(gate_up):
        from . import gate_triton

        return gate_triton.silu_mul_backward(dout, gate_up, bias)
    dgate_up, out = reference.silu_mul_backward_ref(dout, gate_up, bias)
    if layers_native.takes(gate_up, bias):  # so that the output has the bits of the forward
        out = layers_native.silu_mul(gate_up, bias)
    return dgate_up, out


def gelu(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Compute an approximation of GELU, (T, F), with the roundings of transformers.

    kind: one of GELUS. "quick" is x · sigmoid(1.702 x), whose two factors are rounded; "tanh" is
    x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), rounded once. Raises ValueError for another one.
    """
    _check_gelu(kind)
    if use_triton(x):
        from . import gate_triton

        return gate_triton.gelu(x, kind)
    return reference.gelu_ref(x, kind)


def gelu_backward(
    dout: torch.Tensor, x: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of `gelu` by x (T, F), and once more the output (T, F)."""
    _check_gelu(kind)
    if use_triton(x):
        from . import gate_triton

        return gate_triton.gelu_backward(dout, x, kind)
    return reference.gelu_backward_ref(dout, x, kind)


def _check_gelu(kind: str) -> None:
    """Raise ValueError for a kind of GELU that is not known."""
    if kind not in GELUS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(GELUS)}")
