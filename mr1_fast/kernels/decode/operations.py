"""x"""

import math

import torch
from torch.nn.functional import silu

from ..dispatch import use_triton
from .reference import add_rms_norm_ref, attend_ref, sample_ref


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One layer's attention of R rows with a new token each: (R, H, d).

    Rotates q and k, writes the new token's key and value into the pool, attends over each row's two spans.

    q: (R, H, d); k, v: (R, Hkv, d), as projected; rows may lie apart, in one tensor of all three.
    cos, sin: (R, d) in the model's dtype.
    keys, values: (T, Hkv, d) this layer's pool of cached tokens, keys rotated; written in place.
    spans: (R, 4) int32 of prefix_start, prefix_len ≥ 0, own_start, own_len ≥ 1, in tokens of the pool. The new token is
    the last of a row's own and goes to own_start + own_len − 1, which no other row may read. They are not checked: that
    would wait for the GPU.
    """
    if use_triton(q):
        from . import operations_triton

        return operations_triton.attend(q, k, v, cos, sin, keys, values, spans, scale)
    if q.device.type == "cpu":
        from . import attention_native

        if attention_native.takes(q):
            return attention_native.attend(q, k, v, cos, sin, keys, values, spans, scale)
    return attend_ref(q, k, v, cos, sin, keys, values, spans, scale)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual x + delta, and its RMS norm times weight: (R, D) each. Without delta, the residual is x itself.

    x, delta: (R, D); weight: (D,), all of one dtype.
    """
    if use_triton(x):
        from . import operations_triton

        return operations_triton.add_rms_norm(x, delta, weight, eps)
    return add_rms_norm_ref(x, delta, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, (R, F) each; rows may lie apart, in one tensor of both."""
    if use_triton(gate):
        from . import operations_triton

        return operations_triton.silu_mul(gate, up)
    return silu(gate) * up


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, banned: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row: token (R,) int64 and its log-probability (R,) fp32.

    logits: (R, V), −inf for what a filter took out. uniform: (R,) fp32 in [0, 1). temperature: 0 takes the largest
    logit, the first of equals. banned: ids that are never drawn.

    The token is the first, in order of ids, at which the cumulative probability of tokens that are not banned exceeds
    uniform of their total. The log-probability counts all tokens, banned ones too, at the temperature (at 1 if that is
    0): what training computes. Token −1 and NaN: a row that has NaN or +inf, or no token to draw.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature {temperature}: a finite number ≥ 0 expected")
    if use_triton(logits):
        from . import operations_triton

        return operations_triton.sample(logits, uniform, temperature, banned)
    return sample_ref(logits, uniform, temperature, banned)
