"""x"""

import torch
from torch.nn.functional import pad

from ..dispatch import statistics_dtype

WHOLE_ROW = 4096
"""Up to so many tokens, a row's probabilities are summed up in one go."""


BLOCK = 1024
"""Tokens of a block of a longer row: the block is drawn first, then a token in it."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (R, H, d) by cos, sin (R, d): transformers' `apply_rotary_pos_emb`, with its roundings."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)


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
) -> torch.Tensor:
    """`attend`, with every row's tokens gathered to the length of the longest."""
    prefix_start, prefix_len, own_start, own_len = (
        spans.long().unsqueeze(-1).unbind(1)
    )  # (R, 1) each
    length = prefix_len + own_len
    new = own_start + own_len - 1
    keys[new.squeeze(1)] = rotate(k, cos, sin)
    values[new.squeeze(1)] = v

    index = torch.arange(int(length.max()), device=q.device)
    token = torch.where(index < prefix_len, prefix_start, own_start - prefix_len) + index
    inside = index < length
    token = torch.where(inside, token, new)  # rather than memory that nobody has written
    dtype = statistics_dtype(q)
    gathered_keys, gathered_values = (
        x[token].transpose(1, 2).to(dtype) for x in (keys, values)
    )  # (R, Hkv, L, d)
    q = rotate(q, cos, sin).to(dtype).unflatten(1, (k.shape[1], -1))  # (R, Hkv, H/Hkv, d)
    scores = (q @ gathered_keys.mT).mul_(scale).masked_fill_(~inside[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ gathered_values).flatten(1, 2).to(v.dtype)


def add_rms_norm_ref(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` as transformers' Qwen2RMSNorm computes it."""
    residual = x if delta is None else x + delta
    r = residual.to(statistics_dtype(x))
    return residual, weight * (r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def sample_ref(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample`: few PyTorch calls, as on a CPU with a small vocabulary they are what a step costs."""
    v = logits.shape[1]
    scale = temperature or 1.0
    ids = torch.tensor(banned, dtype=torch.int64, device=logits.device)
    x = logits.to(statistics_dtype(logits), copy=True)
    banned_x = x[:, ids]
    x.index_fill_(1, ids, -torch.inf)
    peak = x.amax(
        -1, keepdim=True
    )  # of what may be drawn: its probabilities do not vanish beside a banned token's
    token = x.argmax(-1, keepdim=True) if temperature == 0 else None
    p = x.sub_(peak).div_(scale).exp_()
    if token is None and v <= WHOLE_ROW:
        token, _ = _draw(p, uniform.unsqueeze(1))
    elif token is None:
        blocks = pad(p, (0, -v % BLOCK)).unflatten(1, (-1, BLOCK))
        block, fraction = _draw(blocks.sum(-1), uniform.unsqueeze(1))
        inside, _ = _draw(
            blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1), fraction
        )
        token = (block * BLOCK + inside).clamp_(max=v - 1)
    log_weights = torch.cat([p.sum(-1, keepdim=True).log_(), (banned_x - peak).div_(scale)], dim=1)
    logp = (logits.gather(1, token) - peak).div_(scale).squeeze(1) - log_weights.logsumexp(-1)
    sound = logp.isfinite()  # NaN, inf and a row without a token to draw all end up in it
    return torch.where(sound, token.squeeze(1), -1), torch.where(sound, logp, torch.nan).float()


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (R, 1) of the first of weights (R, n) whose cumulative sum exceeds uniform·total, and where in that weight.

    The threshold stays below the total, which rounding could make it reach: then it would be the first weight at which
    the sum is complete. PyTorch sums up one after the other on a CPU, so a weight of 0 is never the first.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    before = cumulative.gather(1, index) - weight
    return index, ((threshold - before) / weight).clamp_(min=0)
