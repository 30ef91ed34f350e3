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
from contextlib import nullcontext
from pathlib import Path

from .advantages import group_advantages
from .ahead import Ahead
from .config import TrainConfig
from .distributed import World
from .distributed.launch import join_world, leave_world, require_shared
from .errors import exit_on_user_error
from .evaluate.held_out import evaluate_if_due, print_table, record_evaluation, restore_best
from .files import atomic_folder
from .model.device import resolve_device
from .model.policy import Policy
from .model.save import save_pretrained
from .plan.out_of_memory import PACK_TOKENS
from .preparing import prepare
from .push.card import write_card
from .push.upload import push_in_time
from .report.live import LivePage
from .resuming import note_finished
from .run import End, Run
from .run_folder import hold_run_folder
from .seeds import seed_step
from .sft import sft_loss, solution_batches
from .signal_groups import groups_with_signal, refill
from .silent_log import NoPage
from .stages import (
    add_logprobs,
    learn,
    pack_rollout,
    rollout_metrics,
    sample,
    score_rollout,
    update_policy,
)
from .stopping import StopSignals
from .stopwatch import Stopwatch
from .torchrun import is_first
from .types import Example, Prompt
from .utilisation import utilisation
from .whole_step import together


def train(
    config: TrainConfig,
    watch: Callable[[Policy, int], None] | None = None,
    world: World | None = None,
) -> Path:
    """Train as configured; returns the run folder, which holds the final model and report.html.

    `watch(policy, steps_done)` is called before the first step and after each one; for a resumed
    run, after each of the steps that it still does. `world` are the processes that train together:
    by default, all that torchrun has started.

    A run whose `max_hours` are over returns before it has a final model. After Ctrl-C or SIGTERM,
    the step is finished and saved, and Stopped is raised, which is a KeyboardInterrupt; a second
    signal raises it at once.
    """
    world = world or join_world(resolve_device(config).type)
    with StopSignals() as signals, hold_run_folder(config, world):
        run = prepare(config, world)
        run.log.create(run.first_step, run.processes())
        require_shared(run.world, run.log.folder)
        run.signals = signals
        signals.defer(run.log.way_on)

        with run.log, live_page(run) as page:
            if not run.log.resuming:
                record_evaluation(run, "before", step=0)
            if config.open:
                page.open()
            steps_done, end = take_steps(run, page, watch)
            if run.memory.measured:
                run.log.say(run.memory.render())
            if end in ("finished", "patience"):
                finish(run, steps_done)
        if end in ("finished", "patience"):
            if run.world.is_first:
                write_card(run.log.folder, config)
                if not signals.received:
                    note_finished(config)
            if config.push_to_hub and run.world.is_first and not signals.received:
                run.log.say(f"uploading {run.log.folder / 'final'} to {config.push_to_hub} …")
                run.log.say(push_in_time(run.log.folder))

        where = f"after {steps_done} of {config.steps} steps"
        if signals.agree(run.world.most):
            raise signals.stopped(where)
        if end == "time":
            run.log.say(f"max_hours are over {where}: {run.log.way_on()}")
    return run.log.folder


def take_steps(
    run: Run, page: LivePage, watch: Callable[[Policy, int], None] | None
) -> tuple[int, End]:
    """Do the steps that a run still has to do; returns how many are done, and why it ends there."""
    config, steps_done = run.config, run.first_step
    run.log.start(run.first_step)
    if watch and not run.log.resuming:
        watch(run.policy, 0)
    take_step = sft_step if config.algo == "sft" else grpo_step
    try:
        with Ahead(run) as ahead:
            evaluate_if_due(run, steps_done)  # a run may have been stopped in an evaluation
            while not (end := run.end(steps_done)):
                step = steps_done
                with run.time_limit.measure("step"):
                    data = ahead.take(step)
                    seed_step(config.seed, step)
                    metrics = take_step(run, data.examples, step, data.prompts)
                    run.limits.agree()
                    metrics["seconds_data"] = run.world.most(data.waited)
                    run.log.step(step, metrics)
                    run.look_at(step, metrics)
                    run.memory.record(metrics)
                    page.renew()

                    steps_done = step + 1
                    if watch:
                        watch(run.policy, steps_done)
                evaluate_if_due(run, steps_done)
                if run.save_is_due(steps_done):
                    run.save(steps_done)

        if config.save_every or end in ("signal", "time"):
            run.save(steps_done)
        if end == "patience":
            run.log.say(f"no higher accuracy in {run.progress.waiting} evaluations: training ends")
    finally:
        run.log.end_steps()
    return steps_done, end


def live_page(run: Run) -> LivePage:
    """Return the page of a run, which the first process keeps up to date."""
    return LivePage(run.log.folder, run.log.say) if run.world.is_first else NoPage(run.log.folder)


def finish(run: Run, steps_done: int) -> None:
    """Make final/ of the last weights, or with `--keep-best` of the best, and evaluate them."""
    step = restore_best(run, steps_done)
    run.require_numbers(step)
    final = run.log.folder / "final"
    with atomic_folder(final) if run.world.is_first else nullcontext() as folder:
        save_pretrained(run.policy, folder, run.config.save)
    run.world.barrier()
    run.log.final_stands = True
    record_evaluation(run, "after", step)


def grpo_step(
    run: Run, examples: list[Example], step: int, prompts: list[Prompt] | None = None
) -> dict[str, float]:
    """Sample, score and learn from the B examples of a step; returns the step's metrics.

    `prompts` are the examples as `run.policy.encode` gives them, where they have been encoded.
    """
    equal_groups, clock = run.config.skip_equal_groups, Stopwatch(run.world)
    rollout = sample(run, examples, step, prompts)
    clock.lap("rollout")

    scores = score_rollout(run, rollout, step)
    rollout, scores = together(run.world, rollout, scores, clock)
    if equal_groups == "refill":
        rollout, scores = refill(run, rollout, scores, step, clock)
    run.log.completions(step, rollout, scores)
    metrics = rollout_metrics(rollout, scores)
    run.schedule.observe_accuracy(metrics["accuracy"])
    clock.lap("reward")

    rewards = scores.total
    if equal_groups != "keep":
        rollout, rewards = groups_with_signal(rollout, rewards, limit=run.config.prompts_per_step)
        metrics |= {"groups_sampled": len(scores.total), "groups_learnt": len(rewards)}
    advantages = group_advantages(rewards, run.config.advantage)
    batches = pack_rollout(rollout, advantages, run.limits.amounts[PACK_TOKENS], run.config)
    add_logprobs(run, batches)
    clock.lap("reference")

    metrics |= update_policy(run, batches, step)
    clock.lap("update")
    laps = clock.of_all()
    return {**metrics, **laps, **utilisation(run, batches, laps)}


def sft_step(
    run: Run, examples: list[Example], step: int, prompts: list[Prompt] | None = None
) -> dict[str, float]:
    """Learn the worked solutions of a step's examples, μ times; returns the step's metrics.

    `prompts` are the examples as `run.policy.encode` gives them, where they have been encoded.
    """
    clock = Stopwatch(run.world)
    batches = solution_batches(
        run.policy,
        examples,
        run.limits.amounts[PACK_TOKENS],
        run.config.sft_target,
        prompts,
        run.config.prompts_per_step,
    )
    for inner in range(run.config.updates_per_batch):
        optimizer_step = step * run.config.updates_per_batch + inner
        metrics = learn(run, batches, sft_loss, optimizer_step)
    clock.lap("update")
    laps = clock.of_all()
    return {**metrics, **laps, **utilisation(run, batches, laps)}


# --- the command --------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Train as configured, and say where the results are."""
    started = time.perf_counter()
    folder = train(config)
    if is_first():
        print_table(folder)
        seconds = time.perf_counter() - started
        print(f"run folder {folder} · report {folder / 'report.html'} · {seconds:.0f} s in all")
    leave_world()


if __name__ == "__main__":
    exit_on_user_error(lambda: main(CONFIG))
