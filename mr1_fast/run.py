"""What the steps of a training run share, and how it is put together from the settings."""

from dataclasses import dataclass, field

import torch

from .checkpoint import Part, fingerprint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data_check import check_data
from .errors import UserError, printable
from .kernels.self_test import self_test
from .kl_schedule import KLSchedule
from .log import RunLog
from .model.attention import attention_kernel
from .model.device import resolve_device
from .model.forward import lm_head_weight
from .model.policy import Policy
from .model.reference import Reference
from .optim import make_optimizer
from .peak_flops import describe_peak
from .plan.out_of_memory import MemoryLimits
from .plan.run_memory import RunMemory
from .push.upload import require_repository
from .rewards import load_plugin, require_rewards
from .rollout.engine import describe_decoding
from .start import load_policy
from .tasks import get_task
from .tasks.data import DrawnExamples, LoadedExamples, configured_examples
from .types import Example


@dataclass
class Run:
    """A training run: its settings, the policy and all that its steps read or change.

    `prepare` fills in all of it. A run that is made for one stage alone, as benchmarks do, may
    leave out what that stage does not use.
    """

    config: TrainConfig
    policy: Policy
    limits: MemoryLimits
    """How many tokens are computed on at once; halved where memory runs out."""
    optimizer: torch.optim.Optimizer | None = None
    reference: Reference | None = None
    """The policy as it was before training; None where the loss has no KL term."""
    schedule: KLSchedule | None = None
    """β as a function of the optimizer step, and maybe of what was measured before it."""
    source: DrawnExamples | LoadedExamples | None = None
    """Where the examples of each step come from."""
    held_out: list[Example] = field(default_factory=list)
    """Items that are evaluated before and after training."""
    log: RunLog | None = None
    memory: RunMemory | None = None
    """The memory plan, and beside it what the steps have used."""
    start_fingerprint: str = ""
    """Identifies the model that training started from, so that no other one is resumed."""
    first_step: int = 0
    """The step that comes next: 0, or where the checkpoint of a resumed run was saved."""

    def recompute_all(self) -> str:
        """Run all layers again in the backward pass from now on, if the settings leave it open.

        Returns what that changes, in words; "" for nothing.
        """
        changes = self.config.recompute == "auto" and self.policy.recompute_all()
        return "all layers recomputed" if changes else ""

    def save(self, steps_done: int) -> None:
        """Write the checkpoint of the state after `steps_done` steps."""
        save_checkpoint(
            self.log.checkpoints,
            steps_done,
            self.policy.model,
            self.optimizer,
            self.start_fingerprint,
            checkpoint_parts(self.schedule),
        )


def checkpoint_parts(schedule: KLSchedule) -> dict[str, Part]:
    """Return all that a checkpoint keeps beside weights and optimizer, by its name there."""
    return {"kl_schedule": schedule}


def prepare(config: TrainConfig) -> Run:
    """Load data, model, optimizer and checkpoint as configured; nothing is written yet.

    Only the repository of --push-to-hub is created, where it does not exist. Raises UserError for
    settings, data, a repository or a model that cannot be used.
    """
    get_task(config.task)
    if config.plugin:
        load_plugin(config.plugin)
    require_rewards(config.extra_rewards)
    self_test(resolve_device(config), config.load_in_4bit)
    source, held_out = load_data(config)

    log = RunLog(config)
    check_data(source, config, say=log.say, needs_thinking=config.needs_thinking)
    check_data(held_out, config, config.eval_samples, log.say)
    if config.push_to_hub is not None:
        require_repository(config.push_to_hub)
    policy = load_policy(config)
    start_fingerprint = fingerprint(policy.model)
    reference = Reference(policy, config.reference) if config.needs_reference else None
    optimizer = make_optimizer(policy.model, config, config.seed)
    schedule, first_step = config.kl_schedule(), 0
    if log.resuming:
        first_step = load_checkpoint(
            log.checkpoints,
            policy.model,
            optimizer,
            start_fingerprint,
            checkpoint_parts(schedule),
        )
    # Drawn prompts differ little: the first show whether they are too long.
    for example in source.take(first_step, config.prompts_per_step):
        policy.encode.length(example)

    memory = RunMemory(policy, config)
    memory.choice.apply(policy.layers)
    run = Run(
        config=config,
        policy=policy,
        limits=MemoryLimits(log.say, memory.advise, memory.amounts()),
        optimizer=optimizer,
        reference=reference,
        schedule=schedule,
        source=source,
        held_out=held_out.all(config.eval_samples) if held_out is not None else [],
        log=log,
        memory=memory,
        start_fingerprint=start_fingerprint,
        first_step=first_step,
    )
    first_prompt = policy.encode.rendered(source.all(1)[0])
    log.say(f"the first prompt:\n{printable(first_prompt)}\n")
    log.say(describe(run) + "\n" + memory.render())
    return run


def load_data(
    config: TrainConfig,
) -> tuple[DrawnExamples | LoadedExamples, DrawnExamples | LoadedExamples | None]:
    """Return where training items and held-out items come from; None for no evaluation."""
    source = configured_examples(config, "train", limit=config.train_samples)
    if config.needs_thinking:
        source.require_thinking()
    held_out = held_out_examples(config)
    return source, held_out


def held_out_examples(config: TrainConfig) -> DrawnExamples | LoadedExamples | None:
    """Return where a run's held-out items come from, or None if it evaluates none.

    Raises UserError where there are none though it should.
    """
    if not config.eval_samples:
        return None
    try:
        return configured_examples(config, "test", config.eval_data)
    except UserError as error:
        raise UserError(
            f"{error} This is about held-out data: name some with --eval-data, or pass "
            "--eval-samples 0."
        ) from error


def describe(run: Run) -> str:
    """Say what was chosen where the settings leave a choice, and how decoding computes layers.

    On a GPU a last line says which peak MFU is measured by, or that there is none.
    """
    if run.reference is None:
        kept = "none"
    elif run.config.lora:
        kept = "the policy without adapters"
    else:
        kept = run.config.reference
    device, dtype = run.policy.device, lm_head_weight(run.policy.model).dtype
    attention = attention_kernel(device.type, dtype)
    optimizer = type(run.optimizer).__name__
    lines = [
        f"optimizer {optimizer} · reference {kept} · packed attention {attention}",
        f"decoding {describe_decoding(run.policy.model)}",
    ]
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        lines.append(describe_peak(card, str(dtype).removeprefix("torch.")))
    return "\n".join(lines)
