"""Which tokens of a pack attend to which: segments of queries, each with the keys that it sees.

In a group, the prompt is one segment and every completion is another. A completion's keys are the
prompt's and then its own. Keys and values are gathered in this order, a prompt's once for each of
its completions. One call of attention for variable lengths, causal and aligned at the end, is then
exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


class Gather:
    """The function `x[rows]` of x (R, …), in which a row may be taken many times.

    A row's gradient is summed in fp32 and in a fixed order. That of index_select would be summed by
    atomic additions in the dtype of x.
    """

    def __init__(self, rows: Tensor, num_rows: int):
        self.rows, self.num_rows = rows, num_rows

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (R, …) to its rows (len(rows), …)."""
        return _Gather.apply(x, self)

    @cached_property
    def by_source(self) -> tuple[Tensor, Tensor]:
        """Which positions of the result take each row of x.

        Returns the positions, ordered by the row that they take, and where each row's positions
        start, (R+1,).
        """
        ordered, order = self.rows.sort(stable=True)
        bounds = torch.arange(self.num_rows + 1, device=ordered.device)
        return order, torch.searchsorted(ordered, bounds)


class _Gather(torch.autograd.Function):
    """`Gather` with its own backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if not len(gradient):
            return gradient.new_zeros(ctx.gather.num_rows, *gradient.shape[1:]), None
        # embedding_bag sums the gradients of all positions that took a row, in order.
        order, starts = ctx.gather.by_source
        flat = gradient.reshape(len(gradient), -1)
        total = torch.nn.functional.embedding_bag(
            order, flat, starts, mode="sum", include_last_offset=True
        )
        return total.reshape(-1, *gradient.shape[1:]), None


@dataclass
class Segments:
    """The A segments of queries of a pack, end to end over T packed tokens, with their K keys.

    For a prompt with 3 input tokens and completions with 2 and 1 input tokens: cu_seqlens_q = 0 3 5
    6, cu_seqlens_k = 0 3 8 12, key_rows = 0 1 2 | 0 1 2 3 4 | 0 1 2 5.
    """

    cu_seqlens_q: Tensor
    """(A+1,) int32: segment a has the packed tokens cu_seqlens_q[a] … cu_seqlens_q[a+1]."""
    cu_seqlens_k: Tensor
    """(A+1,) int32: segment a has the keys cu_seqlens_k[a] … cu_seqlens_k[a+1]."""
    key_rows: Tensor
    """(K,) int64: the packed token of each key; a segment's own tokens are its last keys."""
    max_q: int
    """The number of queries of the segment that has the most."""
    max_k: int
    """The number of keys of the segment that has the most."""
    num_tokens: int
    """T, the number of packed tokens."""

    @classmethod
    def build(cls, rows: list[tuple[Tensor, int]]) -> Segments:
        """Build from each segment's (key rows, number of queries), in packed order."""
        keys = [len(key_rows) for key_rows, _ in rows]
        queries = [count for _, count in rows]
        return cls(
            cu_seqlens_q=cumulative(queries),
            cu_seqlens_k=cumulative(keys),
            key_rows=torch.cat([key_rows for key_rows, _ in rows]),
            max_q=max(queries),
            max_k=max(keys),
            num_tokens=sum(queries),
        )

    def to(self, device: torch.device | str) -> Segments:
        """Return the same segments with their tensors on `device`."""
        return Segments(
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            cu_seqlens_k=self.cu_seqlens_k.to(device, non_blocking=True),
            key_rows=self.key_rows.to(device, non_blocking=True),
            max_q=self.max_q,
            max_k=self.max_k,
            num_tokens=self.num_tokens,
        )

    @cached_property
    def keys(self) -> Gather:
        """Gathers the K keys (or values) from those of the T packed tokens."""
        return Gather(self.key_rows, self.num_tokens)

    @cached_property
    def padded(self) -> Padded:
        """The same segments padded to rectangles, for attention that knows no variable lengths."""
        return Padded(self)


@dataclass
class Rectangle:
    """S segments, padded on the right to Lq queries and Lk keys each."""

    queries: Gather
    """Gathers the S·Lq padded queries from the packed tokens."""
    keys: Gather
    """Gathers the S·Lk padded keys from the packed tokens."""
    shape: tuple[int, int, int]
    """(S, Lq, Lk)."""
    visible: Tensor | None
    """(S, 1, Lq, Lk) bool: which keys a query sees.

    It is None if queries and keys are the same tokens, for which plain causal attention is right.
    """
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)
    """The masks that `mask` has made, by dtype."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return the mask that is added to scores, or None; made once for all layers."""
        if self.visible is not None and dtype not in self.masks:
            mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self.masks[dtype] = mask.masked_fill_(~self.visible, -torch.inf)
        return self.masks.get(dtype)


class Padded:
    """Segments as at most two rectangles: prompts, which see only themselves, and completions."""

    def __init__(self, segments: Segments):
        starts_q, starts_k = segments.cu_seqlens_q[:-1].long(), segments.cu_seqlens_k[:-1].long()
        lengths_q = segments.cu_seqlens_q.diff().long()
        lengths_k = segments.cu_seqlens_k.diff().long()
        alone = lengths_q == lengths_k
        num_tokens = segments.num_tokens

        # Where each packed token is among the padded queries of all rectangles.
        position = torch.zeros(num_tokens, dtype=torch.int64, device=segments.key_rows.device)
        filled = 0
        self.rectangles = []
        for chosen in (alone, ~alone):
            if not chosen.any():
                continue
            lq, lk = lengths_q[chosen, None], lengths_k[chosen, None]
            q = torch.arange(int(lq.max()), device=lq.device)
            k = torch.arange(int(lk.max()), device=lk.device)
            rows_q = starts_q[chosen, None] + torch.where(q < lq, q, 0)
            rows_k = segments.key_rows[starts_k[chosen, None] + torch.where(k < lk, k, 0)]

            visible = None
            if chosen is not alone:
                # The i-th query is key lk − lq + i; the keys behind it are its future, or padding.
                last_key = lk - lq + torch.minimum(q, lq - 1)
                visible = (k <= last_key[:, :, None])[:, None]
            self.rectangles.append(
                Rectangle(
                    queries=Gather(rows_q.flatten(), num_tokens),
                    keys=Gather(rows_k.flatten(), num_tokens),
                    shape=(len(lq), len(q), len(k)),
                    visible=visible,
                )
            )

            slots = filled + torch.arange(rows_q.numel(), device=lq.device).view_as(rows_q)
            position[rows_q[q < lq]] = slots[q < lq]
            filled += rows_q.numel()
        self.unpad = Gather(position, filled)
        """Gathers the packed tokens from the padded queries, one rectangle after the other."""


def cumulative(lengths: list[int]) -> Tensor:
    """Return 0 and the running sums of S lengths, (S+1,) int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
