"""How a training run begins: checks, data, models, optimizer, and where a resumed one goes on."""

from contextlib import ExitStack

import torch

from .checkpoint import fingerprint, load_checkpoint, require_weights
from .config import TrainConfig
from .data_check import check_data
from .distributed import World
from .distributed.launch import join_world, require_same
from .distributed.sharding import Sharding
from .divergence import Divergence, not_finite
from .errors import UserError, printable
from .identity import TRAINING_DATA, identity
from .kernels.self_test import self_test
from .learning_signal import LearningSignal
from .log import RunLog
from .loss_scale import LossScale
from .model.attention import attention_kernel
from .model.device import resolve_device, resolve_dtype
from .model.forward import lm_head_weight
from .model.policy import Policy
from .model.reference import Reference
from .model.save import check_save
from .model.spread import spread, where_to_load
from .optim import make_optimizer, state_block
from .own_python import remember_python
from .peak_flops import describe_peak
from .plan.choose_sharding import choose_sharding
from .plan.evaluations import describe_evaluations
from .plan.out_of_memory import KEPT, MemoryLimits
from .plan.run_memory import RunMemory
from .progress import Progress
from .push.upload import require_repository
from .resuming import AutoResumed, saved_steps
from .rewards import load_plugin, require_rewards
from .rollout.engine import describe_decoding
from .run import Run, checkpoint_parts
from .run_folder import run_folder
from .silent_log import SilentLog
from .start import load_policy
from .stopping import TimeLimit
from .tasks import get_task
from .tasks.data import DrawnExamples, LoadedExamples, configured_examples


def prepare(config: TrainConfig, world: World | None = None) -> Run:
    """Load data, model, optimizer and checkpoint as configured; nothing is written yet.

    Only the repository of --push-to-hub is created, where it does not exist. `world` are the
    processes that train together: by default, all that torchrun has started. Raises UserError for
    settings, data, a repository or a model that cannot be used.
    """
    time_limit = TimeLimit(config.max_hours)
    world = world or join_world(resolve_device(config).type)
    config.output = world.of_first(str(run_folder(config)))
    require_same(world, vars(config), "start all of them with the same settings and files")
    check_settings(config)
    log = RunLog(config) if world.is_first else SilentLog(config)
    with world.in_turn():
        source, held_out = load_data(config)
        check_data(source, config, say=log.say, needs_thinking=config.needs_thinking)
        check_data(held_out, config, config.eval_samples, log.say)
    data = {TRAINING_DATA: source, "the held-out data": held_out}
    read = {name: each.fingerprint() for name, each in data.items() if each is not None}
    require_same(world, read, "name the same files on all machines")
    if config.push_to_hub is not None and world.is_first:
        require_repository(config.push_to_hub)
    kind = choose_sharding(config, world)
    policy, reference, sharding, start_fingerprint = load_models(config, kind, world)
    optimizer = make_optimizer(policy.model, config, config.seed, sharding.parts)
    schedule = config.kl_schedule()
    loss_scale = LossScale() if resolve_dtype(config) == torch.float16 else None
    is_this = {**identity(config), TRAINING_DATA: read[TRAINING_DATA]}
    divergence = Divergence(config.steps)
    first_step, progress = 0, Progress()
    if log.resuming:
        parts = checkpoint_parts(schedule, loss_scale, divergence)
        fall_back = log.say if isinstance(config.resume, AutoResumed) else None
        first_step = load_checkpoint(
            log.checkpoints,
            sharding,
            optimizer,
            start_fingerprint,
            parts,
            is_this,
            fall_back,
        )
        world.in_all(lambda: log.check(first_step))
        saved = f"the checkpoint of step {first_step} in {log.checkpoints}"
        require_numbers(policy, world, saved, "delete it to go on from an earlier one")
        progress = load_progress(log, first_step, world, config.keep_best)
    if progress.seconds:  # of a sampled one nothing is written; it has as many answers
        for mode in ("greedy", "sampled"):
            time_limit.note(f"{mode} evaluation", progress.seconds)
    # Drawn prompts differ little: the first show whether they are too long.
    for entry in world.share(range(config.prompts_per_step)):
        (example,) = source.take(first_step * config.prompts_per_step + entry, 1)
        policy.encode.length(example)

    memory = RunMemory(policy, config, world, kind)
    memory.choice.apply(policy.layers)
    half = log.folder / KEPT if sharding.kind == "full" else None
    limits = MemoryLimits(log.say, memory.advise, memory.amounts(), world, half)
    limits.agree()
    run = Run(
        config=config,
        policy=policy,
        limits=limits,
        world=world,
        sharding=sharding,
        optimizer=optimizer,
        reference=reference,
        schedule=schedule,
        loss_scale=loss_scale,
        source=source,
        held_out=held_out.all(config.eval_samples) if held_out is not None else [],
        progress=progress,
        learning_signal=LearningSignal(config.steps - first_step),
        divergence=divergence,
        time_limit=time_limit,
        log=log,
        memory=memory,
        identity=is_this,
        start_fingerprint=start_fingerprint,
        first_step=first_step,
        saved=first_step,
    )
    first_prompt = policy.encode.rendered(source.all(1)[0])
    log.say(f"the first prompt:\n{printable(first_prompt)}\n")
    with sharding.whole_weights():
        described = describe(run)
    log.say(described + "\n" + memory.render())
    if evaluations := describe_evaluations(config, len(run.held_out)):
        log.say(evaluations)
    return run


def check_settings(config: TrainConfig) -> None:
    """Check all that needs neither data nor a model, and load the plugin.

    Raises UserError for a setting that cannot be used, and where a kernel computes wrong numbers.
    """
    get_task(config.task)
    check_save(config)
    config.check_dtype(str(resolve_dtype(config)).removeprefix("torch."))
    if config.plugin:
        load_plugin(config.plugin)
    require_rewards(config.extra_rewards)
    remember_python(config)
    self_test(resolve_device(config), config.load_in_4bit)


def load_progress(log: RunLog, first_step: int, world: World, keep_best: bool) -> Progress:
    """Read what the evaluations before `first_step` have shown.

    Raises UserError where the weights of the best one should be kept, but are not there, or are
    damaged, which would be found at the end of the run.
    """
    # A file system that is shared by machines may show others an earlier state.
    read = world.in_all(
        lambda: Progress.read(log.evaluations, first_step) if world.is_first else None
    )
    progress, kept = world.of_first((read, saved_steps(log.best)))
    best = progress.best()
    if not keep_best or best is None:
        return progress
    if best not in kept:
        raise UserError(
            f"keep_best is true, but the weights of the best evaluation so far, that after step "
            f"{best}, are not in {log.best}: resume without it."
        )
    require_weights(log.best, best, world)
    return progress


def load_models(
    config: TrainConfig, kind: str, world: World
) -> tuple[Policy, Reference | None, Sharding, str]:
    """Load policy and reference, spread over the processes, and the fingerprint of the start.

    Raises UserError where the processes do not start from the same.
    """
    where, mesh = where_to_load(config, kind, world)
    with ExitStack() as turn:
        turn.enter_context(world.in_turn() if mesh is None else world.one_by_one())
        policy = load_policy(where)
        if mesh is None:  # else the memory of a machine has room for the models of one process
            turn.close()
        start_fingerprint = fingerprint(policy.model)
        reference = Reference(policy, config.reference, world) if config.needs_reference else None
        block = state_block(policy.model, config)
        sharding = spread(policy, reference, kind, world, mesh, block)
    require_numbers(policy, world, f"model {config.model}", "take another one")
    start = {"the version of torch": torch.__version__, "the starting model": start_fingerprint}
    require_same(world, start, "install the same version and name the same files on all machines")
    return policy, reference, sharding, start_fingerprint


def require_numbers(policy: Policy, world: World, origin: str, way_out: str) -> None:
    """Raise UserError, on every process, unless all weights of `origin` are finite."""
    if name := not_finite(policy.model.named_parameters(), world):
        raise UserError(f"{origin} has weights in {name} that are NaN or infinite: {way_out}.")


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
    elif run.reference.adapters:
        kept = "the policy with the adapters of its start"
    elif run.config.lora:
        kept = "the policy without adapters"
    else:
        kept = run.config.reference
        if run.reference.stream is not None and run.reference.stream.is_pageable:
            kept += " (in memory that CUDA could not page-lock, so that its copies take longer)"
        kept += ", sharded with the policy" * (run.sharding.kind == "full")
    device, dtype = run.policy.device, lm_head_weight(run.policy.model).dtype
    attention = attention_kernel(device.type, dtype)
    optimizer = type(run.optimizer).__name__
    lines = [
        f"optimizer {optimizer} · reference {kept} · packed attention {attention}",
        f"decoding {describe_decoding(run.policy.model)}",
    ]
    if run.world.size > 1:
        lines.insert(0, f"{run.world.size} processes, sharding {run.sharding.kind}")
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        lines.append(describe_peak(card, str(dtype).removeprefix("torch.")))
    return "\n".join(lines)
