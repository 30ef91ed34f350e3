"""The logits-level operators of `torch.ops.mr1_fast`, with fake kernels and gradients.

`torch.compile` sees each as one node. The loss computes the gradient of its logits in the forward, when all it needs
is at hand; the backward scales it by the incoming gradient, which costs nothing where that is 1.
"""

import torch
from torch import Tensor

from ..dispatch import statistics_dtype
from .objective import GRPOLoss, Objective, RowResults
from .rows import row_grpo, row_logprobs, row_logprobs_backward, scale_

# --- log-probabilities --------------------------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, peak and log_sum of `row_logprobs`, (N,), of logits (N, V) / temperature."""
    return row_logprobs(logits, targets, temperature)


@token_logprobs.register_fake
def _(logits, targets, temperature):
    return tuple(
        logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits)) for _ in range(4)
    )


@torch.library.custom_op("mr1_fast::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor, targets: Tensor, temperature: Tensor, entropy: Tensor, peak: Tensor, log_sum: Tensor,
    grad_logp: Tensor, grad_entropy: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient by the logits."""
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
    logits, targets, temperature = inputs
    ctx.save_for_backward(logits, targets, temperature, *output[1:])


def _logprobs_backward(ctx, grad_logp, grad_entropy, *_):
    by_row = incoming(grad_logp, grad_entropy, like=ctx.saved_tensors[-1])
    return token_logprobs_backward(*ctx.saved_tensors, *by_row), None, None


def incoming(*gradients: Tensor | None, like: Tensor) -> list[Tensor]:
    """Contiguous incoming gradients, zeros where autograd has none."""
    return [torch.zeros_like(like) if each is None else each.contiguous() for each in gradients]


token_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)


@torch.library.custom_op("mr1_fast::token_logprobs_backward_", mutates_args=("logits",))
def token_logprobs_backward_(
    logits: Tensor, targets: Tensor, temperature: Tensor, entropy: Tensor, peak: Tensor, log_sum: Tensor,
    grad_logp: Tensor, grad_entropy: Tensor,
) -> None:  # fmt: skip
    """The gradient by the logits takes their place."""
    row_logprobs_backward(
        logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out=logits
    )


@token_logprobs_backward_.register_fake
def _(*_):
    return None


class InplaceTokenLogprobs(torch.autograd.Function):
    """logp (B, R) of logits (B, R, V), whose backward, not the forward, puts the gradient in their place.

    Rows of unit stride that do not overlap; a slice of a longer sequence is not copied. Autograd's version counter
    refuses a second backward, and the backward of whoever else saved the logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        """`token_logprobs` of each matrix that the logits consist of."""
        parts = [
            token_logprobs(*each, temperature)
            for each in zip(*_matrices(logits, targets), strict=True)
        ]
        logp, *kept = (torch.cat(part).view(targets.shape) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, temperature, *kept)
        return logp

    @staticmethod
    def backward(ctx, grad_logp: Tensor):
        """The logits' own buffer."""
        logits, targets, temperature, *kept = ctx.saved_tensors
        buffer = logits.detach()
        per_row = _matrices(buffer, targets, *kept, *incoming(grad_logp, None, like=grad_logp))
        for matrix, matrix_targets, *rest in zip(*per_row, strict=True):
            token_logprobs_backward_(matrix, matrix_targets, temperature, *rest)
        return buffer, None, None


def _matrices(logits: Tensor, *per_row: Tensor) -> list[tuple[Tensor, ...]]:
    """Views (N, V) of logits (B, R, V) and (N,) of values (B, R): one of each where the strides allow it, else B."""
    if len(logits) == 1 or logits.stride(0) == logits.shape[1] * logits.stride(1):
        return [(each.flatten(0, 1),) for each in (logits, *per_row)]
    return [each.unbind() for each in (logits, *per_row)]


# --- the fused loss -----------------------------------------------------------------------------------------------


@torch.library.custom_op("mr1_fast::grpo_loss", mutates_args=())
def grpo_loss(
    logits: Tensor, targets: Tensor, advantages: Tensor, token_weights: Tensor, beta: Tensor, temperature: Tensor,
    old_logp: Tensor | None, ref_logp: Tensor | None, is_weights: Tensor | None, surrogate: str, bounds: list[float],
    bias_corrected_kl: bool, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of GRPOLoss, and dloss/dlogits (empty unless `with_gradient`)."""
    objective = Objective(
        advantages, token_weights, beta, temperature, old_logp, ref_logp, is_weights, surrogate, bounds,
        bias_corrected_kl,
    )  # fmt: skip
    gradient = (
        torch.empty_like(logits, memory_format=torch.contiguous_format) if with_gradient else None
    )
    results = RowResults.empty(logits)
    row_grpo(logits, targets, objective, results, gradient)
    return results.loss.sum(), *results[1:], logits.new_empty(0) if gradient is None else gradient


@grpo_loss.register_fake
def _(logits, targets, *rest):
    with_gradient = rest[-1]
    gradient = (
        torch.empty_like(logits, memory_format=torch.contiguous_format)
        if with_gradient
        else logits.new_empty(0)
    )
    return *fake_results(logits), gradient


@torch.library.custom_op("mr1_fast::grpo_loss_", mutates_args=("logits",))
def grpo_loss_(
    logits: Tensor, targets: Tensor, advantages: Tensor, token_weights: Tensor, beta: Tensor, temperature: Tensor,
    old_logp: Tensor | None, ref_logp: Tensor | None, is_weights: Tensor | None, surrogate: str, bounds: list[float],
    bias_corrected_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of GRPOLoss; dloss/dlogits takes the place of the logits."""
    objective = Objective(
        advantages, token_weights, beta, temperature, old_logp, ref_logp, is_weights, surrogate, bounds,
        bias_corrected_kl,
    )  # fmt: skip
    results = RowResults.empty(logits)
    row_grpo(logits, targets, objective, results, logits)
    return results.loss.sum(), *results[1:]


@grpo_loss_.register_fake
def _(logits, *_):
    return fake_results(logits)


@torch.library.custom_op("mr1_fast::scale_", mutates_args=("gradient",))
def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a 0-d tensor; nothing is done where that is 1."""
    scale_(gradient, factor)


@scale.register_fake
def _(gradient, factor):
    return None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The saved gradient times the incoming one: in place, but while a compiler traces, which plans memory itself."""
    if type(gradient) is not Tensor:
        return gradient * factor.to(gradient.dtype)
    scale(gradient, factor)
    return gradient


def fake_results(logits: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors in the shapes of GRPOLoss."""
    results = RowResults.empty(logits)
    return results.loss.new_empty(()), *results[1:]


def _save_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros in the size of the logits
    ctx.save_for_backward(output[-1])


def _scaled_gradient(ctx, grad_loss, *_):
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, grad_loss), *[None] * 12


grpo_loss.register_autograd(_scaled_gradient, setup_context=_save_gradient)


class InplaceGRPOLoss(torch.autograd.Function):
    """`grpo_loss_` with its gradient: the buffer of the logits is the gradient from the forward on."""

    @staticmethod
    def forward(ctx, logits: Tensor, *arguments):
        """Overwrite the logits; autograd's version counter tells whoever saved them."""
        buffer = logits.detach()
        loss, *per_row = grpo_loss_(buffer, *arguments)
        ctx.save_for_backward(buffer)
        ctx.mark_non_differentiable(*per_row)
        return loss, *per_row

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        """The buffer, scaled."""
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, grad_loss), *[None] * 11


def grpo_loss_with_gradient(logits: Tensor, arguments: tuple, inplace: bool) -> GRPOLoss:
    """Call the operator that fits; its per-row outputs are not differentiable."""
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient:
        return GRPOLoss(*InplaceGRPOLoss.apply(logits, *arguments))
    return GRPOLoss(*grpo_loss(logits, *arguments, with_gradient)[: len(GRPOLoss._fields)])
