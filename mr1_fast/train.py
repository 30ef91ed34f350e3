"""Post-train a vision-language model with GRPO-D: `python -m mr1_fast.train`. Read this file first.

One step: draw prompts → sample G completions of each → score them → advantages within each group → pack prompts and
completions without padding → reference log-probs → loss → update. β(s) comes from the KL schedule at every step.
`--algo grpo` differs by a constant β, `--algo sft` by worked solutions in the place of samples.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .advantages import group_advantages
from .checkpoint import fingerprint, load_checkpoint, save_checkpoint
from .config import TrainConfig, parse_train_config
from .errors import exit_on_user_error
from .evaluate.held_out import held_out_items, print_table, record_evaluation
from .files import atomic_folder
from .kernels.self_test import self_test
from .log import RunLog, Stopwatch
from .loss import linear_grpo_loss, spread, token_weights
from .model.attention import backend
from .model.forward import lm_head_weight
from .model.load import Policy, resolve_device, save_pretrained
from .model.reference import Reference
from .optim import make_optimizer, update
from .packing import MicroBatches
from .plan.out_of_memory import PACK_TOKENS, ROLLOUT_CACHE, MemoryLimits
from .plan.run_memory import RunMemory
from .report.run_report import write_report
from .rewards.registry import load_plugin, require_rewards, score
from .rollout.engine import Engine, fitting
from .rollout.sampling import Sampling
from .seeds import derive_seed, seed_step
from .sft import sft_loss, solution_batches
from .start import load_policy
from .tasks import get_task
from .tasks.data import configured_examples
from .types import Example, PackedBatch, Rollout

GAP = ("rollout_gap_mean", "rollout_gap_max")
"""|log π − log π_rollout| of the sampled tokens, as training and rollout compute them with the same weights."""


def train(config: TrainConfig, watch: Callable[[Policy, int], None] | None = None) -> Path:
    """Train as configured; returns the run folder, which holds the final model and report.html.

    `watch(policy, steps done)` is called before the first step and after each one; a resumed run goes on calling it
    after the steps that it does.
    """
    get_task(config.task)
    if config.plugin:
        load_plugin(config.plugin)
    require_rewards(config.extra_rewards)
    self_test(resolve_device(config))
    source = configured_examples(config, "train", limit=config.train_samples)
    if config.algo == "sft" and config.sft_target == "solution":
        source.require_thinking()
    held_out = held_out_items(config)
    log = RunLog(config)
    policy = load_policy(config)
    start_fingerprint = fingerprint(policy.model)
    schedule = config.kl_schedule()
    needs_reference = config.algo != "sft" and schedule.beta_max > 0
    reference = Reference(policy, config.reference) if needs_reference else None
    optimizer = make_optimizer(policy.model, config, config.seed)
    checkpoints = log.folder / "checkpoints"
    first = (
        load_checkpoint(checkpoints, policy.model, optimizer, start_fingerprint)
        if log.resuming
        else 0
    )
    # What is too large shows before anything is written.
    policy.encode.many(source.take(first, config.prompts_per_step))
    memory = RunMemory(policy, config)
    room = MemoryLimits(log.say, memory.advise, memory.amounts())
    log.say(described(policy, reference, optimizer, config) + "\n" + memory.render())
    log.create()
    if not log.resuming:
        record_evaluation(policy, config, held_out, log, room, "before")

    log.start(first)
    if watch and not log.resuming:
        watch(policy, 0)
    try:
        for step in range(first, config.steps):
            seed_step(config.seed, step)
            examples = source.take(step, config.prompts_per_step)
            if config.algo == "sft":
                metrics = sft_step(policy, optimizer, examples, step, config, room)
            else:
                metrics = grpo_step(
                    policy, reference, optimizer, examples, step, schedule, config, log, room
                )
            log.step(step, metrics)
            memory.record(metrics)
            done = step + 1
            if watch:
                watch(policy, done)
            if config.save_every and (done % config.save_every == 0 or done == config.steps):
                save_checkpoint(checkpoints, done, policy.model, optimizer, start_fingerprint)
    finally:
        log.close()

    if memory.measured:
        log.say(memory.render())
    with atomic_folder(log.folder / "final") as folder:
        save_pretrained(policy, folder)
    record_evaluation(policy, config, held_out, log, room, "after")
    write_report(log.folder)
    return log.folder


def grpo_step(
    policy, reference, optimizer, examples, step, schedule, config, log, room
) -> dict[str, float]:
    """Sample, score and learn from one batch of prompts; returns the step's metrics."""
    clock = Stopwatch()
    prompts = policy.encode.many(examples)
    needed = fitting(prompts, config.num_generations, config).tokens
    rollout = room.attempt(
        ROLLOUT_CACHE, partial(sample, policy, examples, prompts, step, config), needed
    )
    clock.lap("rollout")

    weights = {"accuracy": 1.0, "format": config.format_weight, **config.extra_rewards}
    rewards, parts = score(rollout.texts, examples, weights)
    advantages = group_advantages(rewards)
    log.completions(step, rollout, parts, rewards)
    clock.lap("reward")

    batches = grpo_batches(rollout, advantages, room.amounts[PACK_TOKENS])
    room.attempt(PACK_TOKENS, partial(add_logprobs, batches, policy, reference, config))
    clock.lap("reference")

    for inner in range(config.updates_per_batch):
        optimizer_step = step * config.updates_per_batch + inner
        beta = schedule(optimizer_step)
        objective = partial(grpo_objective, beta=beta, config=config)
        metrics = learn(policy, optimizer, batches, objective, optimizer_step, config, room)
        if inner == 0:  # later, the weights are no longer those of the rollout
            gap = {name: metrics.pop(name) for name in GAP}
    clock.lap("update")
    return {
        **rollout_metrics(rollout, rewards, parts),
        "beta": beta,
        **metrics,
        **gap,
        **clock.laps,
    }


def sft_step(
    policy, optimizer, examples: list[Example], step: int, config: TrainConfig, room
) -> dict[str, float]:
    """Learn one batch of worked solutions, μ times; returns the step's metrics."""
    clock = Stopwatch()
    batches = solution_batches(policy, examples, room.amounts[PACK_TOKENS], config.sft_target)
    for inner in range(config.updates_per_batch):
        optimizer_step = step * config.updates_per_batch + inner
        metrics = learn(policy, optimizer, batches, sft_loss, optimizer_step, config, room)
    clock.lap("update")
    return {**metrics, **clock.laps}


def sample(
    policy: Policy,
    examples: list[Example],
    prompts: list,
    step: int,
    config: TrainConfig,
    cache_tokens: int,
):
    """The rollout of a step with at most so many tokens in the KV cache; the same again if called again."""
    engine = Engine(policy.model, policy.processor, policy.encode)
    seed, prefill = derive_seed(config.seed, "rollout", step), config.tokens_per_microbatch
    sampling, size = Sampling.of(config), config.num_generations
    return engine.generate(
        examples, size, sampling, seed, prompts, cache_tokens=cache_tokens, prefill_tokens=prefill
    )


def grpo_batches(rollout: Rollout, advantages: torch.Tensor, tokens_per_pack: int) -> MicroBatches:
    """Packs of the rollout with each row's advantage and weight."""
    batches = MicroBatches(rollout.prompts, rollout.completions, tokens_per_pack)
    for batch in batches:
        per_sequence = advantages.flatten()[batch.sequence_ids]
        batch.row_data["advantages"] = spread(per_sequence, batch.loss_cu_seqlens)
        batch.row_data["token_weights"] = token_weights(
            batch.loss_cu_seqlens, num_sequences=len(rollout.completions)
        )
        batch.row_data["rollout_logp"] = torch.cat(
            [rollout.logprobs[index] for index in batch.sequence_ids]
        )
    return batches


@torch.no_grad()
def add_logprobs(
    batches: MicroBatches,
    policy: Policy,
    reference: Reference | None,
    config: TrainConfig,
    tokens_per_pack: int,
) -> None:
    """Put reference log-probs on the rows, and the policy's own for importance weights.

    The old log-probs that several updates need (μ > 1) are the rollout's, which cost no pass.
    """
    batches.repack(tokens_per_pack)
    found = []
    for batch in batches:
        on_device, values = batch.to(policy.device), {}
        if reference is not None:
            values["ref_logp"] = reference.logprobs(on_device, config.temperature)
        if config.updates_per_batch > 1:
            values["old_logp"] = batch.row_data["rollout_logp"]
        if config.importance_cap:
            own = policy.logprobs(on_device, config.temperature)[0]
            ratio = (own - on_device.row_data["rollout_logp"]).exp()
            values |= {"old_logp": own, "is_weights": ratio.clamp(max=config.importance_cap)}
        found.append(values)
    for batch, values in zip(
        batches, found, strict=True
    ):  # all or none, should memory run out on the way
        batch.row_data |= values


def learn(
    policy, optimizer, batches: MicroBatches, objective, step: int, config: TrainConfig, room
) -> dict[str, float]:
    """One optimizer step on the batches, in smaller packs if memory runs out."""

    def work(tokens_per_pack: int) -> dict[str, float]:
        batches.repack(tokens_per_pack)
        return update(policy, optimizer, batches, objective, step, config.optimizer_steps(), config)

    return room.attempt(PACK_TOKENS, work)


def grpo_objective(policy: Policy, batch: PackedBatch, beta: float, config: TrainConfig):
    """The GRPO loss of one pack and its per-row statistics; logits exist for a chunk of rows at a time."""
    rows = batch.row_data
    result = linear_grpo_loss(
        policy.hidden(batch),
        lm_head_weight(policy.model),
        batch.targets,
        rows["advantages"],
        rows["token_weights"],
        beta=beta,
        old_logp=rows.get("old_logp"),
        ref_logp=rows.get("ref_logp"),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        temperature=config.temperature,
        is_weights=rows.get("is_weights"),
    )
    gap = (result.logp - rows["rollout_logp"]).abs()
    statistics = {
        "entropy": result.entropy,
        "clip_fraction": result.clipped,
        **dict.fromkeys(GAP, gap),
    }
    if "ref_logp" in rows:  # without a reference nothing is known of the KL, and 0 would be a claim
        statistics |= {"kl": result.kl, "kl_limited": result.kl_limited}
    return result.loss, statistics


def described(policy: Policy, reference: Reference | None, optimizer, config: TrainConfig) -> str:
    """What was chosen where the settings leave a choice."""
    kept = (
        "none"
        if reference is None
        else "the policy without adapters"
        if config.lora
        else config.reference
    )
    attention = backend(policy.device.type, lm_head_weight(policy.model).dtype)
    return f"optimizer {type(optimizer).__name__} · reference {kept} · packed attention {attention}"


def rollout_metrics(
    rollout: Rollout, rewards: torch.Tensor, parts: dict[str, list[float]]
) -> dict[str, float]:
    """Means over the completions of a step; `zero_variance` is the share of groups without a learning signal."""
    count = len(rollout.completions)
    return {
        "reward": rewards.mean().item(),
        **{name: sum(values) / count for name, values in parts.items()},
        "zero_variance": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
        "completion_length": sum(map(len, rollout.completions)) / count,
        "finished": sum(rollout.finished) / count,
    }


def run(argv: list[str]) -> None:
    """Parse the arguments, train, and say where the results are."""
    started = time.perf_counter()
    folder = train(parse_train_config(argv))
    print_table(folder)
    print(
        f"run folder {folder} · report {folder / 'report.html'} · {time.perf_counter() - started:.0f} s in all"
    )


def main() -> None:
    """`python -m mr1_fast.train`."""
    run(sys.argv[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
