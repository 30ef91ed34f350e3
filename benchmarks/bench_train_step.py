"""A training step: a group's prompt trained once, beside prompts repeated for every completion, and beside TRL.

    python benchmarks/bench_train_step.py [--parts update curve step] [--rounds 2] [--device auto] [--quick]

- update: reference log-probs, forward and backward of one group of given completions, by a model of Qwen2-VL-2B's
  widths with two layers of text and of vision and its whole vocabulary; random weights
- curve: the same over G and prompt lengths, with a smaller model, ours against the repeated form
- step: a step of the tiny model with rollout and optimizer, ours against TRL's GRPOTrainer

All hold their layers' activations alike: gradient checkpointing in update and curve, as our large recipes have it, none
in step. Tokens count prompt and completion of the repeated form for all alike, so tokens per second compare as times
do. Peak memory is beside weights and gradients, on a CPU of a process of its own; with the tied embedding frozen,
autograd makes no second gradient in its size beside the first, and activations are what is left. "Off by" is the
relative difference from ours of loss and gradient (of every parameter, some of its entries). TRL scores the prompt's
positions too where there is no Triton, as on a CPU. Prints Markdown tables; the last line is one JSON document.
"""

import argparse
import json
import statistics
import time

import torch
from group_update import BETA, CASES, WHOLE, Group
from measure import (
    Case,
    excused,
    finish,
    megabytes,
    peak,
    peak_in_subprocess,
    pick_device,
    print_table,
    release,
    time_alternating,
)
from trl_step import trl_step_seconds

from mr1_fast.config import TrainConfig
from mr1_fast.model.reference import Reference
from mr1_fast.optim import make_optimizer
from mr1_fast.plan.out_of_memory import MemoryLimits
from mr1_fast.plan.run_memory import RunMemory
from mr1_fast.start import load_policy, supervised_start
from mr1_fast.tasks.data import load_examples
from mr1_fast.train import grpo_step

FULL = dict(width=1536, layers=2, vocabulary=151_936)
SMALL = dict(width=512, layers=1, vocabulary=16_384)
QUICK = dict(width=256, layers=1, vocabulary=2048)
SAMPLE = 4096
"""Entries of each parameter's gradient that are compared."""


# --- updates ------------------------------------------------------------------------------------------------------


def spread_lengths(low: int, high: int, count: int) -> list[int]:
    """Completion lengths spread evenly."""
    return torch.linspace(low, high, count).round().int().tolist()


def kept(case: Case, results: dict, name: str) -> Case:
    """The case; its loss and some of its gradients' entries are left in `results`."""

    def call():
        loss, gradients = case.call()
        entries = [g.flatten()[:: max(1, g.numel() // SAMPLE)].double() for g in gradients]
        results[name] = [loss.double()[None].cpu(), torch.cat(entries).cpu()]
        return loss, gradients

    return Case(call, case.restore)


def compare(cases: list[str], group: Group, arguments) -> tuple[list[dict], dict[str, str]]:
    """A row of time and agreement for each case."""
    skipped, results, built = {}, {}, {}
    small = group.other(32, [4, 8])
    for name in cases:
        with excused(name, skipped):
            warm = CASES[name](small)
            warm.restore()
            warm.call()
            built[name] = kept(CASES[name](group), results, name)
    warm = small = None
    group.model.zero_grad(set_to_none=True)
    release()
    times = time_alternating(built, arguments.rounds, arguments.device, skipped)
    rows = []
    for name, taken in times.items():
        off = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(results[name], results["ours"], strict=True)
        ]
        rate, ratio = group.tokens / taken["median"], taken["median"] / times["ours"]["median"]
        rows.append({"name": name, **taken, "tokens_per_second": rate, "ratio": ratio, "off": off})
    return rows, skipped


def measure_update(arguments) -> dict:
    """Part `update`."""
    size, prompt_tokens, lengths = update_sizes(arguments)
    group = Group.random(size, arguments.device, prompt_tokens, lengths)
    rows, skipped = compare(list(CASES), group, arguments)
    tokens = group.tokens
    if arguments.device == "cuda":  # counted by the allocator, so this process does
        measured = lambda name, frozen: peak(peak_case(name, group, frozen), "cuda")  # noqa: E731
    else:
        del group  # room for the processes that measure
        release()
        options = [
            f"--device={arguments.device}",
            f"--layers={arguments.layers}",
            *["--quick"] * arguments.quick,
        ]
        measured = lambda name, frozen: peak_in_subprocess(
            __file__, name, options + ["--frozen"] * frozen
        )  # noqa: E731
    for row in rows:
        row["peak"] = row["peak_frozen"] = None
        for key, frozen in (("peak", False), ("peak_frozen", True)):
            with excused(row["name"], skipped):
                found = measured(row["name"], frozen)
                row[key] = found["peak"] - found["gradients"]
    table = [
        [r["name"], f"{r['median']:,.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f}", megabytes(r["peak"]),
         share(rows[0], r, "peak"), megabytes(r["peak_frozen"]), share(rows[0], r, "peak_frozen"),
         "{:.0e} / {:.0e}".format(*r["off"])]
        for r in rows
    ]  # fmt: skip
    columns = [
        "what",
        "s",
        "tokens/s",
        "time / ours",
        "peak beside weights and gradients, MiB",
        "ours / its peak",
    ]
    columns += ["with a frozen embedding, MiB", "ours / its peak"]
    title = (
        f"Reference, forward and backward of G = {len(lengths)} completions of {lengths[0]}–{lengths[-1]} tokens, "
        f"prompt {prompt_tokens} tokens ({tokens:,} tokens repeated); {size}, gradient checkpointing"
    )
    print_table(title, [*columns, "loss / gradient off by"], table)
    settings = {**size, "prompt_tokens": prompt_tokens, "lengths": lengths, "tokens": tokens}
    return {"settings": settings, "rows": rows, "skipped": skipped}


def share(ours: dict, other: dict, key: str) -> str | None:
    """Ours as a part of another's."""
    return f"{ours[key] / other[key]:.2f}" if ours[key] and other[key] else None


def update_sizes(arguments) -> tuple[dict, int, list[int]]:
    """Model, prompt tokens and completion lengths."""
    if arguments.quick:
        return QUICK, 64, spread_lengths(4, 16, 4)
    return FULL | {"layers": arguments.layers}, 512, spread_lengths(32, 256, 8)


def peak_case(name: str, group: Group, frozen: bool) -> Case:
    """The case, with the tied embedding trained or not; ready to be called."""
    group.model.get_input_embeddings().weight.requires_grad_(not frozen)
    case = CASES[name](group)
    case.restore()
    return case


def print_peak(name: str, arguments) -> None:
    """What `--peak` prints: one JSON line."""
    size, prompt_tokens, lengths = update_sizes(arguments)
    group = Group.random(size, arguments.device, prompt_tokens, lengths)
    peak_case(name, group.other(32, [4, 8]), arguments.frozen).call()
    case = peak_case(name, group, arguments.frozen)
    print(json.dumps(peak(case, arguments.device)))


def measure_curve(arguments) -> dict:
    """Part `curve`."""
    size = QUICK if arguments.quick else FULL if arguments.device == "cuda" else SMALL
    sizes, prompts = ((2, 4), (32, 64)) if arguments.quick else ((2, 4, 8, 16), (64, 512, 1024))
    lengths = (4, 16) if arguments.quick else (32, 256)
    first = Group.random(size, arguments.device, 32, [4, 8])
    points, names = [], ["ours", "repeated, padded (R1-V)"]
    for prompt_tokens in prompts:
        for count in sizes:
            group = first.other(prompt_tokens, spread_lengths(*lengths, count))
            rows, _ = compare(names, group, arguments)
            points.append({"prompt_tokens": prompt_tokens, "group": count, "rows": rows})
    table = [[p] for p in prompts]
    for point in points:
        cell = f"{point['rows'][1]['ratio']:.2f}" if len(point["rows"]) == 2 else None
        table[prompts.index(point["prompt_tokens"])].append(cell)
    title = f"Time of the repeated, padded update / ours; completions of {lengths[0]}–{lengths[1]} tokens, {size}"
    print_table(title, ["prompt tokens", *(f"G = {g}" for g in sizes)], table)
    return {"settings": {**size, "lengths": lengths}, "points": points}


# --- a whole step -------------------------------------------------------------------------------------------------


class SilentLog:
    """In the place of a run folder."""

    def completions(self, *arguments) -> None:
        """Nothing is written."""


def measure_step(arguments) -> dict:
    """Part `step`: a step of ours after each of TRL's, in one process."""
    prompts, count = (2, 4) if arguments.quick else (16, 8)
    steps = 2 if arguments.quick else 10
    config = TrainConfig(
        algo="grpo", beta=BETA, device=arguments.device, dtype="float32", gradient_checkpointing=False,
        max_new_tokens=24, prompts_per_step=prompts, num_generations=count, learning_rate=2e-4, lr_schedule="constant",
        steps=steps + 1, tokens_per_microbatch=WHOLE,
    )  # fmt: skip
    config.model = str(supervised_start(config.model, [config], config.seed))
    policy = load_policy(config)
    reference, optimizer, schedule = (
        Reference(policy),
        make_optimizer(policy.model, config),
        config.kl_schedule(),
    )
    room = MemoryLimits(print, lambda: "", RunMemory(policy, config).amounts())
    source = load_examples(config.task, "drawn", "train", config.seed, config.difficulty)
    examples = source.all((steps + 1) * prompts)
    own = []

    def our_step(step: int) -> None:
        some = examples[step * prompts : (step + 1) * prompts]
        start = time.process_time()
        metrics = grpo_step(
            policy, reference, optimizer, some, step, schedule, config, SilentLog(), room
        )
        own.append({**metrics, "cpu_seconds": time.process_time() - start})

    theirs, skipped = None, {}
    with excused("TRL GRPOTrainer", skipped):
        theirs = trl_step_seconds(config, policy.processor, examples, BETA, our_step)
    for step in range(len(own), steps + 1):
        our_step(step)
    stages = ("rollout", "reward", "reference", "update")
    laps = {stage: statistics.median(m[f"seconds_{stage}"] for m in own[1:]) for stage in stages}
    seconds = statistics.median(sum(m[f"seconds_{stage}"] for stage in stages) for m in own[1:])
    length = statistics.mean(m["completion_length"] for m in own[1:])
    cpu_seconds = statistics.median(m["cpu_seconds"] for m in own[1:])
    ours = {"seconds": seconds, "cpu_seconds": cpu_seconds, "completion_length": length, **laps}
    rows = [{"name": "ours", **ours}, *([{"name": "TRL GRPOTrainer", **theirs}] if theirs else [])]
    for row in rows:
        row["ratio"], row["cpu_ratio"] = (
            row[key] / ours[key] for key in ("seconds", "cpu_seconds")
        )
    table = [
        [r["name"], f"{r['seconds'] * 1000:,.0f}", f"{r['ratio']:.2f}", f"{r['cpu_seconds'] * 1000:,.0f}",
         f"{r['cpu_ratio']:.2f}", f"{r['completion_length']:.1f}"]
        + [f"{r[stage] * 1000:,.0f}" if stage in r else None for stage in stages]
        for r in rows
    ]  # fmt: skip
    columns = [
        "what",
        "ms",
        "time / ours",
        "CPU ms",
        "CPU time / ours",
        "tokens per completion",
        *stages,
    ]
    print_table(
        f"A step of the tiny model: {prompts} × {count} completions, median of {steps}",
        columns,
        table,
    )
    return {
        "prompts": prompts,
        "num_generations": count,
        "steps": steps,
        "rows": rows,
        "skipped": skipped,
    }


PARTS = {"update": measure_update, "curve": measure_curve, "step": measure_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--rounds", type=int, help="calls of each update, in turn; default 10, on a CPU 2"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--layers", type=int, default=FULL["layers"], help="of text and of vision, in part update"
    )
    parser.add_argument("--quick", action="store_true", help="sizes for trying the script out")
    parser.add_argument("--peak", help="print the peak memory of this case of part update and end")
    parser.add_argument(
        "--frozen", action="store_true", help="with --peak: the tied embedding is not trained"
    )
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    arguments.rounds = arguments.rounds or (10 if arguments.device == "cuda" else 2)
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    results = {part: PARTS[part](arguments) for part in arguments.parts}
    finish(
        "train_step", arguments.device, rounds=arguments.rounds, quick=arguments.quick, **results
    )


if __name__ == "__main__":
    main()
