"""Settings of the objective, and the algorithms, each of which is a bundle of them.

The formulas stand at `policy_loss_ref` and `token_weights`; docs/objectives.md has it all.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError

Algorithm = Literal["grpo-d", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "sft"]

BetaPath = Literal[
    "constant", "grpo-d", "linear-up", "linear-down", "reversed", "accuracy", "target-kl"
]

GRPO: dict[str, Any] = dict(
    loss_type="grpo",
    surrogate="clip",
    ratio="token",
    clip_low=0.2,
    clip_high=0.2,
    advantage="group-std",
    skip_equal_groups="keep",
    overlong_penalty=0.0,
    beta_shape="constant",
    beta=0.04,
)
"""The settings of plain GRPO (DeepSeekMath, arXiv 2402.03300), from which the others differ."""

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo-d": GRPO | dict(beta_shape="grpo-d"),
    "grpo": GRPO,
    "dr-grpo": GRPO | dict(loss_type="dr_grpo", advantage="group-mean", beta=0.0),
    "dapo": GRPO
    | dict(
        loss_type="dapo",
        clip_high=0.28,
        skip_equal_groups="refill",
        overlong_penalty=0.2,
        beta=0.0,
    ),
    "gspo": GRPO | dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4, beta=0.0),
    "cispo": GRPO | dict(loss_type="dapo", surrogate="cispo", clip_high=4.0, beta=0.0),
    "sft": GRPO,
}
"""What each algorithm sets, by its name; a setting that is given itself counts more.

- grpo-d: GRPO with the schedule of β (OThink-MR1, arXiv 2503.16081)
- dr-grpo: no division by lengths and standard deviations (arXiv 2503.20783)
- dapo: clip-higher, a mean over tokens, groups without a signal replaced, and a soft penalty of
  overlong completions (arXiv 2503.14476)
- gspo: a ratio per sequence (arXiv 2507.18071)
- cispo: the capped, detached ratio of MiniMax-M1 (arXiv 2506.13585); its cap of 5, 1 + clip_high,
  is ScaleRL's (arXiv 2510.13786)
"""


@dataclass
class ObjectiveConfig:
    """What the loss is. The defaults are those of --algo."""

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo"] | None = None
    """Average of a step's tokens: the mean over sequences of each one's mean (grpo), of its sum
    over --max-new-tokens (dr_grpo) or of its sum (luspo, with ratio sequence alone); the mean over
    all tokens (dapo); or the mean over groups of the mean over a group's tokens (bnpo)."""
    surrogate: Literal["clip", "cispo", "sapo"] | None = None
    """Policy term of a token: the clipped ratio (clip), its capped and detached ratio times the
    log-probability (cispo, with loss_type dapo), or a soft gate (sapo, with loss_type grpo)."""
    ratio: Literal["token", "sequence"] | None = None
    """Whether the ratio π/π_old is that of a token, or the geometric mean of its sequence, which
    costs one more matrix product at the head."""
    clip_low: float | None = None
    """Distance below 1 at which the ratio π/π_old is clipped."""
    clip_high: float | None = None
    """Distance above 1 at which the ratio π/π_old is clipped; with surrogate cispo, capped."""
    clip_delta: float | None = None
    """Upper bound on the ratio where the advantage is negative, such as 4 (INTELLECT-2), which
    clip_high does not bound; null is off. Only with surrogate clip, and above 1 + clip_high."""
    advantage: Literal["group-std", "group-mean", "batch-std"] | None = None
    """Advantage of a completion: its reward minus its group's mean, divided by its group's standard
    deviation (group-std), by that of the whole step (batch-std), or by nothing (group-mean)."""
    mask_truncated: bool = False
    """Take completions that were cut at --max-new-tokens out of the loss; their rewards still count
    in the advantages of their group."""
    skip_equal_groups: Literal["keep", "drop", "refill"] | None = None
    """What happens to groups whose rewards are all equal, which have no advantages: they stay for
    their KL (keep), are left out of the loss (drop), or are replaced by groups of further prompts,
    which are sampled until the step is full, in at most three rounds (refill)."""
    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of the step's tokens, which is subtracted from the loss, whatever
    --loss-type; 0 is off, and other values cost one more matrix product at the head."""

    def check_objective(self) -> None:
        """Raise UserError for an objective that does not exist."""
        averaged = _AVERAGED_AS.get(self.surrogate)
        if averaged is not None and self.loss_type != averaged:
            raise UserError(
                f"surrogate {self.surrogate} is averaged over {_TOKENS_OF[averaged]}, but "
                f"loss_type is {self.loss_type}: pass --loss-type {averaged}."
            )
        if self.loss_type == "luspo" and self.ratio != "sequence":
            raise UserError(
                "loss_type luspo sums over the tokens of a sequence, which share their ratio, but "
                f"ratio is {self.ratio}: pass --ratio sequence."
            )
        if self.clip_high < (-1 if self.surrogate == "cispo" else 0):
            raise UserError(f"clip_high is {self.clip_high}, but must not be negative.")
        if self.clip_delta is None:
            return
        if self.surrogate != "clip":
            raise UserError(
                f"clip_delta bounds the ratio of surrogate clip, not of {self.surrogate}: leave "
                "it out."
            )
        if self.clip_delta <= 1 + self.clip_high:
            raise UserError(
                f"clip_delta is {self.clip_delta}, a bound on the ratio itself, but must be above "
                f"1 + clip_high = {1 + self.clip_high:g}, where positive advantages are clipped."
            )


_AVERAGED_AS = {"cispo": "dapo", "sapo": "grpo"}
"""The loss_type of surrogates that have but one average, in their papers and in TRL."""
_TOKENS_OF = {"dapo": "all tokens of the step", "grpo": "the tokens of each sequence"}


@dataclass
class KLConfig:
    """How the weight β of the KL changes over the steps."""

    beta_shape: BetaPath | None = None
    """Path of the KL weight: none (constant); the paper's, from mean to min to max (grpo-d); from
    min to max (linear-up); from max to min (linear-down); the paper's backwards in time (reversed);
    from min at a step without a right answer to max where all are right (accuracy, FG-ExPO's); or
    from the mean to whatever between min and max keeps the KL near its target (target-kl)."""
    beta: float | None = None
    """KL weight with --beta-shape constant, which is that of --algo grpo; 0 needs no reference
    model."""
    beta_min: float = 0.04
    """Lowest KL weight; that of grpo-d reaches it at the end of the exploration steps."""
    beta_max: float = 0.1
    """Highest KL weight; that of grpo-d reaches it at the end of training."""
    explore_fraction: float = 0.3
    """Share of the steps in which the KL weight of grpo-d falls (w/t); it rises in the rest."""
    target_kl: float = 0.01
    """KL per token that --beta-shape target-kl aims at, in nats."""
