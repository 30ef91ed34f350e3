"""The LM head's GEMMs: logits chunk by chunk, and the gradients of hidden states, weight and bias.

The weight's gradient is summed over the chunks. Each chunk's share is computed in fp32 inside the
GEMM; what differs is the dtype of the sum. In fp32 it costs a second tensor of twice the size of a
16-bit gradient, which every chunk reads and writes, and a cast at the end. In the weight's 16 bits
it is rounded once a chunk. The errors stand at `EXACT_CHUNKS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .chunks import GemmTile, chunk_rows

EXACT_CHUNKS = 8
"""Chunks up to which the gradient of a 16-bit weight is summed in its own dtype.

Relative error of a bf16 gradient against fp64 (2-norm), of rows with advantages of both signs, as
tests/kernels/grpo/test_head.py measures it on a CPU: summed in fp32 and cast, 1.7e-3 over any
number of chunks; in bf16 2.4e-3 over 3, 2.9e-3 over 5, 3.5e-3 over 8, 4.6e-3 over 16 and 6.7e-3
over 64. Its projection on the exact gradient is off by less than 1e-4 in all of them: the sum loses
digits, but has no bias. Where many chunks add with one sign, though, a sum in bf16 stands still.
"""

SLICE_BYTES = 12 * 2**20
"""Bytes of dweight in fp32 that a CPU works on at a time where the weight has 16 bits."""


class NeedsGradient(NamedTuple):
    """Which inputs of the head need a gradient; a `bool[]` in an operator's schema."""

    hidden: bool
    weight: bool
    bias: bool


def head_rows(
    hidden: Tensor,
    weight: Tensor,
    needs: NeedsGradient,
    chunk_bytes: int,
    tile: GemmTile | None = None,
    logits: torch.dtype | None = None,
) -> int:
    """Return how many rows of logits to make at a time, of at most `chunk_bytes`.

    `logits` is their dtype; None: that of the hidden states.
    """
    return chunk_rows(
        hidden.device,
        len(hidden),
        *weight.shape,
        (logits or hidden.dtype).itemsize,
        chunk_bytes,
        trains_hidden=needs.hidden,
        trains_head=needs.weight,
        tile=tile,
    )


class Head:
    """An LM head applied to hidden rows (N, D), chunk by chunk, and its gradients.

    `weight` is (V, D), `bias` (V,) or None. Gradients that are not needed stay empty.

    - rows: how many rows of logits exist at a time, 1 … N; `head_rows` chooses them
    - fp32_accumulation: whether dweight of 16 bits is summed over chunks in fp32; None: over more
      than EXACT_CHUNKS
    - weight_grad: (V, D) tensor in the weight's dtype or in that of statistics, to which dweight is
      added; dweight itself then stays empty
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: NeedsGradient,
        rows: int,
        fp32_accumulation: bool | None = None,
        weight_grad: Tensor | None = None,
    ):
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.rows, self.weight_grad = rows, weight_grad
        self.dhidden = hidden.new_empty(hidden.shape if needs.hidden else 0)
        self.dbias, self.sum = weight.new_empty(0), weight.new_empty(0)
        if needs.weight:
            self._make_sum(fp32_accumulation)
        if needs.bias:
            self.dbias = self.dbias.new_zeros(len(weight), dtype=statistics_dtype(weight))

    def _make_sum(self, fp32_accumulation: bool | None) -> None:
        """Set the tensor that sums dweight, and whether the first chunk adds to it or fills it."""
        wide = statistics_dtype(self.weight)
        if fp32_accumulation is None:
            fp32_accumulation = sums_in_fp32(len(self.hidden), self.rows)
        # A single share is rounded once in any case.
        several = len(self.hidden) > self.rows
        dtype = wide if fp32_accumulation and several else self.weight.dtype
        buffer = self.weight_grad
        if buffer is not None and buffer.dtype in (wide, dtype):
            self.sum, self.adds = buffer, True
            return
        # The first chunk fills the sum, so that nothing need be cleared.
        make = self.sum.new_empty if len(self.hidden) else self.sum.new_zeros
        self.sum, self.adds = make(self.weight.shape, dtype=dtype), False

    def for_each_chunk(
        self, work: Callable[[slice, Tensor], None], dtype: torch.dtype | None = None
    ) -> None:
        """Call `work(rows, logits of those rows)` for one chunk after the other.

        The logits of all chunks lie in one buffer, which `work` may overwrite, but must not keep:
        it is freed on return, before dweight is cast or added to anything. They are rounded to
        `dtype`; None: that of the hidden states.
        """
        buffer = self.hidden.new_empty(self.rows, self.weight.shape[0], dtype=dtype)
        for start in range(0, len(self.hidden), self.rows):
            rows = slice(start, min(start + self.rows, len(self.hidden)))
            logits = buffer[: rows.stop - start]
            if logits.dtype != self.hidden.dtype:
                self._wide_logits(self.hidden[rows], logits)
            elif self.bias is None:
                torch.mm(self.hidden[rows], self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=logits)
            work(rows, logits)

    def _wide_logits(self, hidden: Tensor, logits: Tensor) -> None:
        """Fill `logits` (n, V), whose dtype is wider than that of `hidden` (n, D)."""
        if hidden.is_cuda:
            torch.mm(hidden, self.weight.T, out_dtype=logits.dtype, out=logits)
        else:  # whose GEMMs cannot have another dtype out than in
            hidden = hidden.to(logits.dtype)
            for part in vocabulary_slices(self.weight):
                logits[:, part] = hidden @ self.weight[part].to(logits.dtype).T
        if self.bias is not None:
            logits += self.bias

    def backward(self, rows: slice, dlogits: Tensor) -> None:
        """Add the gradients of a chunk, of which `dlogits` (n, V) are those of the logits."""
        if self.needs.hidden:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.needs.bias:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.needs.weight:
            self._add_to_dweight(dlogits, self.hidden[rows])
            self.adds = True

    def _add_to_dweight(self, dlogits: Tensor, hidden: Tensor) -> None:
        total, beta = self.sum, int(self.adds)
        if total.dtype == hidden.dtype and (hidden.is_cuda or hidden.element_size() > 2):
            torch.addmm(total, dlogits.T, hidden, beta=beta, out=total)
        elif hidden.is_cuda:
            torch.addmm(total, dlogits.T, hidden, beta=beta, out_dtype=total.dtype, out=total)
        else:
            self._add_by_slices(dlogits, hidden)

    def _add_by_slices(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add to a sum of any dtype in fp32, a slice of the vocabulary at a time.

        A CPU's GEMMs cannot have another dtype out than in, and without bf16 instructions they are
        several times faster in fp32.
        """
        hidden = hidden.to(statistics_dtype(hidden))
        for part in vocabulary_slices(self.weight):
            self._add_slice(self.sum[part], dlogits[:, part].T.to(hidden.dtype), hidden)

    def _add_slice(self, total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """Add dlogits (v, n) @ hidden (n, D) to `total` (v, D), which is rounded once."""
        exact = total.to(hidden.dtype)
        exact.addmm_(dlogits, hidden, beta=int(self.adds))
        if exact is not total:
            total.copy_(exact)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dhidden, dweight and dbias in the dtypes of their tensors."""
        dbias = self.dbias.to(self.bias.dtype) if self.needs.bias else self.dbias
        if self.weight_grad is None or not self.needs.weight:
            return self.dhidden, self.sum.to(self.weight.dtype), dbias
        if self.sum is not self.weight_grad:
            for part in vocabulary_slices(self.weight):
                self.weight_grad[part] += self.sum[part]
        return self.dhidden, self.weight.new_empty(0), dbias


def sums_in_fp32(num_rows: int, rows: int) -> bool:
    """Tell whether dweight of 16 bits is summed in fp32 by default, over chunks of `rows` rows."""
    return num_rows > EXACT_CHUNKS * rows


def slice_rows(width: int) -> int:
    """Return how many rows of dweight (V, width) a CPU works on at a time."""
    return max(1, SLICE_BYTES // (4 * width))


def vocabulary_slices(weight: Tensor) -> list[slice]:
    """Cut the rows of a (V, D) tensor into slices on a CPU, which computes in copies; else one."""
    vocabulary, width = weight.shape
    step = slice_rows(width) if weight.device.type == "cpu" else vocabulary
    return [slice(start, start + step) for start in range(0, vocabulary, step)]
