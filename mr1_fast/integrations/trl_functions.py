"""Replacements for TRL's functions that compute log-probs and entropy from logits or hidden states.

Arguments and defaults are those of TRL 1.16. Results are fp32 also for 16-bit logits, and
differentiable: TRL's Triton kernel gives fp32 too, and its PyTorch, on a CPU, the logits' dtype, in
which a log-prob of −10 is off by up to 0.03. TRL itself is needed only if a call asks for what this
package does not compute: TRL's own function then does it, with one warning.
"""

import torch
from torch import Tensor

from ..loss import linear_token_logprobs, token_logprobs
from . import warn_once
from .head import in_dtype_of


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Return fp32 log-probs of `index` (...) or (..., K) under logits (..., V) / temperature.

    The result has the shape of `index`, and is 0 where `row_mask`, (...) or in the shape of
    `index`, is 0. With one id per row, logits whose mask is 0 are not read. Strided logits, such
    as a slice of positions, are not copied.
    """
    if index.ndim < logits.ndim:
        return _by_row(logits, index, temperature, row_mask)[0]
    targets = logits.detach().argmax(-1)
    logp, _ = _by_row(logits, targets, temperature)
    # log p_k − log p_top needs only the two logits, and the largest one is never −inf.
    chosen = logits.gather(-1, index).to(logp.dtype)
    top = logits.gather(-1, targets.unsqueeze(-1)).to(logp.dtype)
    logp = (chosen - top) / temperature + logp.unsqueeze(-1)
    if row_mask is None:
        return logp
    if row_mask.ndim < index.ndim:
        row_mask = row_mask.unsqueeze(-1)
    return torch.where(row_mask != 0, logp, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Return the fp32 entropy (...), in nats, of logits (..., V); `chunk_size` has no effect."""
    any_target = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    _, entropy = _by_row(logits, any_target, 1.0)
    return entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return fp32 log-probs of `index` (...) and entropy (...) of logits (..., V) / temperature.

    The logits are read once, and not at all where `row_mask` (...) is 0: there, both results are 0.
    """
    logp, entropy = _by_row(logits, index, temperature, row_mask)
    return logp, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """TRL's autograd function on hidden states, called as `ChunkedLogProbFunction.apply(...)`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return fp32 log-probs of targets (N,) under hidden (N, H) @ weight (V, H)ᵀ + bias (V,).

        Behind them come entropy and TRL's further `outputs`, None unless asked for. Soft-capped
        logits, and outputs other than "log_probs" and "entropy", are left to TRL's own function.
        `chunk_size` has no effect: logits exist for as many rows at a time as 512 MB hold (48 MB on
        a CPU).
        """
        beyond = set(outputs) - {"log_probs", "entropy"}
        if beyond or final_logit_softcapping is not None or not logit_scale > 0:
            from trl.kernels import ChunkedLogProbFunction as TRLFunction

            warn_once(
                "ChunkedLogProbFunction uses TRL's own code: mr1_fast computes no "
                + (", ".join(sorted(beyond)) or "soft-capped or unscaled logits")
            )
            return TRLFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        weight, bias = in_dtype_of(hidden, weight, bias)
        logp, entropy = linear_token_logprobs(
            hidden, weight, targets.long(), temperature / logit_scale, bias
        )
        return logp, entropy if "entropy" in outputs else None, None, None, None


def _by_row(
    logits: Tensor, targets: Tensor, temperature: float, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropy, in the shape of `targets`; the logits are not copied.

    Rows whose `row_mask`, in the shape of `targets`, is 0 are not read; their results are 0.
    """
    if row_mask is not None:
        row_mask = row_mask.expand_as(targets)
    try:
        rows = logits.view(targets.numel(), logits.shape[-1])
    except RuntimeError:
        # A slice: one call for each part of the first dimension. Their gradients are stacked once.
        masks = [None] * len(logits) if row_mask is None else row_mask.unbind()
        parts = [
            _by_row(part, part_targets, temperature, mask)
            for part, part_targets, mask in zip(logits, targets, masks, strict=True)
        ]
        logp, entropy = zip(*parts, strict=True)
        return torch.stack(logp), torch.stack(entropy)
    weights = None if row_mask is None else row_mask.reshape(-1)
    logp, entropy = token_logprobs(rows, targets.reshape(-1), temperature, weights)
    return logp.view(targets.shape), entropy.view(targets.shape)
