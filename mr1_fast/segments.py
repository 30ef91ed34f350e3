"""Who attends to whom in a pack: segments of queries, each with the rows whose keys and values it sees.

Of a group, the prompt is one segment and every completion another, whose keys are the prompt's and then its own. Rows
of keys are gathered, so that one call of variable-length attention, causal and aligned at the end, is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


class Gather:
    """`x[rows]` of x (R, …): one row may be taken many times.

    The gradient of a row is summed in fp32 and in a fixed order; index_select's own would add by atomics in x's dtype.
    """

    def __init__(self, rows: Tensor, num_rows: int):
        self.rows, self.num_rows = rows, num_rows

    def __call__(self, x: Tensor) -> Tensor:
        """(R, …) -> (len(rows), …)."""
        return _Gather.apply(x, self)

    @cached_property
    def by_source(self) -> tuple[Tensor, Tensor]:
        """Positions in `rows` ordered by what they take, and where each source row's positions start, (R+1,)."""
        ordered, order = self.rows.sort(stable=True)
        return order, torch.searchsorted(
            ordered, torch.arange(self.num_rows + 1, device=ordered.device)
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if not len(gradient):
            return gradient.new_zeros(ctx.gather.num_rows, *gradient.shape[1:]), None
        order, starts = ctx.gather.by_source
        flat = gradient.reshape(len(gradient), -1)
        total = torch.nn.functional.embedding_bag(
            order, flat, starts, mode="sum", include_last_offset=True
        )
        return total.reshape(-1, *gradient.shape[1:]), None


@dataclass
class Segments:
    """A segments of queries over T packed tokens, end to end; the a-th sees the keys cu_seqlens_k[a] … [a+1].

    A prompt of 3 tokens and completions of 2 and 1 tokens: cu_seqlens_q = 0 3 5 6, cu_seqlens_k = 0 3 8 12,
    key_rows = 0 1 2 | 0 1 2 3 4 | 0 1 2 5.
    """

    cu_seqlens_q: Tensor
    """(A+1,) int32."""
    cu_seqlens_k: Tensor
    """(A+1,) int32."""
    key_rows: Tensor
    """(K,) int64: the packed token of each key; a segment's own tokens are its last keys."""
    max_q: int
    """The longest segment, in queries."""
    max_k: int
    """The longest segment, in keys."""
    num_tokens: int
    """T."""

    @classmethod
    def build(cls, rows: list[tuple[Tensor, int]]) -> Segments:
        """From (key rows, number of queries) of each segment, in packed order."""
        keys, queries = [len(keys) for keys, _ in rows], [count for _, count in rows]
        bounds = cumulative(queries), cumulative(keys)
        return cls(
            *bounds, torch.cat([keys for keys, _ in rows]), max(queries), max(keys), sum(queries)
        )

    def to(self, device: torch.device | str) -> Segments:
        """The same on `device`."""
        tensors = (
            x.to(device, non_blocking=True)
            for x in (self.cu_seqlens_q, self.cu_seqlens_k, self.key_rows)
        )
        return Segments(*tensors, self.max_q, self.max_k, self.num_tokens)

    @cached_property
    def keys(self) -> Gather:
        """From packed tokens to keys."""
        return Gather(self.key_rows, self.num_tokens)

    @cached_property
    def padded(self) -> Padded:
        """The same as rectangles, for attention that knows no variable lengths."""
        return Padded(self)


@dataclass
class Rectangle:
    """Segments of one kind padded on the right to (S, Lq) queries and (S, Lk) keys."""

    queries: Gather
    """From packed tokens to S·Lq padded ones."""
    keys: Gather
    """From packed tokens to S·Lk padded ones."""
    shape: tuple[int, int, int]
    """(S, Lq, Lk)."""
    visible: Tensor | None
    """(S, 1, Lq, Lk) bool; None where queries and keys are the same tokens, so that plain causal attention will do."""
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """`visible` as what is added to scores; every layer uses the same."""
        if self.visible is not None and dtype not in self.masks:
            self.masks[dtype] = torch.zeros(
                self.visible.shape, dtype=dtype, device=self.visible.device
            ).masked_fill_(~self.visible, -torch.inf)
        return self.masks.get(dtype)


class Padded:
    """Segments as at most two rectangles: those that see only themselves (prompts), and those with a prefix."""

    def __init__(self, segments: Segments):
        starts_q, starts_k = segments.cu_seqlens_q[:-1].long(), segments.cu_seqlens_k[:-1].long()
        lengths_q, lengths_k = (
            segments.cu_seqlens_q.diff().long(),
            segments.cu_seqlens_k.diff().long(),
        )
        alone = lengths_q == lengths_k
        num_tokens = segments.num_tokens
        position = torch.zeros(num_tokens, dtype=torch.int64, device=segments.key_rows.device)
        self.rectangles, filled = [], 0
        for chosen in (alone, ~alone):
            if not chosen.any():
                continue
            lq, lk = lengths_q[chosen, None], lengths_k[chosen, None]
            q = torch.arange(int(lq.max()), device=lq.device)
            k = torch.arange(int(lk.max()), device=lk.device)
            rows_q = starts_q[chosen, None] + torch.where(q < lq, q, 0)
            rows_k = segments.key_rows[starts_k[chosen, None] + torch.where(k < lk, k, 0)]
            visible = None
            if (
                chosen is not alone
            ):  # the i-th query is key lk − lq + i; keys behind it are its future, or padding
                visible = (k <= (lk - lq + torch.minimum(q, lq - 1))[:, :, None])[:, None]
            gathers = (Gather(rows.flatten(), num_tokens) for rows in (rows_q, rows_k))
            self.rectangles.append(Rectangle(*gathers, (len(lq), len(q), len(k)), visible))
            slots = filled + torch.arange(rows_q.numel(), device=lq.device).view_as(rows_q)
            position[rows_q[q < lq]] = slots[q < lq]
            filled += rows_q.numel()
        self.unpad = Gather(position, filled)
        """From the rectangles' queries, one after the other, to packed tokens."""


def cumulative(lengths: list[int]) -> Tensor:
    """(S+1,) int32: 0 and the running sums."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
