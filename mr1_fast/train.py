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
from .ahead import Ahead
from .config import TrainConfig
from .errors import exit_on_user_error
from .evaluate.held_out import print_table, record_evaluation
from .files import atomic_folder
from .learning_signal import LearningSignal
from .log import Stopwatch
from .model.load import save_pretrained
from .model.policy import Policy
from .plan.out_of_memory import PACK_TOKENS
from .report.run_report import write_report
from .run import Run, prepare
from .seeds import seed_step
from .sft import sft_loss, solution_batches
from .stages import (
    add_logprobs,
    learn,
    pack_rollout,
    rollout_metrics,
    sample,
    score_rollout,
    update_policy,
)
from .types import Example, Prompt
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
    take_step = sft_step if config.algo == "sft" else grpo_step
    try:
        with Ahead(run) as ahead:
            for step in range(run.first_step, config.steps):
                data = ahead.take(step)
                seed_step(config.seed, step)
                metrics = take_step(run, data.examples, step, data.prompts)
                run.log.step(step, {**metrics, "seconds_data": data.waited})
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
    return run.log.folder


def grpo_step(
    run: Run, examples: list[Example], step: int, prompts: list[Prompt] | None = None
) -> dict[str, float]:
    """Sample, score and learn from the B examples of a step; returns the step's metrics.

    `prompts` are the examples as `run.policy.encode` gives them, where they have been encoded.
    """
    clock = Stopwatch()
    rollout = sample(run, examples, step, prompts)
    clock.lap("rollout")

    scores = score_rollout(run, rollout, step)
    advantages = group_advantages(scores.total)
    run.log.completions(step, rollout, scores)
    clock.lap("reward")

    batches = pack_rollout(rollout, advantages, run.limits.amounts[PACK_TOKENS])
    add_logprobs(run, batches)
    clock.lap("reference")

    metrics = update_policy(run, batches, step)
    clock.lap("update")
    speed = utilisation(run, batches, clock.laps)
    return {**rollout_metrics(rollout, scores), **metrics, **clock.laps, **speed}


def sft_step(
    run: Run, examples: list[Example], step: int, prompts: list[Prompt] | None = None
) -> dict[str, float]:
    """Learn the worked solutions of a step's examples, μ times; returns the step's metrics.

    `prompts` are the examples as `run.policy.encode` gives them, where they have been encoded.
    """
    clock = Stopwatch()
    batches = solution_batches(
        run.policy, examples, run.limits.amounts[PACK_TOKENS], run.config.sft_target, prompts
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
