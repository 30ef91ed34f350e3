"""The operators on hidden states: the LM head and the loss in one, without a tensor of all logits.

Logits exist for a chunk of rows at a time, in one buffer that is used again. For each chunk there
is a GEMM into the buffer; the row operation, which puts dlogits in the place of the logits; a GEMM
for dhidden; and a GEMM that adds to dweight. These are three GEMMs in all, of 2·N·D·V FLOP each; a
loss that is not known in the forward needs a fourth, to make the logits again. A frozen head has no
dweight and no third GEMM. Nothing synchronises, so the operators can be captured in a CUDA graph.

Memory beside inputs and gradients: the buffer, which `chunk_bytes` bound; on a CPU some MiB of fp32
copies where the head has 16 bits; and, where dweight of 16 bits is summed in fp32, that sum, and
later the gradient beside it, but then the buffer is free. `chunks.py` chooses the rows of a chunk,
`head.py` does the GEMMs.
"""

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .head import Head, NeedsGradient, head_rows
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
from .rows import row_grpo, row_logprobs, row_logprobs_backward, scale_


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
    wide_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `rows.row_logprobs` does of the logits hidden @ weightᵀ + bias, (N,) each.

    With `wide_logits` they keep the digits that the product has, where others are rounded to the
    dtype of `hidden`.
    """
    wide = statistics_dtype(hidden)
    outputs = tuple(hidden.new_empty(len(hidden), dtype=wide) for _ in range(4))
    needs = NeedsGradient(False, False, False)

    def work(rows: slice, logits: Tensor) -> None:
        values = row_logprobs(logits, targets[rows], temperature)
        for output, value in zip(outputs, values, strict=True):
            output[rows] = value

    dtype = wide if wide_logits else hidden.dtype
    rows = head_rows(hidden, weight, needs, chunk_bytes, logits=dtype)
    Head(hidden, weight, bias, needs, rows).for_each_chunk(work, dtype)
    return outputs


@linear_token_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, chunk_bytes, wide_logits=False):
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
    wide_logits: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias; the logits are made again, chunk by chunk."""
    needs = NeedsGradient(*needs)
    dtype = statistics_dtype(hidden) if wide_logits else hidden.dtype
    if dtype != hidden.dtype:  # beside the logits is their gradient, of half their size
        chunk_bytes = chunk_bytes * 2 // 3
    rows = head_rows(hidden, weight, needs, chunk_bytes, logits=dtype)
    head = Head(hidden, weight, bias, needs, rows)

    def work(rows: slice, logits: Tensor) -> None:
        per_row = (tensor[rows] for tensor in (entropy, peak, log_sum, grad_logp, grad_entropy))
        row_logprobs_backward(logits, targets[rows], temperature, *per_row, out=logits)
        head.backward(rows, logits.to(hidden.dtype))

    head.for_each_chunk(work, dtype)
    return head.gradients()


@linear_token_logprobs_backward.register_fake
def _(hidden, weight, bias, *arguments):
    *_, needs = arguments
    return _fake_gradients(hidden, weight, bias, NeedsGradient(*needs))


def _save_logprobs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    hidden, weight, bias, targets, temperature, *ctx.settings = inputs
    _, entropy, peak, log_sum = output
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, entropy, peak, log_sum)


def _logprobs_backward(ctx, grad_logp, grad_entropy, *_):
    needs = list(ctx.needs_input_grad[:3])
    *saved, log_sum = ctx.saved_tensors
    by_row = incoming(grad_logp, grad_entropy, like=log_sum)
    gradients = linear_token_logprobs_backward(*saved, log_sum, *by_row, *ctx.settings, needs)
    needed = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return input_gradients(ctx, *needed)


linear_token_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)

# --- the fused loss -----------------------------------------------------------------------------

_HEAD_SCHEMA = "int chunk_bytes, bool[] needs, bool? fp32_accumulation"


def grpo_of_head(head: Head, targets: Tensor, objective: Objective) -> tuple[Tensor, ...]:
    """Return the fields of GRPOLoss, and dhidden, dweight and dbias, empty where not needed."""
    results, with_gradient = RowResults.empty(head.hidden), any(head.needs)

    def work(rows: slice, logits: Tensor) -> None:
        out = logits if with_gradient else None
        row_grpo(logits, targets[rows], objective.rows(rows), results.rows(rows), out)
        if with_gradient:
            head.backward(rows, logits)

    head.for_each_chunk(work)
    return *summed(results), *head.gradients()


@torch.library.custom_op(
    "mr1_fast::linear_grpo_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_HEAD_SCHEMA}, "
    f"{OBJECTIVE_SCHEMA}) -> ({RESULTS_SCHEMA}, Tensor, Tensor, Tensor)",
)
def linear_grpo_loss(
    hidden, weight, bias, targets, chunk_bytes, needs, fp32_accumulation, *objective
) -> tuple[Tensor, ...]:
    """Return what `grpo_of_head` does."""
    needs = NeedsGradient(*needs)
    rows = head_rows(hidden, weight, needs, chunk_bytes)
    head = Head(hidden, weight, bias, needs, rows, fp32_accumulation)
    return grpo_of_head(head, targets, Objective(*objective))


@linear_grpo_loss.register_fake
def _(hidden, weight, bias, targets, chunk_bytes, needs, *_):
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

# --- the fused loss, with the weight's gradient added to a given tensor -------------------------


@torch.library.custom_op(
    "mr1_fast::linear_grpo_loss_",
    mutates_args=("weight_grad",),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor(a0!) weight_grad, "
    f"{_HEAD_SCHEMA}, {OBJECTIVE_SCHEMA}) -> ({RESULTS_SCHEMA}, Tensor, Tensor)",
)
def linear_grpo_loss_(
    hidden, weight, bias, targets, weight_grad, chunk_bytes, needs, fp32_accumulation, *objective
) -> tuple[Tensor, ...]:
    """Return what `grpo_of_head` does without dweight, which is added to `weight_grad`."""
    needs = NeedsGradient(*needs)
    rows = head_rows(hidden, weight, needs, chunk_bytes)
    head = Head(hidden, weight, bias, needs, rows, fp32_accumulation, weight_grad)
    *results, dhidden, _, dbias = grpo_of_head(head, targets, Objective(*objective))
    return *results, dhidden, dbias


@linear_grpo_loss_.register_fake
def _(hidden, weight, bias, targets, weight_grad, chunk_bytes, needs, *_):
    dhidden, _, dbias = _fake_gradients(hidden, weight, bias, NeedsGradient(*needs))
    return *fake_results(hidden), dhidden, dbias


@torch.library.custom_op("mr1_fast::require_one_", mutates_args=("gradient",))
def require_one(gradient: Tensor, factor: Tensor) -> None:
    """Check that a 0-d factor, which came too late for `gradient`, is 1.

    On a CPU another one raises RuntimeError. On a GPU, where reading it would synchronise, it turns
    the gradient to NaN; where it is 1, the gradient is not touched.
    """
    if factor.device.type != "cpu":
        nan_unless_one_(gradient, factor)
    elif factor.item() != 1:
        raise RuntimeError(
            f"the loss arrives with a gradient of {factor.item()}, but weight_grad was given its "
            "weight's gradient in the forward, for 1: call backward on the loss itself, and put "
            "factors into token_weights"
        )


@require_one.register_fake
def _(gradient, factor):
    return None


def nan_unless_one_(gradient: Tensor, factor: Tensor) -> None:
    """Turn the gradient to NaN in place where the 0-d factor is not 1."""
    scale_(gradient, torch.where(factor == 1, 1.0, torch.nan).to(factor.dtype))


class _IntoWeightGrad(torch.autograd.Function):
    """`linear_grpo_loss_` with the gradients that it returns; the weight gets none."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weight_grad, *arguments):
        """Add to `weight_grad`, which is no saved tensor, since others may add to it meanwhile."""
        loss, *per_row, dhidden, dbias = linear_grpo_loss_(
            hidden, weight, bias, targets, weight_grad, *arguments
        )
        ctx.needs, ctx.weight_grad = arguments[1], weight_grad
        ctx.save_for_backward(dhidden, dbias)
        ctx.mark_non_differentiable(*per_row)
        ctx.set_materialize_grads(False)
        return loss, *per_row

    @staticmethod
    def backward(ctx, grad_loss, *_):
        """Scale the gradients, and refuse a factor that `weight_grad` has missed."""
        require_one(ctx.weight_grad, grad_loss)
        dhidden, dbias = ctx.saved_tensors
        needs_hidden, _, needs_bias = ctx.needs
        return input_gradients(
            ctx,
            scaled(dhidden, grad_loss) if needs_hidden else None,
            None,
            scaled(dbias, grad_loss) if needs_bias else None,
        )


def linear_grpo_loss_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    objective: Objective,
    chunk_bytes: int,
    fp32_accumulation: bool | None = None,
    weight_grad: Tensor | None = None,
) -> GRPOLoss:
    """Compute the loss of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,), differentiable."""
    with_gradient = torch.is_grad_enabled()
    needs = [with_gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    arguments = chunk_bytes, needs, fp32_accumulation, *objective
    if weight_grad is not None and with_gradient:
        return GRPOLoss(
            *_IntoWeightGrad.apply(hidden, weight, bias, targets, weight_grad, *arguments)
        )
    *results, _, _, _ = linear_grpo_loss(hidden, weight, bias, targets, *arguments)
    return GRPOLoss(*results)
