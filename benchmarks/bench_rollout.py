"""The rollout: ours beside transformers' `generate` and continuous batching, and a bandwidth limit.

    python benchmarks/bench_rollout.py [--parts tail prefix long long_qwen3vl lora qlora stream]
    [--rounds 3] [--device auto] [--quick]

- tail: the tiny model, 16 prompts × 8 samples whose lengths have a long tail: log-normal with
  median 48 and σ = 1, generated once, clipped to at most 256. Target: 5 times the tokens per second
  of `generate`
- prefix: the widths of Qwen2-VL-2B, 4 layers and a small vocabulary, 8 prompts of 512 image tokens
  and some text × 8 samples of 64 tokens; beside it the same with rows in an order in which no
  neighbours share a prefix, so that each reads its own. Target: 1.5 times its tokens per second
- long: a model of Qwen2-VL-2B's shape in bf16, the same prompts × 8 samples of 512 tokens. Targets:
  10 times the tokens per second of `generate`, and 75% of the limit
- long_qwen3vl: the same with Qwen3-VL-2B's shape, whose images have 392 tokens, and whose keys and
  values take four times the room. Targets: as above
- lora: `long` with adapters of rank 16 and 256 tokens, beside merged adapters. Targets: at most
  1.15 times the time of merged ones, and 10 times the tokens per second of `generate`
- qlora: the 7B's shape in 4 bits (nf4, double quantisation) with adapters of rank 16, 128 tokens.
  Targets: 1.5 times the limit's time, and 10 times the tokens per second of `generate`
- stream: 256 prompts of the tiny model with one sample each, of lengths as in `tail`, in batches of
  16: the next batch starts when rows are free, beside one call for each batch

Without --parts: tail and prefix on a CPU; long, lora, qlora and stream on a GPU. Weights are
random. Weights, prompts, lengths and sampling (temperature 1, no filters) are the same for all. A
sample ends only at its prescribed length: `generate` has a stopping criterion for each row,
continuous batching a limit for each request. Continuous batching accepts only token ids: image
tokens are text to it, and no image is encoded. What lives longer than a call is made before: our KV
cache and CUDA graphs, continuous batching's cache. Encoding prompts into tensors is not timed; ours
also returns texts.

The limit is a read's bandwidth, in the same run, for the least that steps must read: weights
(layers, last norm, head) as they are stored, adapters, and the keys and values that running samples
attend to, a prompt's once for its group. Steps are timed without the first tokens, whose time comes
from a run of one token for each sample. Peak memory excludes the weights; on a CPU a process of its
own measures it. Prints Markdown tables; the last line is one JSON document.
"""

import json
import statistics
import sys
from functools import partial
from typing import NamedTuple

import measure
import torch
from measure import (
    Case,
    excused,
    make_parser,
    megabytes,
    peak_in_subprocess,
    pick_device,
    print_table,
    release,
    time_alternating,
)
from rollout_runners import (
    ContinuousBatching,
    Generate,
    Ours,
    OursApart,
    OursInBatches,
    OursMerged,
    OursStreamed,
    OursWithoutGraphs,
)
from rollout_turns import FIRST, Turns, attention_seconds, checked
from rollout_work import WORKS, Work
from transformers.utils import is_flash_attn_2_available

from mr1_fast.rollout.engine import describe_decoding

OURS, GENERATE = "ours", "transformers generate"
WITHOUT_GRAPHS, APART = "ours without CUDA graphs", "ours, no shared prefix"
MERGED, IN_BATCHES = "ours, adapters merged", "ours, batch by batch"
BATCHING = "transformers continuous batching"


class Part(NamedTuple):
    """What is compared in one part."""

    runners: dict[str, type]
    """Name → runner; the first one is OURS."""
    targets: dict[str, float]
    """Name → how many times the time of OURS it should take; "limit" → the share of it."""


PARTS = {
    "tail": Part({OURS: Ours, GENERATE: Generate, BATCHING: ContinuousBatching}, {GENERATE: 5}),
    "prefix": Part({OURS: Ours, APART: OursApart}, {APART: 1.5}),
    "long": Part(
        {
            OURS: Ours,
            WITHOUT_GRAPHS: OursWithoutGraphs,
            APART: OursApart,
            GENERATE: Generate,
            BATCHING: ContinuousBatching,
        },
        {GENERATE: 10, "limit": 0.75},
    ),
    "long_qwen3vl": Part(
        {OURS: Ours, WITHOUT_GRAPHS: OursWithoutGraphs, APART: OursApart, GENERATE: Generate},
        {GENERATE: 10, "limit": 0.75},
    ),
    "lora": Part(
        {OURS: Ours, MERGED: OursMerged, GENERATE: Generate}, {MERGED: 1 / 1.15, GENERATE: 10}
    ),
    "qlora": Part({OURS: Ours, GENERATE: Generate}, {GENERATE: 10, "limit": 1 / 1.5}),
    "stream": Part({OURS: OursStreamed, IN_BATCHES: OursInBatches}, {}),
}
READ = "read"
measure.SLOW = 10.0  # `generate` takes longer with 2B weights, so it is timed once


def compare(part: str, arguments) -> dict:
    """Measure one part."""
    device, skipped = arguments.device, {}
    work = WORKS[part](arguments.quick, device)
    print(f"\n{part}: {describe_decoding(work.model)}", flush=True)
    runners = dict(PARTS[part].runners)
    if device == "cpu":
        runners.pop(WITHOUT_GRAPHS, None)
    elif BATCHING in runners and not is_flash_attn_2_available():
        del runners[BATCHING]
        skipped[BATCHING] = (
            "flash-attn is not installed; on an H100 without it, none of 64 samples ended in 40 s"
        )
    turns = Turns(runners, work, device, skipped)
    width = 2**20 if device == "cuda" else 2**17
    source = torch.ones(1024, width, dtype=torch.uint8, device=device)
    cases = {READ: Case(measure.read_case(source).call, turns.rest), **turns.cases()}
    times = time_alternating(cases, arguments.rounds, device, skipped)
    turns.rest()
    if device == "cpu" and not arguments.quick:
        options = ["--parts", part, f"--device={device}"]
        for name in turns.runners:
            with excused(name, skipped):
                turns.peaks[name] = peak_in_subprocess(__file__, name, options)["peak"]
    timed_apart = device == "cpu" and not work.in_batches
    attention = attention_seconds(turns) if timed_apart else {}
    bandwidth, least = source.nbytes / times[READ]["median"], work.least_bytes()
    names = [name for name in turns.runners if {name, name + FIRST} <= set(times)]
    rows = [
        row(name, times, work, least / bandwidth, turns.peaks.get(name))
        | {"attention": attention.get(name)}
        for name in names
    ]
    print_rows(part, rows, work, bandwidth, least / bandwidth)
    return {
        "settings": settings(work),
        "targets": PARTS[part].targets,
        "read": times[READ],
        "bandwidth": bandwidth,
        "least_bytes": least,
        "rows": rows,
        "skipped": skipped,
    }


def row(name: str, times: dict[str, dict], work: Work, limit: float, peak: int | None) -> dict:
    """The figures of one runner; `limit` are the seconds that its steps take at the least."""
    taken, first = times[name], times[name + FIRST]["median"]
    decoding = taken["median"] - first
    return {
        "name": name,
        **taken,
        "tokens_per_second": sum(work.lengths) / taken["median"],
        "ratio": taken["median"] / times["ours"]["median"],
        "first_tokens": first,
        "step": None if work.in_batches else decoding / (max(work.lengths) - 1),
        "share": None if work.in_batches else limit / decoding,
        "peak": peak,
    }


def settings(work: Work) -> dict:
    """The numbers of prompts, samples and tokens."""
    lengths = work.lengths
    return {
        "prompts": len(work.prompts),
        "group": work.group,
        "prompt_tokens": max(len(prompt.input_ids) for prompt in work.prompts),
        "tokens": sum(lengths),
        "median": statistics.median(lengths),
        "longest": max(lengths),
    }


def print_rows(part: str, rows: list[dict], work: Work, bandwidth: float, limit: float) -> None:
    """Print the table of a part, and its targets."""
    table = [
        [
            r["name"],
            f"{r['median']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['ratio']:.2f}",
            f"{r['first_tokens']:.3f}",
            r["step"] and f"{r['step'] * 1000:.2f}",
            r["attention"] and f"{r['attention'] * 1000:.2f}",
            r["share"] and f"{r['share']:.1%}",
            megabytes(r["peak"]),
        ]
        for r in rows
    ]
    if not work.in_batches:
        step = limit / (max(work.lengths) - 1)
        table.append(["limit", *[None] * 4, f"{step * 1000:.3f}", None, "100%", None])
    columns = [
        "what",
        "s",
        "tokens/s",
        "time / ours",
        "s to first tokens",
        "ms per step",
        "of it attention",
        "of the limit",
        "peak beside the weights, MiB",
    ]
    s = settings(work)
    title = (
        f"{part}: {s['prompts']} prompts of {s['prompt_tokens']} tokens × {s['group']} samples, "
        f"{s['tokens']:,} tokens in all (median {s['median']:.0f}, longest {s['longest']}); "
        f"a read's bandwidth: {bandwidth / 1e9:,.1f} GB/s"
    )
    print_table(title, columns, table)
    for name, target in PARTS[part].targets.items():
        found = [r["share"] if name == "limit" else r["ratio"] for r in rows
                 if r["name"] == (OURS if name == "limit" else name)]  # fmt: skip
        if found:
            words = "share of the limit" if name == "limit" else f"{name} / ours"
            print(f"{words}: {found[0]:.2f}, target {target:.2f}")


def print_peak(name: str, arguments) -> None:
    """Print what `--peak` asks for, as one line of JSON."""
    work = WORKS[arguments.parts[0]](arguments.quick, arguments.device)
    runner = PARTS[arguments.parts[0]].runners[name](work)

    def call(lengths: list[int]) -> tuple[None, list]:
        runner.prepare()
        return checked(runner, lengths), []

    call([2] * len(work.lengths))
    runner.release()
    print(json.dumps(measure.peak(Case(partial(call, work.lengths)), arguments.device)))
    runner.release()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="default: tail, prefix on a CPU; long, lora, qlora, stream on a GPU",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="calls of each runner, in turn; one if it is slow"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out")
    parser.add_argument(
        "--peak",
        choices=sorted({name for part in PARTS.values() for name in part.runners}),
        help="print the peak memory of this runner in the first part, and nothing else",
    )
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    default_parts = dict(cpu=["tail", "prefix"], cuda=["long", "lora", "qlora", "stream"])
    arguments.parts = arguments.parts or default_parts[arguments.device]
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    results = {}
    for part in arguments.parts:
        results[part] = compare(part, arguments)
        sys.stdout.flush()
        release()
    measure.finish(
        "rollout", arguments.device, rounds=arguments.rounds, quick=arguments.quick, **results
    )


if __name__ == "__main__":
    main()
