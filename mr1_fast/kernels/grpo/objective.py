"""What the loss of a token depends on, and what one pass over the tokens yields."""

from typing import NamedTuple

import torch

from ..dispatch import statistics_dtype

KL_LOG_RATIO_LIMIT = 20.0
"""Bound on |log π_ref − log π_θ| inside k3, whose exponential would overflow; exp(20) is already 5e8."""


BANNED = -1e30
"""Stands for the log-probability −inf where it is multiplied by its probability, 0."""


SURROGATES = ("clip", "cispo", "sapo")


class GRPOLoss(NamedTuple):
    """What one pass over the tokens yields; all but `loss` are detached."""

    loss: torch.Tensor
    """() Σ token_weights · (surrogate + β·k3)."""
    logp: torch.Tensor
    """(N,) log-probability of each target, at the temperature."""
    entropy: torch.Tensor
    """(N,) entropy of each row's distribution, in nats."""
    kl: torch.Tensor
    """(N,) k3 of each token (times the ratio, with bias_corrected_kl); 0 without ref_logp."""
    clipped: torch.Tensor
    """(N,) bool: the clip took the gradient of the surrogate away (cispo: the cap acted on a positive advantage)."""
    kl_limited: torch.Tensor
    """(N,) bool: the log-ratio inside k3 hit its bound."""


class Objective(NamedTuple):
    """What the loss of a token depends on beside its logits. Tensors are fp32; (N,) unless said."""

    advantages: torch.Tensor
    token_weights: torch.Tensor
    beta: torch.Tensor  # ()
    temperature: torch.Tensor  # ()
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    is_weights: torch.Tensor | None
    surrogate: str
    bounds: list[
        float
    ]  # clip_low, clip_high, delta, τ of sapo for positive and for other advantages
    bias_corrected_kl: bool

    def rows(self, rows: slice) -> "Objective":
        """The objective of some of the rows."""
        per_row = ("advantages", "token_weights", "old_logp", "ref_logp", "is_weights")
        return self._replace(
            **{
                name: getattr(self, name)[rows]
                for name in per_row
                if getattr(self, name) is not None
            }
        )


class RowResults(NamedTuple):
    """Per-row outputs of the fused loss, (N,) each; `loss` is weighted."""

    loss: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    kl_limited: torch.Tensor

    @classmethod
    def empty(cls, logits: torch.Tensor) -> "RowResults":
        """Room for the results of logits (N, V); fake ones for fake logits."""
        n, dtype = logits.shape[0], statistics_dtype(logits)
        return cls(
            *(logits.new_empty(n, dtype=dtype) for _ in range(4)),
            *(logits.new_empty(n, dtype=torch.bool) for _ in range(2)),
        )

    def rows(self, rows: slice) -> "RowResults":
        """Views of some of the rows."""
        return RowResults(*(value[rows] for value in self))
