"""The weight β of the KL at each optimizer step: by the step alone, or by what a run measures.

`DynamicKL` is GRPO-D's (OThink-MR1, arXiv 2503.16081). `AccuracyKL` and `TargetKL` are feedback:
they are told what each step has measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, tanh
from typing import Literal, get_args

BetaShape = Literal["grpo-d", "linear-up", "linear-down", "reversed"]
"""A path of β that depends on the step alone: GRPO-D's, or one of three to compare it with."""

TARGET_RATE = 0.1
"""K_β of Ziegler et al.: β changes by at most this times TARGET_CLIP, 2%, at an optimizer step."""
TARGET_CLIP = 0.2
"""Largest relative error of the KL that counts (Ziegler et al.)."""


class KLSchedule:
    """β as a function of the optimizer step, which may also depend on what the run has measured."""

    beta_max: float
    """The largest β that there may be; with 0 there is no KL, and no reference is needed."""

    def __call__(self, step: int) -> float:
        """Return β for the step after `step` ≥ 0 completed optimizer steps."""
        raise NotImplementedError

    def observe_accuracy(self, accuracy: float) -> None:
        """Take the share, 0 to 1, of a step's completions that are right, before its updates."""

    def observe_kl(self, kl: float) -> None:
        """Take the mean KL per token, in nats, that an optimizer step has measured."""

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold for β to go on as it would have."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a state that `state` has returned; raises ValueError for any other."""


@dataclass(frozen=True)
class DynamicKL(KLSchedule):
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
        _check_bounds(self.beta_min, self.beta_max)
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


class AccuracyKL(KLSchedule):
    """The weight β(a) of the KL at a step whose completions are right in the share a, 0 to 1.

    It is the accuracy-conditioned scaling (AKL) of FG-ExPO (arXiv 2605.11403, equations 4 and 8;
    EXPO, arXiv 2605.09923): a policy that fails may leave its reference, one that succeeds is kept
    near it. The paper has

        β(a) = β·(1 + tanh a)/2          from 0.5·β at a = 0 to 0.881·β at a = 1

    Here the same curve goes from β_min at a = 0 to β_max at a = 1:

        β(a) = β_min + (β_max − β_min)·tanh(a)/tanh(1)

    which is the paper's for β_min = β/2 and β_max = β·(1 + tanh 1)/2; its β of 0.02 gives 0.01 and
    0.01762. As in the paper, a is the accuracy of the step's own completions, so nothing is carried
    from step to step. Before the first step a is 0.

    Raises ValueError for a negative or non-finite β, and for β_min > β_max.

    >>> schedule = AccuracyKL(beta_min=0.04, beta_max=0.1)
    >>> schedule.observe_accuracy(0.5)
    >>> round(schedule(step=0), 4)
    0.0764
    """

    def __init__(self, beta_min: float, beta_max: float):
        _check_bounds(beta_min, beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max
        self.accuracy = 0.0

    def __call__(self, step: int) -> float:
        """Return β for the accuracy that was observed last."""
        share = tanh(self.accuracy) / tanh(1.0)
        return self.beta_min + (self.beta_max - self.beta_min) * share

    def observe_accuracy(self, accuracy: float) -> None:
        """Take the accuracy that the coming updates go by; raises ValueError outside [0, 1]."""
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy must lie in [0, 1], got {accuracy}")
        self.accuracy = accuracy


class TargetKL(KLSchedule):
    """The weight β of the KL that keeps the KL near a target, in nats per token.

    It is the controller of Ziegler et al. (2019, arXiv 1909.08593, section 2.2), which TRL's PPO
    had and verl has. After each optimizer step, whose KL is k,

        β ← β·(1 + 0.1·clip(k/target − 1, −0.2, 0.2))

    and β is then held within [β_min, β_max]. It begins at (β_min + β_max)/2. A KL that is not
    finite changes nothing.

    Raises ValueError for a β_min that is not above 0, which no factor could leave, for β_min >
    β_max, and for a target that is not above 0.

    >>> schedule = TargetKL(beta_min=0.01, beta_max=0.1, target=0.02)
    >>> schedule.observe_kl(0.022)
    >>> round(schedule(step=1), 5)
    0.05555
    """

    def __init__(self, beta_min: float, beta_max: float, target: float):
        _check_bounds(beta_min, beta_max)
        if beta_min == 0:
            raise ValueError(
                "beta_min is 0, which the factors of target-kl could never leave: pass "
                "--beta-min 0.001 or another number above 0"
            )
        if not 0 < target < float("inf"):
            raise ValueError(f"target must be finite and greater than 0, got {target}")
        self.beta_min, self.beta_max, self.target = beta_min, beta_max, target
        self.beta = (beta_min + beta_max) / 2

    def __call__(self, step: int) -> float:
        """Return β as the optimizer steps that were observed so far have left it."""
        return self.beta

    def observe_kl(self, kl: float) -> None:
        """Change β after an optimizer step that has measured this KL."""
        if not isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -TARGET_CLIP), TARGET_CLIP)
        self._set(self.beta * (1 + TARGET_RATE * error))

    def state(self) -> dict[str, float]:
        """Return β, which depends on every step so far."""
        return {"beta": self.beta}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from the β of a checkpoint, within the bounds that hold now."""
        beta = state.get("beta")
        if not isinstance(beta, float) or not 0 < beta < float("inf"):
            raise ValueError(f"the KL weight of target-kl is {beta!r}")
        self._set(beta)

    def _set(self, beta: float) -> None:
        self.beta = min(max(beta, self.beta_min), self.beta_max)


def _check_bounds(beta_min: float, beta_max: float) -> None:
    if not (isfinite(beta_min) and isfinite(beta_max) and 0 <= beta_min <= beta_max):
        raise ValueError(
            f"need 0 <= beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}"
        )
