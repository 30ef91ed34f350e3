"""What the loss depends on beside its logits, and what it yields.

These types travel between the public functions of `mr1_fast.loss` and the kernels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import statistics_dtype

KL_LOG_RATIO_LIMIT = 20.0
"""Bound on |log π_ref − log π_θ| inside k3, whose exponential would overflow: exp(20) is 5e8."""

BANNED = -1e30
"""Finite stand-in for the log-probability −inf where it is multiplied by its probability, 0."""

SURROGATES = ("clip", "cispo", "sapo")
"""The surrogates, in the order of their numbers in csrc/grpo_token.h.

Their formulas stand at `reference.policy_loss_ref`.
"""


class Objective(NamedTuple):
    """What the loss of N tokens depends on beside their logits and targets.

    The public functions of `mr1_fast.loss` build it; `mr1_fast.loss.arguments.check_objective`
    brings it into the form that the kernels take: tensors contiguous, on the logits' device, fp32
    (fp64 for fp64 logits). β and temperature are tensors, since a kernel that reads them at run
    time need not be compiled again when they change.
    """

    advantages: Tensor
    """(N,) advantage of each token's completion."""

    token_weights: Tensor
    """(N,) factor of each token's loss; a token of weight 0 contributes exactly 0."""

    beta: Tensor
    """() weight of the KL."""

    temperature: Tensor
    """() what the logits are divided by."""

    old_logp: Tensor | None = None
    """(N,) log-probability of each token at sampling; None: the policy's own, so that ρ is 1."""

    ref_logp: Tensor | None = None
    """(N,) log-probability of each token in the reference model; None: no KL."""

    is_weights: Tensor | None = None
    """(N,) importance-sampling weight, a factor of the surrogate; None: 1."""

    surrogate: str = "clip"
    """One of SURROGATES."""

    clip_low: float = 0.2
    """ε_low; clip bounds ρ below by 1 − ε_low."""

    clip_high: float = 0.2
    """ε_high; clip and cispo bound ρ above by 1 + ε_high."""

    delta: float = math.inf
    """δ, clip's bound on ρ above for every sign of the advantage; inf: none."""

    tau_positive: float = 1.0
    """sapo's temperature τ for positive advantages."""

    tau_negative: float = 1.05
    """sapo's temperature τ for all other advantages."""

    bias_corrected_kl: bool = False
    """Whether k3 is multiplied by ρ."""

    def rows(self, rows: slice) -> "Objective":
        """Return the objective of some of the tokens, as views."""
        return self._replace(
            advantages=self.advantages[rows],
            token_weights=self.token_weights[rows],
            old_logp=None if self.old_logp is None else self.old_logp[rows],
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            is_weights=None if self.is_weights is None else self.is_weights[rows],
        )


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    float: "float",
    bool: "bool",
}

OBJECTIVE_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in Objective.__annotations__.items()
)
"""The fields of Objective as arguments in the schema of an operator, which can take no objects."""


class GRPOLoss(NamedTuple):
    """The results of a loss over N tokens; all but `loss` are detached."""

    loss: Tensor
    """() Σ token_weights · (is_weights · surrogate + β·k3)."""

    logp: Tensor
    """(N,) log-probability of each target, at the temperature."""

    entropy: Tensor
    """(N,) entropy of each row's distribution, in nats."""

    kl: Tensor
    """(N,) k3 of each token (times the ratio, with bias_corrected_kl); 0 without ref_logp."""

    clipped: Tensor
    """(N,) bool: the clip took the surrogate's gradient away (cispo: the cap acted on Â > 0)."""

    kl_limited: Tensor
    """(N,) bool: the log-ratio inside k3 hit its bound."""


class RowResults(NamedTuple):
    """The results of a row operation on N rows of logits, (N,) each: GRPOLoss before its sum."""

    loss: Tensor
    """(N,) weighted loss of each token."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: Tensor
    kl_limited: Tensor

    @classmethod
    def empty(cls, logits: Tensor) -> "RowResults":
        """Allocate the results of logits (N, V); fake ones for the fake logits of a compiler."""
        n, dtype = logits.shape[0], statistics_dtype(logits)
        return cls(
            *(logits.new_empty(n, dtype=dtype) for _ in range(4)),
            *(logits.new_empty(n, dtype=torch.bool) for _ in range(2)),
        )

    def rows(self, rows: slice) -> "RowResults":
        """Return views of some of the rows."""
        return RowResults(*(value[rows] for value in self))
