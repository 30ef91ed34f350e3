"""GRPO-D's weight β of the KL at each optimizer step (OThink-MR1, arXiv 2503.16081)."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

BetaShape = Literal["grpo-d", "linear-up", "linear-down", "reversed"]
"""The path that β takes: GRPO-D's, or one of three others to compare it with."""


@dataclass(frozen=True)
class DynamicKL:
    """The weight β(s) of the KL at optimizer step s.

    It falls from (β_min + β_max)/2 to β_min over the first `explore_fraction` of training and then
    rises to β_max. With w = explore_fraction·t exploration steps of t total steps and β_mid =
    (β_min + β_max)/2:

        β(s) = β_mid − (β_mid − β_min)·s/w               for s ≤ w
        β(s) = β_min + (β_max − β_min)·(s − w)/(t − w)   for w < s ≤ t

    The paper uses w/t = 0.3, with (β_min, β_max) = (0.04, 0.1) for counting and (0, 0.02) for
    geometry. Steps beyond t keep β(t), which is β_max. With β_min = β_max the weight is constant:
    plain GRPO.

    This path is the `shape` "grpo-d". The others show, in ablations, what its turn and its
    direction are worth:

        linear-up     β(s) = β_min + (β_max − β_min)·s/t   GRPO-D with w = 0
        linear-down   β(s) = β_max − (β_max − β_min)·s/t   linear-up backwards: t − s for s
        reversed      β(s) = β_grpo-d(t − s)               β_max, β_min at t − w, β_mid from t on

    The linear shapes do not use explore_fraction.

    Raises ValueError for a negative or non-finite β, β_min > β_max, total_steps < 1, a fraction
    outside [0, 1], or an unknown shape.

    >>> schedule = DynamicKL(beta_min=0.04, beta_max=0.1, total_steps=100)
    >>> [round(schedule(step), 3) for step in (0, 15, 30, 65, 100)]
    [0.07, 0.055, 0.04, 0.07, 0.1]
    """

    beta_min: float
    beta_max: float
    total_steps: int
    explore_fraction: float = 0.3
    shape: BetaShape = "grpo-d"

    def __post_init__(self):
        if not (
            isfinite(self.beta_min)
            and isfinite(self.beta_max)
            and 0 <= self.beta_min <= self.beta_max
        ):
            raise ValueError(
                f"need 0 <= beta_min <= beta_max, got beta_min={self.beta_min}, "
                f"beta_max={self.beta_max}"
            )
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.explore_fraction <= 1:
            raise ValueError(f"explore_fraction must lie in [0, 1], got {self.explore_fraction}")
        if self.shape not in get_args(BetaShape):
            raise ValueError(
                f"shape must be one of {', '.join(get_args(BetaShape))}, got {self.shape!r}"
            )

    def __call__(self, step: int) -> float:
        """Return β for the step after `step` ≥ 0 completed optimizer steps."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        is_linear = self.shape.startswith("linear")
        explore_steps = 0 if is_linear else self.explore_fraction * self.total_steps
        step = min(step, self.total_steps)
        if self.shape in ("linear-down", "reversed"):
            step = self.total_steps - step
        if step <= explore_steps and explore_steps > 0:
            beta_mid = (self.beta_min + self.beta_max) / 2
            return beta_mid - (beta_mid - self.beta_min) * step / explore_steps
        if step == explore_steps:  # no exploration: the path starts at β_min
            return self.beta_min
        rising_steps = self.total_steps - explore_steps
        return (
            self.beta_min + (self.beta_max - self.beta_min) * (step - explore_steps) / rising_steps
        )
