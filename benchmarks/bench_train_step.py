"""A training step: a group's prompt trained once, beside repeated prompts and beside TRL.

    python benchmarks/bench_train_step.py [--parts update curve step] [--rounds 2] [--device auto]

- update: reference log-probs, forward and backward of one group of given completions. The model has
  Qwen2-VL-2B's widths and vocabulary, two layers of text and of vision, and random weights
- curve: the same for several G and prompt lengths with a smaller model, ours against repeated
  prompts
- step: a step of the tiny model with rollout and optimizer, ours against TRL's GRPOTrainer

All cases treat activations alike: every layer is recomputed in update and curve, none in step. The
tokens of tokens per second are those of repeated prompts for all cases, so rates compare as times
do. Peak memory excludes weights and gradients; on a CPU a process of its own measures it. With the
tied embedding frozen, autograd makes no second gradient of its size, and activations are what
remains. "Off by" is the relative difference of loss and gradient from ours, for some entries of
every parameter. Where there is no Triton, as on a CPU, TRL also scores the prompt's positions.
Prints Markdown tables; the last line is one JSON document.
"""

import json

import torch
from group_update import CASES, Group
from measure import (
    Case,
    excused,
    finish,
    make_parser,
    megabytes,
    peak,
    peak_in_subprocess,
    pick_device,
    print_table,
    release,
    time_alternating,
)
from whole_step import measure_step

FULL = dict(width=1536, layers=2, vocabulary=151_936)
SMALL = dict(width=512, layers=1, vocabulary=16_384)
QUICK = dict(width=256, layers=1, vocabulary=2048)
SAMPLE = 4096
"""About how many entries of each parameter's gradient are compared."""


# --- updates --------------------------------------------------------------------------------------


def spread_lengths(low: int, high: int, count: int) -> list[int]:
    """`count` completion lengths, spread evenly from `low` to `high`."""
    return torch.linspace(low, high, count).round().int().tolist()


def recorded(case: Case, results: dict, name: str) -> Case:
    """The case, which also leaves its loss and some entries of its gradients in `results`."""

    def call():
        loss, gradients = case.call()
        entries = [g.flatten()[:: max(1, g.numel() // SAMPLE)].double() for g in gradients]
        results[name] = [loss.double()[None].cpu(), torch.cat(entries).cpu()]
        return loss, gradients

    return Case(call, case.restore)


def compare(cases: list[str], group: Group, arguments) -> tuple[list[dict], dict[str, str]]:
    """Return a row of time and agreement for each case, and why others do not work."""
    skipped, results, built = {}, {}, {}
    small = group.other(32, [4, 8])
    for name in cases:
        with excused(name, skipped):
            warm = CASES[name](small)
            warm.restore()
            warm.call()
            built[name] = recorded(CASES[name](group), results, name)
    warm = small = None
    group.model.zero_grad(set_to_none=True)
    release()
    times = time_alternating(built, arguments.rounds, arguments.device, skipped)
    rows = []
    for name, taken in times.items():
        pairs = zip(results[name], results["ours"], strict=True)
        off = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        rate, ratio = group.tokens / taken["median"], taken["median"] / times["ours"]["median"]
        rows.append({"name": name, **taken, "tokens_per_second": rate, "ratio": ratio, "off": off})
    return rows, skipped


def peaks(
    names: list[str], group: Group | None, arguments, skipped: dict[str, str]
) -> dict[str, dict]:
    """Peak bytes of each case beside weights and gradients, with the embedding trained and frozen.

    Where `group` is None, other processes measure them, with groups of their own.
    """
    options = [f"--device={arguments.device}", f"--layers={arguments.layers}"]

    def measured(name: str, frozen: bool) -> dict[str, int]:
        if group is not None:
            return peak(peak_case(name, group, frozen), arguments.device)
        return peak_in_subprocess(__file__, name, options + ["--frozen"] * frozen)

    found = {name: {"peak": None, "peak_frozen": None} for name in names}
    for name, row in found.items():
        for key, frozen in (("peak", False), ("peak_frozen", True)):
            with excused(name, skipped):
                memory = measured(name, frozen)
                row[key] = memory["peak"] - memory["gradients"]
    return found


def measure_update(arguments) -> dict:
    """Measure part `update`."""
    size, prompt_tokens, lengths = update_sizes(arguments)
    group = Group.random(size, arguments.device, prompt_tokens, lengths)
    rows, skipped = compare(list(CASES), group, arguments)
    tokens = group.tokens
    if arguments.device == "cpu" and not arguments.quick:
        group = None  # leaves the memory to the processes that measure
        release()
    memory = peaks([row["name"] for row in rows], group, arguments, skipped)
    for row in rows:
        row |= memory[row["name"]]
    table = [
        [
            row["name"],
            f"{row['median']:,.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            megabytes(row["peak"]),
            share(rows[0], row, "peak"),
            megabytes(row["peak_frozen"]),
            share(rows[0], row, "peak_frozen"),
            "{:.0e} / {:.0e}".format(*row["off"]),
        ]
        for row in rows
    ]
    columns = [
        "what",
        "s",
        "tokens/s",
        "time / ours",
        "peak beside weights and gradients, MiB",
        "ours / its peak",
        "with a frozen embedding, MiB",
        "ours / its peak",
        "loss / gradient off by",
    ]
    title = (
        f"Reference, forward and backward of G = {len(lengths)} completions of "
        f"{lengths[0]}–{lengths[-1]} tokens, prompt {prompt_tokens} tokens "
        f"({tokens:,} tokens repeated); {size}, all layers recomputed"
    )
    print_table(title, columns, table)
    settings = {**size, "prompt_tokens": prompt_tokens, "lengths": lengths, "tokens": tokens}
    return {"settings": settings, "rows": rows, "skipped": skipped}


def share(ours: dict, other: dict, key: str) -> str | None:
    """Our figure as a fraction of another case's; None unless both were measured."""
    return f"{ours[key] / other[key]:.2f}" if ours[key] and other[key] else None


def update_sizes(arguments) -> tuple[dict, int, list[int]]:
    """Sizes of the model, number of prompt tokens, and completion lengths of part `update`."""
    if arguments.quick:
        return QUICK, 64, spread_lengths(4, 16, 4)
    return FULL | {"layers": arguments.layers}, 512, spread_lengths(32, 256, 8)


def peak_case(name: str, group: Group, frozen: bool) -> Case:
    """The case with the tied embedding frozen or trained, ready to be called."""
    group.model.get_input_embeddings().weight.requires_grad_(not frozen)
    case = CASES[name](group)
    case.restore()
    return case


def print_peak(name: str, arguments) -> None:
    """Print what `--peak` asks for, as one line of JSON."""
    size, prompt_tokens, lengths = update_sizes(arguments)
    group = Group.random(size, arguments.device, prompt_tokens, lengths)
    peak_case(name, group.other(32, [4, 8]), arguments.frozen).call()
    case = peak_case(name, group, arguments.frozen)
    print(json.dumps(peak(case, arguments.device)))


def measure_curve(arguments) -> dict:
    """Measure part `curve`."""
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
    title = (
        "Time of the repeated, padded update / ours; completions of "
        f"{lengths[0]}–{lengths[1]} tokens, {size}"
    )
    print_table(title, ["prompt tokens", *(f"G = {g}" for g in sizes)], table)
    return {"settings": {**size, "lengths": lengths}, "points": points}


PARTS = {"update": measure_update, "curve": measure_curve, "step": measure_step}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--rounds", type=int, help="calls of each case, in turn; default 10, on a CPU 2"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--layers",
        type=int,
        default=FULL["layers"],
        help="layers of text, and of vision, of part update's model",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out")
    parser.add_argument(
        "--peak", help="print the peak memory of this case of part update, and nothing else"
    )
    parser.add_argument(
        "--frozen", action="store_true", help="with --peak, freeze the tied embedding"
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
