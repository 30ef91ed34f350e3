"""The public operations of a decode step: which back end takes a call, by device and dtype."""

import math
from collections.abc import Sequence

import torch

from ..dispatch import use_triton
from ..layers.head_norms import HeadNorms
from ..layers.operations import add_norm, norm
from ..overlap import decode_overlap
from . import attention_native, sample_native
from .reference import attend_ref, sample_ref


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
    norms: HeadNorms | None = None,
    upcoming: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Compute one layer's attention of R rows with one new token each: (R, H, d).

    Norms and rotates q and k, writes the new tokens' keys and values into the pool, and attends
    from each row's new token over its two spans.

    q: (R, H, d); k, v: (R, Hkv, d), as projected; rows may lie apart, in one tensor of all three.
    cos, sin: (R, d) in the model's dtype.
    keys, values: (T, Hkv, d), this layer's pool of cached tokens, keys normed and rotated; written
    in place.
    spans: (R, 4) int32 of prefix_start, prefix_len ≥ 0, own_start, own_len ≥ 1, in tokens of the
    pool. The new token is the last of a row's own and goes to own_start + own_len − 1, which no
    other row may read. Spans are not checked, since that would wait for the GPU.
    scale: what the products of queries and keys are multiplied with.
    norms: of each head of q and k; None for a model without.
    upcoming: weights that the next kernels read, which a GPU may prefetch.
    """
    arguments = q, k, v, cos, sin, keys, values, spans, scale, norms
    if use_triton(q):
        from . import attention_triton

        return attention_triton.attend(*arguments, upcoming)
    if attention_native.takes(q):
        return attention_native.attend(*arguments)
    return attend_ref(*arguments)


def add_rms_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    upcoming: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the residual x + update, and its RMS norm times weight: (R, D) each.

    This is the operation of kernels/layers, but for what follows.

    update: (R, D); or parts (S, R, D) of it in fp32, which are added up in order and rounded first;
    or None: then the residual is x itself.
    upcoming: weights that the next kernels read, which a GPU may prefetch.
    """
    if use_triton(x):
        from ..layers import norm_triton

        return norm_triton.add_norm(
            x, update, weight, None, eps, upcoming, decode_overlap(x.device)
        )
    if update is None:
        return x, norm(x, weight, None, eps)
    return add_norm(x, update if update.ndim == 2 else update.sum(0).to(x.dtype), weight, None, eps)


def attention_backend(like: torch.Tensor) -> str:
    """Name what computes `attend` for queries of the dtype and device of `like`."""
    if use_triton(like):
        return "Triton"
    heads = like.new_empty(1, 1, 64)
    return "native" if attention_native.takes(heads) else "PyTorch"


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, banned: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row: tokens (R,) int64 and their log-probabilities (R,) fp32.

    logits: (R, V), −inf for what a filter took out.
    uniform: (R,) fp32 in [0, 1).
    temperature: divides the logits; 0 takes the largest logit, the first of equals.
    banned: ids that are never drawn.

    The token is the first, in order of ids, at which the cumulative probability of the tokens that
    are not banned exceeds `uniform` of their total. The log-probability is what training computes:
    over all tokens, banned ones too, at the temperature (at 1 where that is 0). A row that has NaN
    or +inf, or no token to draw, gives token −1 and NaN.

    Raises ValueError for a temperature that is negative or not finite.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, but must be finite and ≥ 0")
    if use_triton(logits):
        from . import operations_triton

        return operations_triton.sample(logits, uniform, temperature, banned)
    if sample_native.takes(logits, uniform):
        return sample_native.sample(logits, uniform, temperature, banned)
    return sample_ref(logits, uniform, temperature, banned)
