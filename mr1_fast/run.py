"""What the steps of a training run share: its settings, the policy and all that they change."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .checkpoint import Stateful, save_checkpoint
from .config import TrainConfig
from .distributed import SINGLE, World
from .distributed.sharding import Sharding
from .divergence import Divergence, not_finite
from .errors import UserError
from .kl_schedule import KLSchedule
from .learning_signal import LearningSignal
from .log import RunLog
from .loss_scale import LossScale
from .model.policy import Policy
from .model.reference import Reference
from .plan.out_of_memory import MemoryLimits
from .plan.run_memory import RunMemory
from .progress import Progress
from .stopping import StopSignals, TimeLimit
from .tasks.data import DrawnExamples, LoadedExamples
from .types import Example

End = Literal["", "finished", "patience", "signal", "time"]
"""Why a run takes no more steps: all are done, the accuracy has not risen for as long as `patience`
says, it was told to stop, or its time is up; "" if it goes on."""


@dataclass
class Run:
    """A training run: its settings, the policy and all that its steps read or change.

    `prepare` in preparing.py fills in all of it. A run that is made for one stage alone, as
    benchmarks do, may leave out what that stage does not use.
    """

    config: TrainConfig
    policy: Policy
    limits: MemoryLimits
    """How many tokens are computed on at once; halved where memory runs out."""
    world: World = SINGLE
    """The processes that train together."""
    sharding: Sharding | None = None
    """Which part of weights and optimizer each of them has."""
    optimizer: torch.optim.Optimizer | None = None
    reference: Reference | None = None
    """The policy as it was before training; None where the loss has no KL term."""
    schedule: KLSchedule | None = None
    """β as a function of the optimizer step, and maybe of what was measured before it."""
    loss_scale: LossScale | None = None
    """By what a float16 policy's loss is scaled; None in every other dtype."""
    source: DrawnExamples | LoadedExamples | None = None
    """Where the examples of each step come from."""
    held_out: list[Example] = field(default_factory=list)
    """Items that are evaluated before and after training, and on the way."""
    progress: Progress = field(default_factory=Progress)
    """What the evaluations so far have shown."""
    signals: StopSignals = field(default_factory=StopSignals)
    """Whether the run was told to stop."""
    learning_signal: LearningSignal = field(default_factory=lambda: LearningSignal(0))
    """Whether there is anything to learn from."""
    divergence: Divergence = field(default_factory=Divergence)
    """Whether steps still change the weights."""
    time_limit: TimeLimit = field(default_factory=TimeLimit)
    """When it must be over, and how long its parts take."""
    log: RunLog | None = None
    memory: RunMemory | None = None
    """The memory plan, and beside it what the steps have used."""
    identity: dict[str, Any] = field(default_factory=dict)
    """The settings and the data by which it is this run, so that no other one is resumed."""
    start_fingerprint: str = ""
    """Identifies the model that training started from, so that no other one is resumed."""
    first_step: int = 0
    """The first step to do: 0, or where the checkpoint of a resumed run was saved."""
    saved: int = 0
    """After how many steps the last checkpoint was saved; the start needs none."""

    def __post_init__(self) -> None:
        if self.sharding is None and self.policy is not None:
            self.sharding = Sharding(self.policy.model, self.world)

    def processes(self) -> dict[str, int | str] | None:
        """Return how many processes train, and how they are sharded; None for one alone."""
        if self.world.size == 1:
            return None
        return {"processes": self.world.size, "sharding": self.sharding.kind}

    def recompute_all(self) -> str:
        """Run all layers again in the backward pass from now on, if the settings leave it open.

        Returns what that changes, in words; "" for nothing.
        """
        changes = self.config.recompute == "auto" and self.policy.recompute_all()
        return "all layers recomputed" if changes else ""

    def save(self, steps_done: int) -> None:
        """Write the checkpoint of the state after `steps_done` steps, unless it is there."""
        if self.saved == steps_done:
            return
        self.require_numbers(steps_done)
        with self.time_limit.measure("save"):
            save_checkpoint(
                self.log.checkpoints,
                steps_done,
                self.sharding,
                self.optimizer,
                self.start_fingerprint,
                checkpoint_parts(self.schedule, self.loss_scale, self.divergence),
                self.identity,
                previous=self.saved,
            )
        self.saved = steps_done

    def save_is_due(self, steps_done: int) -> bool:
        """Say whether a checkpoint is due; under `max_hours` the first step shows its time.

        While steps are skipped none is due: the checkpoints from before must not go.
        """
        if self.divergence.skipped:
            return False
        every = self.config.save_every
        is_due = every and steps_done // every > self.saved // every
        return bool(is_due) or self.time_limit.must_learn("save")

    def look_at(self, step: int, metrics: dict[str, float]) -> None:
        """Say so once if the metrics of a step show that nothing is learnt.

        Raises UserError, on every process, if they show that the run has diverged.
        """
        for warning in self.learning_signal.look(metrics):
            self.log.say(warning)
        ends = self.divergence.observe(metrics)
        if self.divergence.skipped == 1:  # it may be by weights that an earlier step has spoilt
            self.require_numbers(step + 1)
        if ends:
            causes = f"a learning rate of {self.config.learning_rate:g}"
            if metrics.get("beta"):
                causes += f" or a β of {metrics['beta']:.3g}"
            if "loss_scale" in metrics:
                causes += " (or the range of float16 too narrow: --dtype float32)"
            raise UserError(
                f"training has diverged: {self.divergence.skipped} steps in a row, up to step "
                f"{step}, changed no weight, since loss or gradients were NaN or infinite; "
                f"{causes} may be too high; {self.way_back('lower ones')}."
            )

    def require_numbers(self, steps_done: int) -> None:
        """Raise UserError, on every process, unless all trained weights are finite."""
        weights = ((part.name, part.weight) for part in self.sharding.parts)
        if name := not_finite(weights, self.world):
            raise UserError(
                f"training has diverged: after {steps_done} steps {name} has weights that are NaN "
                f"or infinite; {self.way_back()}."
            )

    def way_back(self, other: str = "a lower --learning-rate") -> str:
        """Say which checkpoint is left of a run that has diverged, and with what to begin anew."""
        kept = "no checkpoint was saved before"
        if self.saved:
            kept = f"the checkpoint of step {self.saved} in {self.log.checkpoints} is kept"
        return f"{kept}: begin another run with {other}"

    def evaluation_is_due(self, steps_done: int) -> bool:
        """Say whether an evaluation on the way is due after `steps_done` steps, and not yet made.

        That of the last step is the one after training, unless it must tell which step is best.
        """
        config = self.config
        if steps_done in self.progress.accuracies or not self.held_out or not config.eval_every:
            return False
        if steps_done == config.steps:
            return config.keep_best
        return steps_done % config.eval_every == 0

    def end(self, steps_done: int) -> End:
        """Say why the run ends after `steps_done` steps, if it does, on every process alike."""
        self.signals.agree(self.world.most)
        ends = self.world.gather(self._own_end(steps_done))
        return "time" if "time" in ends else ends[0]

    def _own_end(self, steps_done: int) -> End:
        """Say why the run ends by what this process knows: clocks differ."""
        config, limit = self.config, self.time_limit
        if self.signals.agreed:
            return "signal"
        finished = steps_done >= config.steps
        patience = bool(config.patience) and self.progress.waiting >= config.patience
        if finished or patience:  # two saves: a checkpoint, and final/
            rest = ["save", "save", "greedy evaluation", "sampled evaluation"]
        else:
            due = self.evaluation_is_due(steps_done + 1)
            rest = ["step", "save", *["greedy evaluation"] * due]
        if not limit.leaves(*rest):
            return "time"
        return "finished" if finished else "patience" if patience else ""


def checkpoint_parts(
    schedule: KLSchedule, loss_scale: LossScale | None, divergence: Divergence
) -> dict[str, Stateful]:
    """Return all that a checkpoint keeps beside weights and optimizer, by its name there."""
    parts: dict[str, Stateful] = {"kl_schedule": schedule, "divergence": divergence}
    if loss_scale:
        parts["loss_scale"] = loss_scale
    return parts
