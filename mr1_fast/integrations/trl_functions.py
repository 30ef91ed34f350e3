"""Drop-ins for the functions of TRL that turn logits or hidden states into log-probabilities and entropy.

Same arguments and defaults as TRL 1.16; results are fp32 whatever the logits are, and differentiable. None needs TRL,
but where a call asks for what this package does not compute: that goes to TRL's own function, with one warning.
"""

import torch
from torch import Tensor

from mr1_fast.loss import linear_token_logprobs, token_logprobs

from . import warn_once
from .head import in_dtype_of


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of `index` (...) or (..., K) under logits (..., V) / temperature, in the shape of `index`.

    Where `row_mask`, (...) or in the shape of `index`, is 0, so is the result. Strided logits, such as a slice of
    positions, are read where they are.
    """
    several = index.ndim == logits.ndim
    targets = logits.detach().argmax(-1) if several else index
    logp, _ = _by_row(logits, targets, temperature)
    if several:
        # log p_k − log p_top needs the two logits alone; the largest one is never −inf.
        chosen, top = (
            logits.gather(-1, each).to(logp.dtype) for each in (index, targets.unsqueeze(-1))
        )
        logp = (chosen - top) / temperature + logp.unsqueeze(-1)
        row_mask = (
            row_mask.unsqueeze(-1)
            if row_mask is not None and row_mask.ndim < index.ndim
            else row_mask
        )
    return logp if row_mask is None else torch.where(row_mask != 0, logp, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy in nats of each row of logits (..., V): (...). `chunk_size` is TRL's, and not needed here."""
    return _by_row(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64), 1.0)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one read of logits (..., V), for `index` (...); rows where `row_mask` (...) is 0 give 0."""
    results = _by_row(logits, index, temperature)
    if row_mask is not None:
        results = tuple(torch.where(row_mask != 0, each, 0.0) for each in results)
    logp, entropy = results
    return logp, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """TRL's autograd function over hidden states: `ChunkedLogProbFunction.apply(...)`."""

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
        """Log-probs and entropy (N,) of hidden (N, H) @ weight (V, H)ᵀ + bias; three Nones for what is not asked.

        `outputs` beyond "log_probs" and "entropy", and soft-capped logits, are TRL's own work. `chunk_size` is not
        needed: logits exist for as many whole rows as 512 MB hold (48 MB on a CPU).
        """
        beyond = set(outputs) - {"log_probs", "entropy"}
        if beyond or final_logit_softcapping is not None or not logit_scale > 0:
            from trl.kernels import ChunkedLogProbFunction as TRLFunction

            warn_once(
                "ChunkedLogProbFunction uses TRL's own code: mr1_fast computes no "
                + (", ".join(sorted(beyond)) or "soft-capped or unscaled logits")
            )
            return TRLFunction.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        weight, bias = in_dtype_of(hidden, weight, bias)
        logp, entropy = linear_token_logprobs(
            hidden, weight, targets.long(), temperature / logit_scale, bias
        )
        return logp, entropy if "entropy" in outputs else None, None, None, None


def _by_row(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each row, in the shape of `targets`, without a copy of the logits."""
    try:
        rows = logits.view(targets.numel(), logits.shape[-1])
    except (
        RuntimeError
    ):  # a slice: one call for each part of the first dimension, whose gradients are stacked once
        parts = [
            _by_row(*each, temperature)
            for each in zip(logits.unbind(), targets.unbind(), strict=True)
        ]
        return tuple(torch.stack(each) for each in zip(*parts, strict=True))
    return tuple(
        each.view(targets.shape) for each in token_logprobs(rows, targets.reshape(-1), temperature)
    )
