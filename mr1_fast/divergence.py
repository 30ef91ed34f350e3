"""Ends a run that has diverged, before a weight that is no number reaches the disk.

A step whose loss or gradients are not finite changes no weight (optim.py). One such step is bad
luck; many in a row mean that nothing is learnt any more. While they go on, no checkpoint is due, so
that those from before them stay.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .distributed import World
from .distributed.sharding import local
from .errors import UserError

MOST_SKIPPED = 10
"""How many steps in a row may be skipped; a shorter run ends when all of its steps are."""


class NoNumbers(UserError):
    """Logits are NaN, of which a rollout can draw nothing; it is not said yet when that was."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say in the message of NoNumbers where it came up, such as "in step 3"."""
    try:
        yield
    except NoNumbers as error:
        raise UserError(f"{where}, {error}") from error


class Divergence:
    """Counts the steps in a row that were skipped; checkpoints keep the count.

    >>> watched = Divergence(total_steps=3)
    >>> lost = {"loss": math.nan, "grad_norm": math.nan, "skipped": 1.0}
    >>> [watched.observe(lost) for step in range(3)]
    [False, False, True]
    """

    def __init__(self, total_steps: int = MOST_SKIPPED):
        self.limit = min(MOST_SKIPPED, total_steps)
        self.limit_in_all = max(MOST_SKIPPED, total_steps)
        self.skipped = 0
        """How many steps in a row were skipped up to now."""
        self._counted = 0
        """Those of them that no smaller loss scale can help."""

    def observe(self, metrics: Mapping[str, float]) -> bool:
        """Take note of a step by its metrics; returns whether too many in a row were skipped.

        A step of groups without a signal has no gradient, and is no sign of anything. In float16 a
        step may be skipped to find the loss scale, as long as that can become smaller, and some
        other step is not skipped.
        """
        if "grad_norm" not in metrics:
            return False
        if not metrics["skipped"]:
            self.skipped = self._counted = 0
            return False
        self.skipped += 1
        self._counted += metrics.get("loss_scale", 1.0) <= 1.0
        return self._counted >= self.limit or self.skipped >= self.limit_in_all

    def state(self) -> dict[str, float]:
        """Return the counts for a checkpoint; none where the last step was not skipped."""
        return {"skipped": self.skipped, "counted": self._counted} if self.skipped else {}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from counts that `state` has returned; raises ValueError for any others."""
        if state.keys() != {"skipped", "counted"} or not all(n >= 0 for n in state.values()):
            raise ValueError("the counts of skipped steps are damaged")
        self.skipped, self._counted = int(state["skipped"]), int(state["counted"])


@torch.no_grad()
def not_finite(named_tensors: Iterable[tuple[str, Tensor]], world: World) -> str:
    """Return the name of a tensor that has NaN or inf on any process; "" where none has.

    It is collective, and waits for the device once.
    """
    found = [(name, local(tensor)) for name, tensor in named_tensors]
    found = [(name, each) for name, each in found if each.is_floating_point() and each.numel()]
    bounds = [torch.stack(each.aminmax()) for _, each in found]  # NaN stays
    is_sound = torch.ones(0, dtype=torch.bool)
    if bounds:
        is_sound = torch.stack([each.to(bounds[0].device) for each in bounds]).isfinite().all(1)
    sound = is_sound.tolist()
    if not world.most(not all(sound)):
        return ""
    mine = next((name for (name, _), fine in zip(found, sound, strict=True) if not fine), "")
    return next(filter(None, world.gather(mine)))
