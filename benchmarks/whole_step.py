"""A step of the tiny model with rollout and optimizer, ours after each of TRL's GRPOTrainer.

Part `step` of bench_train_step.py.
"""

import statistics
import tempfile
import time
from pathlib import Path

from bench_memory import make_model
from group_update import BETA, WHOLE
from measure import excused, print_table
from trl_step import trl_step_seconds

from mr1_fast.config import TrainConfig
from mr1_fast.model.reference import Reference
from mr1_fast.optim import make_optimizer
from mr1_fast.plan.out_of_memory import MemoryLimits
from mr1_fast.plan.run_memory import RunMemory
from mr1_fast.run import Run
from mr1_fast.start import load_policy, supervised_start
from mr1_fast.tasks.data import load_examples
from mr1_fast.train import grpo_step

STAGES = ("rollout", "reward", "reference", "update")


class SilentLog:
    """Stands in for a run folder."""

    def completions(self, *arguments) -> None:
        """Write nothing."""


def measure_step(arguments) -> dict:
    """Measure part `step`: a step of ours after each of TRL's, in one process."""
    prompts, count = (2, 4) if arguments.quick else (16, 8)
    steps = 2 if arguments.quick else 10
    config = TrainConfig(
        algo="grpo",
        beta=BETA,
        device=arguments.device,
        dtype="float32",
        recompute="none",
        max_new_tokens=24,
        prompts_per_step=prompts,
        num_generations=count,
        learning_rate=2e-4,
        lr_schedule="constant",
        steps=steps + 1,
        tokens_per_microbatch=WHOLE,
    )
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            make_model(config.model, Path(scratch), "cpu")
            config.model = scratch
        else:
            config.model = str(supervised_start(config.model, [config], config.seed))
        return step_of(config, prompts, count, steps)


def step_of(config: TrainConfig, prompts: int, count: int, steps: int) -> dict:
    """Time steps of ours and of TRL in turn, both from the folder `config.model`."""
    policy = load_policy(config)
    run = Run(
        config=config,
        policy=policy,
        limits=MemoryLimits(print, lambda: "", RunMemory(policy, config).amounts()),
        optimizer=make_optimizer(policy.model, config),
        reference=Reference(policy),
        schedule=config.kl_schedule(),
        log=SilentLog(),
    )
    source = load_examples(config.task, "drawn", "train", config.seed, config.difficulty)
    examples = source.all((steps + 1) * prompts)
    own = []

    def our_step(step: int) -> None:
        some = examples[step * prompts : (step + 1) * prompts]
        start = time.process_time()
        metrics = grpo_step(run, some, step)
        own.append({**metrics, "cpu_seconds": time.process_time() - start})

    theirs, skipped = None, {}
    with excused("TRL GRPOTrainer", skipped):
        theirs = trl_step_seconds(config, policy.processor, examples, BETA, our_step)
    for step in range(len(own), steps + 1):
        our_step(step)
    ours = summary(own[1:])
    rows = [{"name": "ours", **ours}]
    if theirs:
        rows.append({"name": "TRL GRPOTrainer", **theirs})
    for row in rows:
        row["ratio"] = row["seconds"] / ours["seconds"]
        row["cpu_ratio"] = row["cpu_seconds"] / ours["cpu_seconds"]
    title = f"A step of the tiny model: {prompts} × {count} completions, median of {steps}"
    print_steps(title, rows)
    sizes = {"prompts": prompts, "num_generations": count, "steps": steps}
    return {**sizes, "rows": rows, "skipped": skipped}


def summary(metrics: list[dict]) -> dict[str, float]:
    """Median seconds of a step, its CPU seconds and its stages, and the mean completion length."""
    totals = [sum(step[f"seconds_{stage}"] for stage in STAGES) for step in metrics]
    return {
        "seconds": statistics.median(totals),
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in metrics),
        "completion_length": statistics.mean(step["completion_length"] for step in metrics),
        **{
            stage: statistics.median(step[f"seconds_{stage}"] for step in metrics)
            for stage in STAGES
        },
    }


def print_steps(title: str, rows: list[dict]) -> None:
    """Print the table of part `step`."""
    columns = ["what", "ms", "time / ours", "CPU ms", "CPU time / ours", "tokens per completion"]
    table = []
    for row in rows:
        stages = [f"{row[stage] * 1000:,.0f}" if stage in row else None for stage in STAGES]
        table.append(
            [
                row["name"],
                f"{row['seconds'] * 1000:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['cpu_seconds'] * 1000:,.0f}",
                f"{row['cpu_ratio']:.2f}",
                f"{row['completion_length']:.1f}",
                *stages,
            ]
        )
    print_table(title, [*columns, *STAGES], table)
