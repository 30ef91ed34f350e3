"""The operators of `torch.ops.mr1_fast` on logits, with their fake kernels and gradients.

`torch.compile` sees each as one node. The loss computes the gradient of its logits in the forward,
when all that it needs is at hand; the backward scales it by the incoming gradient, which costs
nothing where that is 1.

An operator takes no objects: Objective's fields come last among its arguments, as
`OBJECTIVE_SCHEMA` lists them.
"""

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .objective import OBJECTIVE_SCHEMA, GRPOLoss, Objective, RowResults
from .rows import row_grpo, row_logprobs, row_logprobs_backward, scale_

# --- what gradients of operators share ----------------------------------------------------------


def input_gradients(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return a gradient for each input of an operator: the given ones first, None for the rest."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def incoming(*gradients: Tensor | None, like: Tensor) -> list[Tensor]:
    """Return the incoming gradients, contiguous; zeros where autograd has none."""
    return [torch.zeros_like(like) if each is None else each.contiguous() for each in gradients]


@torch.library.custom_op("mr1_fast::scale_", mutates_args=("gradient",))
def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply the gradient in place by a 0-d tensor; leave it untouched where that is 1."""
    scale_(gradient, factor)


@scale.register_fake
def _(gradient, factor):
    return None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the saved gradient times the incoming one.

    It is scaled in place, except while a compiler traces, which plans memory itself.
    """
    if type(gradient) is not Tensor:
        return gradient * factor.to(gradient.dtype)
    scale(gradient, factor)
    return gradient


# --- log-probabilities --------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `rows.row_logprobs` does, (N,) each, of logits (N, V) / temperature."""
    return row_logprobs(logits, targets, temperature, token_weights)


@token_logprobs.register_fake
def _(logits, targets, temperature, token_weights=None):
    return fake_logprobs(logits)


def fake_logprobs(rows: Tensor) -> tuple[Tensor, ...]:
    """Return empty tensors in the shapes of `row_logprobs`' results."""
    dtype = statistics_dtype(rows)
    return tuple(rows.new_empty(rows.shape[0], dtype=dtype) for _ in range(4))


@torch.library.custom_op("mr1_fast::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """Return the gradient by the logits (N, V)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_logprobs_backward(
        logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out
    )
    return out


@token_logprobs_backward.register_fake
def _(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logprobs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logits, targets, temperature, token_weights = inputs
    _, entropy, peak, log_sum = output
    ctx.save_for_backward(logits, targets, temperature, entropy, peak, log_sum, token_weights)


def _logprobs_backward(ctx, grad_logp, grad_entropy, *_):
    *saved, log_sum, token_weights = ctx.saved_tensors
    by_row = _unmasked(incoming(grad_logp, grad_entropy, like=log_sum), token_weights)
    return input_gradients(ctx, token_logprobs_backward(*saved, log_sum, *by_row))


def _unmasked(gradients: list[Tensor], token_weights: Tensor | None) -> list[Tensor]:
    """Return incoming gradients, 0 where the weight is 0: the backward does not read those rows."""
    if token_weights is None:
        return gradients
    return [torch.where(token_weights != 0, gradient, 0.0) for gradient in gradients]


token_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)


@torch.library.custom_op("mr1_fast::token_logprobs_backward_", mutates_args=("logits",))
def token_logprobs_backward_(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> None:
    """Overwrite the logits (N, V) with the gradient by them."""
    row_logprobs_backward(
        logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out=logits
    )


@token_logprobs_backward_.register_fake
def _(*_):
    return None


class InplaceTokenLogprobs(torch.autograd.Function):
    """logp (B, R) of logits (B, R, V), with a backward that puts the gradient in their place.

    A row whose entry in token_weights (B, R) is 0 is not read; its logp and gradient are 0. Rows
    must have unit stride and not overlap; a slice of a longer sequence is not copied. Autograd's
    version counter refuses a second backward, and the backward of any other operation that saved
    the logits.
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, temperature: Tensor, token_weights: Tensor
    ) -> Tensor:
        """Compute `token_logprobs` of each matrix that the logits consist of."""
        matrices = _matrices(logits, targets, token_weights)
        parts = [
            token_logprobs(matrix, matrix_targets, temperature, matrix_weights)
            for matrix, matrix_targets, matrix_weights in zip(*matrices, strict=True)
        ]
        logp, *kept = (torch.cat(part).view(targets.shape) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, temperature, token_weights, *kept)
        return logp

    @staticmethod
    def backward(ctx, grad_logp: Tensor):
        """Return the logits' own buffer, which now holds the gradient."""
        logits, targets, temperature, token_weights, *kept = ctx.saved_tensors
        buffer = logits.detach()
        by_row = _unmasked(incoming(grad_logp, None, like=grad_logp), token_weights)
        per_row = _matrices(buffer, targets, *kept, *by_row)
        for matrix, matrix_targets, *rest in zip(*per_row, strict=True):
            token_logprobs_backward_(matrix, matrix_targets, temperature, *rest)
        return input_gradients(ctx, buffer)


def _matrices(logits: Tensor, *per_row: Tensor) -> list[tuple[Tensor, ...]]:
    """View logits (B, R, V) as matrices (N, V), and values (B, R) as (N,).

    There is one matrix where the strides allow it, else there are B.
    """
    if len(logits) == 1 or logits.stride(0) == logits.shape[1] * logits.stride(1):
        return [(each.flatten(0, 1),) for each in (logits, *per_row)]
    return [each.unbind() for each in (logits, *per_row)]


# --- the fused loss -----------------------------------------------------------------------------

RESULTS_SCHEMA = ", ".join(["Tensor"] * len(GRPOLoss._fields))
"""The fields of GRPOLoss in an operator's schema."""


@torch.library.custom_op(
    "mr1_fast::grpo_loss",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, bool with_gradient, {OBJECTIVE_SCHEMA}) -> "
    f"({RESULTS_SCHEMA}, Tensor)",
)
def grpo_loss(logits, targets, with_gradient, *objective) -> tuple[Tensor, ...]:
    """Return the fields of GRPOLoss, and dloss/dlogits (N, V), empty unless `with_gradient`."""
    gradient = _empty_gradient(logits, with_gradient)
    results = RowResults.empty(logits)
    out = gradient if with_gradient else None
    row_grpo(logits, targets, Objective(*objective), results, out)
    return *summed(results), gradient


@grpo_loss.register_fake
def _(logits, targets, with_gradient, *objective):
    return *fake_results(logits), _empty_gradient(logits, with_gradient)


def _empty_gradient(logits: Tensor, with_gradient: bool) -> Tensor:
    if with_gradient:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return logits.new_empty(0)


@torch.library.custom_op(
    "mr1_fast::grpo_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a0!) logits, Tensor targets, {OBJECTIVE_SCHEMA}) -> ({RESULTS_SCHEMA})",
)
def grpo_loss_(logits, targets, *objective) -> tuple[Tensor, ...]:
    """Return the fields of GRPOLoss; dloss/dlogits takes the place of the logits."""
    results = RowResults.empty(logits)
    row_grpo(logits, targets, Objective(*objective), results, logits)
    return summed(results)


@grpo_loss_.register_fake
def _(logits, targets, *objective):
    return fake_results(logits)


def summed(results: RowResults) -> GRPOLoss:
    """Return the loss of all rows, and what to log of each."""
    return GRPOLoss(**results._replace(loss=results.loss.sum())._asdict())


def fake_results(rows: Tensor) -> GRPOLoss:
    """Return empty tensors in the shapes of GRPOLoss."""
    results = RowResults.empty(rows)
    return GRPOLoss(**results._replace(loss=results.loss.new_empty(()))._asdict())


def _save_gradient(ctx, inputs, output):
    _, *per_row, gradient = output
    ctx.mark_non_differentiable(*per_row, gradient)
    # Else autograd makes zeros in the size of the logits.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)


def _scaled_gradient(ctx, grad_loss, *_):
    (gradient,) = ctx.saved_tensors
    return input_gradients(ctx, scaled(gradient, grad_loss))


grpo_loss.register_autograd(_scaled_gradient, setup_context=_save_gradient)


class InplaceGRPOLoss(torch.autograd.Function):
    """`grpo_loss_` with its gradient, which the buffer of the logits holds from the forward on."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, *objective):
        """Overwrite the logits; autograd then refuses the backward of others that saved them."""
        buffer = logits.detach()
        loss, *per_row = grpo_loss_(buffer, targets, *objective)
        ctx.save_for_backward(buffer)
        ctx.mark_non_differentiable(*per_row)
        return loss, *per_row

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        """Scale the buffer."""
        (gradient,) = ctx.saved_tensors
        return input_gradients(ctx, scaled(gradient, grad_loss))


def grpo_loss_with_gradient(
    logits: Tensor, targets: Tensor, objective: Objective, inplace: bool
) -> GRPOLoss:
    """Compute the loss of logits (N, V), differentiable.

    With `inplace`, the gradient overwrites the logits.
    """
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient:
        return GRPOLoss(*InplaceGRPOLoss.apply(logits, targets, *objective))
    *results, _ = grpo_loss(logits, targets, with_gradient, *objective)
    return GRPOLoss(*results)
