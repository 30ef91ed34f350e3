"""The rollout: ours beside transformers' `generate` and continuous batching, and a bandwidth limit.

    python benchmarks/bench_rollout.py [--parts tail long lora] [--rounds 3] [--device auto]
    [--quick]

- tail: the tiny model, 16 prompts × 8 samples whose lengths have a long tail: log-normal with
  median 48 and σ = 1, generated once, clipped to at most 256. Target: 3 times the tokens per second
  of `generate`
- long: a model of Qwen2-VL-2B's shape in bf16, 8 prompts of 512 image tokens and some text × 8
  samples of 512 tokens. Targets: 5 times the tokens per second of `generate`, and 60% of the limit
- lora: the same with LoRA adapters, either applied in every step or merged before: should the
  engine merge them?

Without --parts: tail on a CPU, the others on a GPU. Weights are random. Weights, prompts, lengths
and sampling (temperature 1, no filters) are the same for all. A sample ends only at its prescribed
length: `generate` has a stopping criterion for each row, continuous batching a limit for each
request. Continuous batching accepts only token ids: image tokens are text to it, and no image is
encoded. What lives longer than a call is made before: our KV cache and CUDA graphs, continuous
batching's cache. Encoding prompts into tensors is not timed; ours also returns texts.

The limit is a read's bandwidth, in the same run, for the least that steps must read: weights
(layers, last norm, head), and the keys and values that running samples attend to, a prompt's once
for its group. Steps are timed without the first tokens, whose time comes from a run of one token
for each sample. Peak memory excludes the weights; on a CPU a process of its own measures it. Prints
Markdown tables; the last line is one JSON document.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

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
    GROUP,
    ContinuousBatching,
    Generate,
    Ours,
    WithoutGraphs,
    Work,
    long_work,
    tail_work,
)
from transformers.utils import is_flash_attn_2_available

from mr1_fast.config import ModelConfig
from mr1_fast.model.load import with_lora

WITHOUT_GRAPHS = "ours without CUDA graphs"
RUNNERS = {
    "ours": Ours,
    WITHOUT_GRAPHS: partial(Ours, kind=WithoutGraphs),
    "transformers generate": Generate,
    "transformers continuous batching": ContinuousBatching,
}
FIRST = ", first tokens"
"""Ends the name of a runner's case that samples one token each."""
READ = "read"
WORKS = {"tail": tail_work, "long": long_work}
TARGETS = {"tail": {"generate": 3}, "long": {"generate": 5, "limit": 0.6}}
measure.SLOW = 10.0  # `generate` takes longer with 2B weights, so it is timed once


def checked(runner: Callable, lengths: list[int]) -> None:
    """Call the runner; RuntimeError unless every sample has its length."""
    wrong = sum(a != b for a, b in zip(runner(lengths), lengths, strict=True))
    if wrong:
        raise RuntimeError(f"{wrong} of {len(lengths)} samples have another length than prescribed")


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


class Turns:
    """Runners of one work that take turns.

    `kept` are the bytes on the GPU that a runner keeps between its calls, `peaks` the most that it
    needs in a call, with those.
    """

    def __init__(self, names: list[str], work: Work, device: str, skipped: dict[str, str]):
        self.work, self.device = work, device
        self.runners, self.kept, self.peaks = {}, {}, {}
        for name in names:
            before = allocated(device)
            with excused(name, skipped):
                self.kept[name], self.runners[name] = 0, RUNNERS[name](work)
                self.prepare(name)
                lengths = work.lengths
                if not name.startswith("ours"):
                    lengths = [min(n, work.warm_up_tokens) for n in lengths]
                self.sample(name, lengths, before)
            self.rest()
            if name in skipped and name in self.runners:
                self.runners.pop(name).release()
            release()
            self.kept[name] = allocated(device) - before

    def rest(self) -> None:
        """Let no runner be prepared."""
        for runner in self.runners.values():
            runner.rest()

    def prepare(self, name: str) -> None:
        """Prepare this runner and no other."""
        self.rest()
        self.runners[name].prepare()

    def sample(self, name: str, lengths: list[int], before: int | None = None) -> None:
        """Call the runner and note its peak memory beyond `before`, the bytes that others use."""
        if before is None:
            before = allocated(self.device) - self.kept[name]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        checked(self.runners[name], lengths)
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def cases(self) -> dict[str, Case]:
        """Two cases of each runner: all tokens, and the first token of each sample."""
        first, cases = [1] * len(self.work.lengths), {}
        for name, runner in self.runners.items():
            prepare = partial(self.prepare, name)
            cases[name] = Case(partial(self.sample, name, self.work.lengths), prepare)
            cases[name + FIRST] = Case(partial(checked, runner, first), prepare)
        return cases


def compare(part: str, arguments) -> dict:
    """Measure part `tail` or `long`."""
    device, skipped = arguments.device, {}
    work = WORKS[part](arguments.quick, device)
    names = [name for name in RUNNERS if device == "cuda" or name != WITHOUT_GRAPHS]
    if device == "cuda" and not is_flash_attn_2_available():
        skipped[names.pop()] = (
            "flash-attn is not installed; on an H100 without it, none of 64 samples ended in 40 s"
        )
    turns = Turns(names, work, device, skipped)
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
    bandwidth, least = source.nbytes / times[READ]["median"], work.least_bytes()
    names = [name for name in turns.runners if {name, name + FIRST} <= set(times)]
    rows = [row(name, times, work, least / bandwidth, turns.peaks.get(name)) for name in names]
    print_rows(part, rows, work, bandwidth, least / bandwidth)
    return {
        "settings": settings(work),
        "targets": TARGETS[part],
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
        "step": decoding / (max(work.lengths) - 1),
        "share": limit / decoding,
        "peak": peak,
    }


def settings(work: Work) -> dict:
    """The numbers of prompts, samples and tokens."""
    lengths = work.lengths
    return {
        "prompts": len(work.prompts),
        "group": GROUP,
        "prompt_tokens": max(len(prompt.input_ids) for prompt in work.prompts),
        "tokens": sum(lengths),
        "median": statistics.median(lengths),
        "longest": max(lengths),
    }


def print_rows(part: str, rows: list[dict], work: Work, bandwidth: float, limit: float) -> None:
    """Print the table of part `tail` or `long`."""
    table = [
        [
            r["name"],
            f"{r['median']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['ratio']:.2f}",
            f"{r['first_tokens']:.3f}",
            f"{r['step'] * 1000:.2f}",
            f"{r['share']:.1%}",
            megabytes(r["peak"]),
        ]
        for r in rows
    ]
    step = limit / (max(work.lengths) - 1)
    table.append(["limit", None, None, None, None, f"{step * 1000:.3f}", "100%", None])
    columns = [
        "what",
        "s",
        "tokens/s",
        "time / ours",
        "s to first tokens",
        "ms per step",
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


def print_peak(name: str, arguments) -> None:
    """Print what `--peak` asks for, as one line of JSON."""
    work = WORKS[arguments.parts[0]](arguments.quick, arguments.device)
    runner = RUNNERS[name](work)

    def call(lengths: list[int]) -> tuple[None, list]:
        runner.prepare()
        return checked(runner, lengths), []

    call([2] * len(work.lengths))
    runner.release()
    print(json.dumps(measure.peak(Case(partial(call, work.lengths)), arguments.device)))
    runner.release()


# --- adapters -------------------------------------------------------------------------------------


def measure_lora(arguments) -> dict:
    """Measure part `lora`.

    Applied and merged adapters have an engine each, because a CUDA graph keeps the path on which it
    was captured.
    """
    work = long_work(arguments.quick, arguments.device)
    work.model = model = with_lora(work.model, ModelConfig(lora=True)).eval()
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]

    def merge(wanted: bool) -> None:
        if layers[0].merged != wanted:
            model.merge_adapter() if wanted else model.unmerge_adapter()

    cases = {}
    for word, wanted in (("applied", False), ("merged", True)):
        sample = partial(checked, Ours(work), work.lengths)
        cases[f"ours, adapters {word}"] = Case(sample, partial(merge, wanted))
    for word, wanted in (("merge", True), ("unmerge", False)):
        cases[f"ours, {word}"] = Case(partial(merge, wanted), partial(merge, not wanted))
    for case in cases.values():  # warm-up
        case.restore()
        case.call()
    times = time_alternating(cases, arguments.rounds, arguments.device, {})
    applied = times["ours, adapters applied"]["median"]
    rows = [
        {"name": name, **taken, "ratio": taken["median"] / applied} for name, taken in times.items()
    ]
    tokens = [sum(work.lengths) if "adapters" in r["name"] else None for r in rows]
    table = [
        [r["name"], f"{r['median']:.3f}", n and f"{n / r['median']:,.0f}", f"{r['ratio']:.3f}"]
        for r, n in zip(rows, tokens, strict=True)
    ]
    title = f"lora: {len(layers)} adapters, {sum(work.lengths):,} tokens"
    print_table(title, ["what", "s", "tokens/s", "time / with adapters applied"], table)
    return {"settings": settings(work), "rows": rows}


PARTS = {"tail": partial(compare, "tail"), "long": partial(compare, "long"), "lora": measure_lora}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: tail on a CPU, long and lora on a GPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="calls of each runner, in turn; one if it is slow"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out")
    parser.add_argument(
        "--peak",
        choices=RUNNERS,
        help="print the peak memory of this runner in the first part, and nothing else",
    )
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    default_parts = ["long", "lora"] if arguments.device == "cuda" else ["tail"]
    arguments.parts = arguments.parts or default_parts
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    results = {}
    for part in arguments.parts:
        results[part] = PARTS[part](arguments)
        sys.stdout.flush()
        release()
    measure.finish(
        "rollout", arguments.device, rounds=arguments.rounds, quick=arguments.quick, **results
    )


if __name__ == "__main__":
    main()
