"""The operators on hidden states: the LM head and the loss in one, without a tensor of all logits.

Logits exist for a chunk of rows at a time, in one buffer that is used again. For each chunk there
is a GEMM into the buffer; the row operation, which puts dlogits in the place of the logits; a GEMM
for dhidden; and a GEMM that adds to dweight. These are three GEMMs in all, of 2·N·D·V FLOP each; a
loss that is not known in the forward needs a fourth, to make the logits again. A frozen head has no
dweight and no third GEMM. Nothing synchronises, so the operators can be captured in a CUDA graph.

Memory beside inputs and gradients: the buffer (`chunk_bytes`), and, for a 16-bit trainable head
over more than one chunk, the fp32 accumulator of dweight, as rounding each chunk's share to 16 bits
would bias the sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .objective import OBJECTIVE_SCHEMA, GRPOLoss, Objective, RowResults
from .operators import (
    RESULTS_SCHEMA,
    fake_logprobs,
    fake_results,
    incoming,
    input_gradients,
    scaled,
    summed,
)
from .rows import row_grpo, row_logprobs, row_logprobs_backward

CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 48 * 2**20}
"""Default size of the logits buffer; a CPU needs fewer rows to keep a GEMM busy."""

SLICE = 8192
"""Vocabulary rows that a CPU casts to fp32 at a time while it accumulates dweight."""


def rows_per_chunk(num_rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Return how many rows of logits exist at a time: as many as `chunk_bytes` hold.

    They are a multiple of 128 where that is possible, at least 1 and at most `num_rows`. A row has
    `vocabulary` logits of `itemsize` bytes.
    """
    rows = max(1, chunk_bytes // (vocabulary * itemsize))
    if rows > 128:
        rows -= rows % 128
    return min(rows, max(1, num_rows))


class NeedsGradient(NamedTuple):
    """Which inputs of the head need a gradient; a `bool[]` in an operator's schema."""

    hidden: bool
    weight: bool
    bias: bool


class Head:
    """An LM head applied to hidden rows (N, D), chunk by chunk, and its gradients.

    `weight` is (V, D), `bias` (V,) or None. Gradients that are not needed stay empty.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_bytes: int,
        needs: NeedsGradient,
    ):
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.rows = rows_per_chunk(len(hidden), weight.shape[0], hidden.element_size(), chunk_bytes)
        self.buffer = hidden.new_empty(self.rows, weight.shape[0])
        self.dhidden = hidden.new_empty(hidden.shape if needs.hidden else 0)
        self.dweight, self.dbias = weight.new_empty(0), weight.new_empty(0)
        exact = statistics_dtype(weight)
        if needs.weight:
            # The first chunk writes, so nothing need be cleared; a single chunk needs no exact sum.
            make = torch.empty if len(hidden) else torch.zeros
            dtype = weight.dtype if len(hidden) <= self.rows else exact
            self.dweight = make(weight.shape, dtype=dtype, device=weight.device)
        if needs.bias:
            self.dbias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device)

    def chunks(self):
        """Yield (rows, logits of those rows), one after the other in the same buffer."""
        for start in range(0, len(self.hidden), self.rows):
            rows = slice(start, min(start + self.rows, len(self.hidden)))
            logits = self.buffer[: rows.stop - start]
            if self.bias is None:
                torch.mm(self.hidden[rows], self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=logits)
            yield rows, logits

    def backward(self, rows: slice, dlogits: Tensor) -> None:
        """Add the gradients of a chunk, of which `dlogits` (n, V) are those of the logits."""
        if self.needs.hidden:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.needs.bias:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.needs.weight:
            self._add_to_dweight(dlogits, self.hidden[rows], first=rows.start == 0)

    def _add_to_dweight(self, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
        if first and self.dweight.dtype == hidden.dtype:
            torch.mm(dlogits.T, hidden, out=self.dweight)
        elif self.dweight.dtype == hidden.dtype:
            self.dweight.addmm_(dlogits.T, hidden)
        elif hidden.is_cuda:
            beta = 0 if first else 1
            out = self.dweight
            torch.addmm(out, dlogits.T, hidden, beta=beta, out_dtype=out.dtype, out=out)
        else:
            for start in range(0, len(self.weight), SLICE):
                part = self.dweight[start : start + SLICE]
                columns = dlogits[:, start : start + SLICE].T.to(part.dtype)
                part.addmm_(columns, hidden.to(part.dtype), beta=0 if first else 1)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dhidden, dweight and dbias in the dtypes of their tensors, and free the buffer."""
        self.buffer = None
        dbias = self.dbias.to(self.bias.dtype) if self.needs.bias else self.dbias
        return self.dhidden, self.dweight.to(self.weight.dtype), dbias


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: NeedsGradient
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs.hidden else 0),
        weight.new_empty(weight.shape if needs.weight else 0),
        torch.empty_like(bias) if needs.bias else weight.new_empty(0),
    )


# --- log-probabilities --------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::linear_token_logprobs", mutates_args=())
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `rows.row_logprobs` does of the logits hidden @ weightᵀ + bias, (N,) each."""
    outputs = tuple(hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden)) for _ in range(4))
    head = Head(hidden, weight, bias, chunk_bytes, NeedsGradient(False, False, False))
    for rows, logits in head.chunks():
        values = row_logprobs(logits, targets[rows], temperature)
        for output, value in zip(outputs, values, strict=True):
            output[rows] = value
    return outputs


@linear_token_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, chunk_bytes):
    return fake_logprobs(hidden)


@torch.library.custom_op("mr1_fast::linear_token_logprobs_backward", mutates_args=())
def linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    chunk_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias; the logits are made again, chunk by chunk."""
    head = Head(hidden, weight, bias, chunk_bytes, NeedsGradient(*needs))
    for rows, logits in head.chunks():
        per_row = (tensor[rows] for tensor in (entropy, peak, log_sum, grad_logp, grad_entropy))
        row_logprobs_backward(logits, targets[rows], temperature, *per_row, out=logits)
        head.backward(rows, logits)
    return head.gradients()


@linear_token_logprobs_backward.register_fake
def _(hidden, weight, bias, *arguments):
    *_, needs = arguments
    return _fake_gradients(hidden, weight, bias, NeedsGradient(*needs))


def _save_logprobs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    hidden, weight, bias, targets, temperature, ctx.chunk_bytes = inputs
    _, entropy, peak, log_sum = output
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, entropy, peak, log_sum)


def _logprobs_backward(ctx, grad_logp, grad_entropy, *_):
    needs = list(ctx.needs_input_grad[:3])
    *saved, log_sum = ctx.saved_tensors
    by_row = incoming(grad_logp, grad_entropy, like=log_sum)
    gradients = linear_token_logprobs_backward(*saved, log_sum, *by_row, ctx.chunk_bytes, needs)
    needed = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return input_gradients(ctx, *needed)


linear_token_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)

# --- the fused loss -----------------------------------------------------------------------------


@torch.library.custom_op(
    "mr1_fast::linear_grpo_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int chunk_bytes, "
    f"bool[] needs, {OBJECTIVE_SCHEMA}) -> ({RESULTS_SCHEMA}, Tensor, Tensor, Tensor)",
)
def linear_grpo_loss(
    hidden, weight, bias, targets, chunk_bytes, needs, *objective
) -> tuple[Tensor, ...]:
    """Return the fields of GRPOLoss, and dhidden, dweight and dbias, empty where not needed."""
    objective, needs = Objective(*objective), NeedsGradient(*needs)
    head = Head(hidden, weight, bias, chunk_bytes, needs)
    results = RowResults.empty(hidden)
    for rows, logits in head.chunks():
        out = logits if any(needs) else None
        row_grpo(logits, targets[rows], objective.rows(rows), results.rows(rows), out)
        if any(needs):
            head.backward(rows, logits)
    return *summed(results), *head.gradients()


@linear_grpo_loss.register_fake
def _(hidden, weight, bias, targets, chunk_bytes, needs, *objective):
    gradients = _fake_gradients(hidden, weight, bias, NeedsGradient(*needs))
    return *fake_results(hidden), *gradients


def _save_gradients(ctx, inputs, output):
    _, _, _, _, _, ctx.needs, *_ = inputs
    _, *per_row, dhidden, dweight, dbias = output
    ctx.mark_non_differentiable(*per_row, dhidden, dweight, dbias)
    # Else autograd makes zeros in the size of every output, dweight included.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight, dbias)


def _scaled_gradients(ctx, grad_loss, *_):
    gradients = [
        scaled(gradient, grad_loss) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return input_gradients(ctx, *gradients)


linear_grpo_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


def linear_grpo_loss_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    objective: Objective,
    chunk_bytes: int,
) -> GRPOLoss:
    """Compute the loss of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,), differentiable."""
    with_gradient = torch.is_grad_enabled()
    needs = [with_gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    outputs = linear_grpo_loss(hidden, weight, bias, targets, chunk_bytes, needs, *objective)
    *results, _, _, _ = outputs
    return GRPOLoss(*results)
