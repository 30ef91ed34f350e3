"""Post-train a vision-language model with GRPO-D: `python -m mr1_fast.train`. Read this file first.

A step draws prompts, samples G completions of each, scores them, turns the scores into advantages
within each group, packs prompts and completions without padding, computes the reference's
log-probabilities, and updates the policy by the loss, whose KL weight β follows a schedule.
`--algo grpo` differs by a constant β, and `--algo sft` learns worked solutions instead of samples.
"""

if __name__ == "__main__":  # before the imports below: help and a wrong setting need no torch
    from .command_line import parse_train_config, start

    CONFIG = start(parse_train_config)

import time
from collections.abc import Callable
from pathlib import Path

from .advantages import group_advantages
from .config import TrainConfig
from .errors import exit_on_user_error
from .evaluate.held_out import print_table, record_evaluation
from .files import atomic_folder
from .learning_signal import LearningSignal
from .log import Stopwatch
from .model.load import save_pretrained
from .model.policy import Policy
from .plan.out_of_memory import PACK_TOKENS
from .push.card import write_card
from .push.upload import push_in_time
from .report.run_report import write_report
from .run import Run, prepare
from .seeds import seed_step
from .sft import sft_loss, solution_batches
from .signal_groups import groups_with_signal, refill
from .stages import (
    add_logprobs,
    learn,
    pack_rollout,
    rollout_metrics,
    sample,
    score_rollout,
    update_policy,
)
from .types import Example
from .utilisation import utilisation


def train(config: TrainConfig, watch: Callable[[Policy, int], None] | None = None) -> Path:
    """Train as configured; returns the run folder, which holds the final model and report.html.

    `watch(policy, steps_done)` is called before the first step and after each one; for a resumed
    run, after each of the steps that it still does.
    """
    run = prepare(config)
    run.log.create()
    if not run.log.resuming:
        record_evaluation(run, "before")

    signal = LearningSignal(config.steps - run.first_step)
    run.log.start(run.first_step)
    if watch and not run.log.resuming:
        watch(run.policy, 0)
    try:
        for step in range(run.first_step, config.steps):
            seed_step(config.seed, step)
            examples = run.source.take(step, config.prompts_per_step)
            metrics = (sft_step if config.algo == "sft" else grpo_step)(run, examples, step)
            run.log.step(step, metrics)
            for warning in signal.look(metrics):
                run.log.say(warning)
            run.memory.record(metrics)

            steps_done = step + 1
            if watch:
                watch(run.policy, steps_done)
            last = steps_done == config.steps
            if config.save_every and (steps_done % config.save_every == 0 or last):
                run.save(steps_done)
    finally:
        run.log.close()

    if run.memory.measured:
        run.log.say(run.memory.render())
    with atomic_folder(run.log.folder / "final") as folder:
        save_pretrained(run.policy, folder)
    record_evaluation(run, "after")
    write_report(run.log.folder)
    write_card(run.log.folder, config)
    if config.push_to_hub:
        run.log.say(push_in_time(run.log.folder))
    return run.log.folder


def grpo_step(run: Run, examples: list[Example], step: int) -> dict[str, float]:
    """Sample, score and learn from the B examples of a step; returns the step's metrics."""
    equal_groups, clock = run.config.skip_equal_groups, Stopwatch()
    rollout = sample(run, examples, step)
    clock.lap("rollout")

    scores = score_rollout(run, rollout, step)
    if equal_groups == "refill":
        rollout, scores = refill(run, rollout, scores, step, clock)
    run.log.completions(step, rollout, scores)
    metrics = rollout_metrics(rollout, scores)
    run.schedule.observe_accuracy(metrics["accuracy"])
    clock.lap("reward")

    rewards = scores.total
    if equal_groups != "keep":
        rollout, rewards = groups_with_signal(rollout, rewards, limit=len(examples))
        metrics |= {"groups_sampled": len(scores.total), "groups_learnt": len(rewards)}
    advantages = group_advantages(rewards, run.config.advantage)
    batches = pack_rollout(rollout, advantages, run.limits.amounts[PACK_TOKENS], run.config)
    add_logprobs(run, batches)
    clock.lap("reference")

    metrics |= update_policy(run, batches, step)
    clock.lap("update")
    return {**metrics, **clock.laps, **utilisation(run, batches, clock.laps)}


def sft_step(run: Run, examples: list[Example], step: int) -> dict[str, float]:
    """Learn the worked solutions of a step's examples, μ times; returns the step's metrics."""
    clock = Stopwatch()
    batches = solution_batches(
        run.policy, examples, run.limits.amounts[PACK_TOKENS], run.config.sft_target
    )
    for inner in range(run.config.updates_per_batch):
        optimizer_step = step * run.config.updates_per_batch + inner
        metrics = learn(run, batches, sft_loss, optimizer_step)
    clock.lap("update")
    return {**metrics, **clock.laps, **utilisation(run, batches, clock.laps)}


# --- the command --------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Train as configured, and say where the results are."""
    started = time.perf_counter()
    folder = train(config)
    print_table(folder)
    seconds = time.perf_counter() - started
    print(f"run folder {folder} · report {folder / 'report.html'} · {seconds:.0f} s in all")


if __name__ == "__main__":
    exit_on_user_error(lambda: main(CONFIG))
