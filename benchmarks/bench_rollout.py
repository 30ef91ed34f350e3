"""The rollout: ours beside transformers' `generate` and its continuous batching, and beside the memory's bandwidth.

    python benchmarks/bench_rollout.py [--parts tail long lora] [--rounds 3] [--device auto] [--quick]

- tail: the tiny model, 16 drawn prompts × 8 samples, lengths with a long tail: log-normal with median 48 and σ = 1,
  drawn once, clipped to at most 256. Target: 3 times the tokens per second of `generate`
- long: a model of Qwen2-VL-2B's shape in bf16, 8 prompts of 512 image tokens and some text × 8 samples of 512 tokens.
  Targets: 5 times the tokens per second of `generate`, and 60% of the limit
- lora: the same with LoRA adapters, applied in every step, or merged before: should the engine merge?

Without --parts: tail on a CPU, the others on a GPU. Weights are random; they, prompts and lengths are the same for all,
and so is the sampling, at temperature 1 without filters. A sample ends at its prescribed length and nowhere else:
`generate` has a stopping criterion for each row, continuous batching a limit for each request. The latter takes token
ids alone: image tokens are text to it, and no image is encoded. What is kept between calls is made before: our pool and
graphs, continuous batching's cache. Encoding prompts into tensors is not timed; ours returns texts, too.

The limit is a copy's bandwidth, in the same run, for what steps must read at least: weights (layers, last norm, head),
and keys and values that running samples look at, a prompt's once for its group. Steps are timed without the first
tokens, which a run of one token for each sample gives. Peak memory is beside the weights; on a CPU of a process of its
own. Prints Markdown tables; the last line is one JSON document.
"""

import argparse
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
COPY = "copy"
WORKS = {"tail": tail_work, "long": long_work}
TARGETS = {"tail": {"generate": 3}, "long": {"generate": 5, "limit": 0.6}}
measure.SLOW = 10.0  # `generate` takes longer with 2B weights: it is timed once


def checked(runner: Callable, lengths: list[int]) -> None:
    """Call it. RuntimeError unless every sample has its length."""
    wrong = sum(a != b for a, b in zip(runner(lengths), lengths, strict=True))
    if wrong:
        raise RuntimeError(f"{wrong} of {len(lengths)} samples have another length than prescribed")


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


class Turns:
    """Runners of one work that take turns; `peaks` are bytes on the GPU with what a runner keeps between its calls."""

    def __init__(self, names: list[str], work: Work, device: str, skipped: dict[str, str]):
        self.work, self.device = work, device
        self.runners, self.kept, self.peaks = {}, {}, {}
        for name in names:
            before = allocated(device)
            with excused(name, skipped):
                self.kept[name], self.runners[name] = 0, RUNNERS[name](work)
                short = [min(n, work.most_warm) for n in work.lengths]
                self.prepare(name)
                self.whole(name, work.lengths if name.startswith("ours") else short, before)
            self.rest()
            if name in skipped and name in self.runners:
                self.runners.pop(name).release()
            release()
            self.kept[name] = allocated(device) - before

    def rest(self) -> None:
        """None is at work."""
        for runner in self.runners.values():
            runner.rest()

    def prepare(self, name: str) -> None:
        """It is this one's turn."""
        self.rest()
        self.runners[name].prepare()

    def whole(self, name: str, lengths: list[int], before: int | None = None) -> None:
        """A call; the bytes before it are those of others."""
        before = allocated(self.device) - self.kept[name] if before is None else before
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        checked(self.runners[name], lengths)
        if self.device == "cuda":
            self.peaks[name] = max(
                self.peaks.get(name, 0), torch.cuda.max_memory_allocated() - before
            )

    def cases(self) -> dict[str, Case]:
        """All tokens, and the first ones, of each."""
        first, cases = [1] * len(self.work.lengths), {}
        for name, runner in self.runners.items():
            cases[name] = Case(
                partial(self.whole, name, self.work.lengths), partial(self.prepare, name)
            )
            cases[name + FIRST] = Case(partial(checked, runner, first), partial(self.prepare, name))
        return cases


def compare(part: str, arguments) -> dict:
    """Parts `tail` and `long`."""
    device, skipped = arguments.device, {}
    work = WORKS[part](arguments.quick, device)
    names = [name for name in RUNNERS if device == "cuda" or name != WITHOUT_GRAPHS]
    if device == "cuda" and not is_flash_attn_2_available():
        skipped[names.pop()] = (
            "flash-attn is not installed; on an H100 without it, none of 64 samples ended in 40 s"
        )
    turns = Turns(names, work, device, skipped)
    source = torch.ones(
        1024, 2**20 if device == "cuda" else 2**17, dtype=torch.uint8, device=device
    )
    cases = {COPY: Case(measure.copy_case(source).call, turns.rest), **turns.cases()}
    times = time_alternating(cases, arguments.rounds, device, skipped)
    turns.rest()
    if device == "cpu":
        options = ["--parts", part, f"--device={device}", *(["--quick"] if arguments.quick else [])]
        for name in turns.runners:
            with excused(name, skipped):
                turns.peaks[name] = peak_in_subprocess(__file__, name, options)["peak"]
    bandwidth, least = 2 * source.nbytes / times[COPY]["median"], work.least_bytes()
    names = [name for name in turns.runners if {name, name + FIRST} <= set(times)]
    rows = [row(name, times, work, least / bandwidth, turns.peaks.get(name)) for name in names]
    print_rows(part, rows, work, bandwidth, least / bandwidth)
    found = {
        "copy": times[COPY],
        "bandwidth": bandwidth,
        "least_bytes": least,
        "rows": rows,
        "skipped": skipped,
    }
    return {"settings": settings(work), "targets": TARGETS[part], **found}


def row(name: str, times: dict[str, dict], work: Work, limit: float, peak: int | None) -> dict:
    """One runner's figures."""
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
    """What is sampled."""
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
    """The table of part `tail` or `long`."""
    table = [
        [r["name"], f"{r['median']:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f}",
         f"{r['first_tokens']:.3f}", f"{r['step'] * 1000:.2f}", f"{r['share']:.1%}", megabytes(r["peak"])]
        for r in rows
    ]  # fmt: skip
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
    ]
    s = settings(work)
    title = (
        f"{part}: {s['prompts']} prompts of {s['prompt_tokens']} tokens × {s['group']} samples, {s['tokens']:,} tokens "
        f"in all (median {s['median']:.0f}, longest {s['longest']}); a copy's bandwidth: {bandwidth / 1e9:,.1f} GB/s"
    )
    print_table(title, [*columns, "peak beside the weights, MiB"], table)


def print_peak(name: str, arguments) -> None:
    """What `--peak` prints: one JSON line."""
    work = WORKS[arguments.parts[0]](arguments.quick, arguments.device)
    runner = RUNNERS[name](work)

    def call(lengths: list[int]) -> tuple[None, list]:
        runner.prepare()
        return checked(runner, lengths), []

    call([2] * len(work.lengths))
    runner.release()
    print(json.dumps(measure.peak(Case(partial(call, work.lengths)), arguments.device)))
    runner.release()


# --- adapters -----------------------------------------------------------------------------------------------------


def measure_lora(arguments) -> dict:
    """Part `lora`. Applied and merged have an engine each, as a graph keeps the path that it was captured on."""
    work = long_work(arguments.quick, arguments.device)
    work.model = model = with_lora(work.model, ModelConfig(lora=True)).eval()
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]

    def merge(wanted: bool) -> None:
        if layers[0].merged != wanted:
            model.merge_adapter() if wanted else model.unmerge_adapter()

    cases = {
        f"ours, adapters {word}": Case(
            partial(checked, Ours(work), work.lengths), partial(merge, wanted)
        )
        for word, wanted in (("applied", False), ("merged", True))
    }
    cases |= {f"ours, {word}": Case(partial(merge, word == "merge"), partial(merge, word != "merge"))
              for word in ("merge", "unmerge")}  # fmt: skip
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: tail on a CPU, long and lora on a GPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="calls of each, in turn; one of what is slow"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="sizes for trying the script out")
    parser.add_argument(
        "--peak",
        choices=RUNNERS,
        help="print the peak memory of this one in the first part and end",
    )
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    arguments.parts = arguments.parts or (
        ["long", "lora"] if arguments.device == "cuda" else ["tail"]
    )
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
