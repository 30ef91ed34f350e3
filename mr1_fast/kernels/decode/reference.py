"""The operations of a decode step in PyTorch: their specification, and what runs on a CPU."""

import torch
from torch.nn.functional import linear, pad

from ..dispatch import statistics_dtype
from ..four_bit.reference import dequantise_ref
from ..four_bit.weight import FourBitWeight
from ..layers.head_norms import HeadNorms
from ..layers.reference import norm_ref, rotate
from .layer import Layer

WHOLE_ROW = 4096
"""Largest vocabulary for which the probabilities of a row are summed up in one go."""
BLOCK = 1024
"""Tokens of a block of a longer row: the block is drawn first, then a token of it."""


def attend_ref(
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
) -> torch.Tensor:
    """`operations.attend`, gathering every row's tokens to the length of the longest row, L."""
    if norms is not None:
        q, k = (norm_ref(x, w, None, norms.eps) for x, w in ((q, norms.q), (k, norms.k)))
    # Each (R, 1)
    prefix_start, prefix_len, own_start, own_len = spans.long().unsqueeze(-1).unbind(1)
    length = prefix_len + own_len
    new = own_start + own_len - 1
    keys[new.squeeze(1)] = rotate(k, cos, sin)
    values[new.squeeze(1)] = v

    index = torch.arange(int(length.max()), device=q.device)
    token = torch.where(index < prefix_len, prefix_start, own_start - prefix_len) + index
    inside = index < length
    token = torch.where(inside, token, new)  # masked below, but never memory that was not written

    dtype = statistics_dtype(q)
    # Each (R, Hkv, L, d)
    gathered_keys, gathered_values = (x[token].transpose(1, 2).to(dtype) for x in (keys, values))
    q = rotate(q, cos, sin).to(dtype).unflatten(1, (k.shape[1], -1))  # (R, Hkv, H/Hkv, d)
    scores = (q @ gathered_keys.mT).mul_(scale).masked_fill_(~inside[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ gathered_values).flatten(1, 2).to(v.dtype)


def linear_ref(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Apply a linear layer to x (R, D): (R, N)."""
    weight = layer.weight
    if isinstance(weight, FourBitWeight):
        weight = dequantise_ref(weight, x.dtype)
    y = linear(x, weight, layer.bias)
    if layer.adapter is None:
        return y
    a, b, scale = layer.adapter.a.to(x.dtype), layer.adapter.b.to(x.dtype), layer.adapter.scale
    return torch.addmm(y, (x @ a.T).mul_(scale), b.T)


def sample_ref(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.sample`, in few calls, which are its cost on a CPU with a small vocabulary."""
    scale = temperature or 1.0
    ids = torch.tensor(banned, dtype=torch.int64, device=logits.device)
    x = logits.to(statistics_dtype(logits), copy=True)
    banned_x = x[:, ids]
    x.index_fill_(1, ids, -torch.inf)

    # The largest logit that may be drawn: beside a larger banned one, all probabilities could
    # vanish.
    peak = x.amax(-1, keepdim=True)
    greedy = x.argmax(-1, keepdim=True) if temperature == 0 else None
    p = x.sub_(peak).div_(scale).exp_()
    token = _draw_token(p, uniform.unsqueeze(1)) if greedy is None else greedy

    log_weights = torch.cat([p.sum(-1, keepdim=True).log_(), (banned_x - peak).div_(scale)], dim=1)
    logp = (logits.gather(1, token) - peak).div_(scale).squeeze(1) - log_weights.logsumexp(-1)
    sound = logp.isfinite()  # not so with NaN, with +inf, and without a token to draw
    return torch.where(sound, token.squeeze(1), -1), torch.where(sound, logp, torch.nan).float()


def _draw_token(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw a token (R, 1) with probability proportional to p (R, V), by `uniform` (R, 1)."""
    v = p.shape[1]
    if v <= WHOLE_ROW:
        token, _ = _invert_cdf(p, uniform)
        return token

    blocks = pad(p, (0, -v % BLOCK)).unflatten(1, (-1, BLOCK))
    block, fraction = _invert_cdf(blocks.sum(-1), uniform)
    chosen = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    inside, _ = _invert_cdf(chosen, fraction)
    return (block * BLOCK + inside).clamp_(max=v - 1)


def _invert_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the first of weights (R, n) at which their cumulative sum exceeds uniform · total.

    Returns its index (R, 1), and which fraction (R, 1) of that weight lies below the threshold.

    Rounding could make the threshold reach the total, and the answer would be the first weight at
    which the sum is complete; so the threshold stays below. On a CPU, PyTorch adds one weight after
    the other, so that a weight of 0 is never the answer.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    before = cumulative.gather(1, index) - weight
    return index, ((threshold - before) / weight).clamp_(min=0)
