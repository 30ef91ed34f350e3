"""The LM head and the loss in one: logits exist for a chunk of rows at a time, in one buffer that is used again.

Per chunk: a GEMM into the buffer; the row operation, which puts dlogits in the place of the logits; a GEMM for
dhidden; a GEMM that adds to dweight. Three GEMMs in all, 2·N·D·V FLOP each, where peers that do not know the loss in
the forward need a fourth to make the logits again. A frozen head has no dweight and no third GEMM. Nothing
synchronises, so it can be captured in a CUDA graph.

Memory beside inputs and gradients: the buffer (`chunk_bytes`), and, for a 16-bit trainable head over more than one
chunk, the fp32 accumulator of dweight: rounding each chunk's share to 16 bits would bias the sum.
"""

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .objective import GRPOLoss, Objective, RowResults
from .operators import fake_results, incoming, scaled
from .rows import row_grpo, row_logprobs, row_logprobs_backward

CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 48 * 2**20}
"""Default budget of the logits buffer; a CPU needs fewer rows to keep a GEMM busy."""
SLICE = 8192
"""Vocabulary rows that a CPU casts to fp32 at a time while it accumulates dweight."""


def rows_per_chunk(num_rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of logits that exist at a time: as many as `chunk_bytes` hold, in multiples of 128 where that is possible.

    At least 1 and at most `num_rows`; a row has `vocabulary` logits of `itemsize` bytes.
    """
    rows = max(1, chunk_bytes // (vocabulary * itemsize))
    if rows > 128:
        rows -= rows % 128
    return min(rows, max(1, num_rows))


class Head:
    """An LM head (weight (V, D), bias (V,) or None) applied to chunks of hidden rows, forward and backward."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_bytes: int,
        needs: list[bool],
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.rows = rows_per_chunk(len(hidden), weight.shape[0], hidden.element_size(), chunk_bytes)
        self.buffer = hidden.new_empty(self.rows, weight.shape[0])
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.dhidden = hidden.new_empty(hidden.shape if self.needs_hidden else 0)
        exact = weight.dtype if len(hidden) <= self.rows else statistics_dtype(weight)
        make = torch.empty if len(hidden) else torch.zeros  # the first chunk writes
        like = dict(device=weight.device)
        self.dweight = (
            make(weight.shape, dtype=exact, **like) if self.needs_weight else weight.new_empty(0)
        )
        self.dbias = (
            torch.zeros(weight.shape[0], dtype=statistics_dtype(weight), **like)
            if self.needs_bias
            else None
        )

    @property
    def needs_gradient(self) -> bool:
        """Whether anything needs dlogits."""
        return self.needs_hidden or self.needs_weight or self.needs_bias

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
        """Add the gradients of a chunk."""
        hidden = self.hidden[rows]
        if self.needs_hidden:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.needs_bias:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        if not self.needs_weight:
            return
        if rows.start == 0 and self.dweight.dtype == hidden.dtype:
            torch.mm(dlogits.T, hidden, out=self.dweight)
        elif self.dweight.dtype == hidden.dtype:
            self.dweight.addmm_(dlogits.T, hidden)
        elif hidden.is_cuda:
            beta = 0 if rows.start == 0 else 1
            out = self.dweight
            torch.addmm(out, dlogits.T, hidden, beta=beta, out_dtype=out.dtype, out=out)
        else:
            for start in range(0, len(self.weight), SLICE):
                part = self.dweight[start : start + SLICE]
                columns = dlogits[:, start : start + SLICE].T.to(part.dtype)
                part.addmm_(columns, hidden.to(part.dtype), beta=0 if rows.start == 0 else 1)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dweight and dbias in the dtype of what they belong to; empty where not needed."""
        self.buffer = None
        dbias = self.weight.new_empty(0) if self.dbias is None else self.dbias.to(self.bias.dtype)
        return self.dhidden, self.dweight.to(self.weight.dtype), dbias


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    dbias = torch.empty_like(bias) if needs[2] else weight.new_empty(0)
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        dbias,
    )


# --- log-probabilities --------------------------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::linear_token_logprobs", mutates_args=())
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, peak and log_sum of `row_logprobs`, (N,), of (hidden @ weightᵀ + bias) / temperature."""
    outputs = tuple(hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden)) for _ in range(4))
    for rows, logits in Head(hidden, weight, bias, chunk_bytes, [False] * 3).chunks():
        for output, value in zip(
            outputs, row_logprobs(logits, targets[rows], temperature), strict=True
        ):
            output[rows] = value
    return outputs


@linear_token_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, chunk_bytes):
    return tuple(
        hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden)) for _ in range(4)
    )


@torch.library.custom_op("mr1_fast::linear_token_logprobs_backward", mutates_args=())
def linear_token_logprobs_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, entropy: Tensor,
    peak: Tensor, log_sum: Tensor, grad_logp: Tensor, grad_entropy: Tensor, chunk_bytes: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dhidden, dweight, dbias; makes the logits again, chunk by chunk."""
    head = Head(hidden, weight, bias, chunk_bytes, needs)
    for rows, logits in head.chunks():
        per_row = (tensor[rows] for tensor in (entropy, peak, log_sum, grad_logp, grad_entropy))
        row_logprobs_backward(logits, targets[rows], temperature, *per_row, out=logits)
        head.backward(rows, logits)
    return head.gradients()


@linear_token_logprobs_backward.register_fake
def _(hidden, weight, bias, *rest):
    return _fake_gradients(hidden, weight, bias, rest[-1])


def _save_logprobs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    hidden, weight, bias, targets, temperature, ctx.chunk_bytes = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, *output[1:])


def _logprobs_backward(ctx, grad_logp, grad_entropy, *_):
    needs = list(ctx.needs_input_grad[:3])
    by_row = incoming(grad_logp, grad_entropy, like=ctx.saved_tensors[-1])
    gradients = linear_token_logprobs_backward(*ctx.saved_tensors, *by_row, ctx.chunk_bytes, needs)
    return (
        *(g if need else None for g, need in zip(gradients, needs, strict=True)),
        None,
        None,
        None,
    )


linear_token_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)

# --- the fused loss -----------------------------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::linear_grpo_loss", mutates_args=())
def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, advantages: Tensor, token_weights: Tensor,
    beta: Tensor, temperature: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, is_weights: Tensor | None,
    surrogate: str, bounds: list[float], bias_corrected_kl: bool, chunk_bytes: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of GRPOLoss, and dhidden, dweight, dbias (each empty unless needed)."""
    objective = Objective(
        advantages, token_weights, beta, temperature, old_logp, ref_logp, is_weights, surrogate, bounds,
        bias_corrected_kl,
    )  # fmt: skip
    head = Head(hidden, weight, bias, chunk_bytes, needs)
    results = RowResults.empty(hidden)
    for rows, logits in head.chunks():
        out = logits if head.needs_gradient else None
        row_grpo(logits, targets[rows], objective.rows(rows), results.rows(rows), out)
        if head.needs_gradient:
            head.backward(rows, logits)
    return results.loss.sum(), *results[1:], *head.gradients()


@linear_grpo_loss.register_fake
def _(hidden, weight, bias, *rest):
    return *fake_results(hidden), *_fake_gradients(hidden, weight, bias, rest[-1])


def _save_gradients(ctx, inputs, output):
    ctx.needs = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(
        False
    )  # else autograd makes zeros in the size of every output, dweight included
    ctx.save_for_backward(*output[-3:])


def _scaled_gradients(ctx, grad_loss, *_):
    gradients = []
    for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True):
        gradients.append(scaled(gradient, grad_loss) if need else None)
    return *gradients, *[None] * 13


linear_grpo_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


def linear_grpo_loss_with_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple, chunk_bytes: int
) -> GRPOLoss:
    """Call the operator; its per-row outputs are not differentiable."""
    with_gradient = torch.is_grad_enabled()
    needs = [with_gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    outputs = linear_grpo_loss(hidden, weight, bias, *arguments, chunk_bytes, needs)
    return GRPOLoss(*outputs[: len(GRPOLoss._fields)])
