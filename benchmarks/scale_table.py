"""What more cards would give, on paper: the tables of docs/distributed.md, printed as Markdown.

    python benchmarks/scale_table.py

Bytes are those of the memory plan and its wires; seconds follow from the assumptions below. Nothing
here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from mr1_fast.config import TrainConfig
from mr1_fast.model.flop_count import FROZEN, Trained, count_flop
from mr1_fast.model.known import find_model_config
from mr1_fast.peak_flops import BF16_AND_FP16, TERA
from mr1_fast.plan.plan import GIB, Plan, make_plan, usable_bytes
from mr1_fast.plan.planned_run import planned_run
from mr1_fast.plan.sharded import KINDS
from mr1_fast.plan.wires import Wires, step_wires
from mr1_fast.plan.workload import Workload
from mr1_fast.rollout.cache import token_bytes
from mr1_fast.rollout.engine import MOST_SAMPLES

MODELS = (
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
)
CARDS = (2, 4, 8, 64)
A_NODE = 8
"""Cards in one machine."""
SHARE = 4
"""Prompts of a step for each card."""
GLOBAL_BATCH = 64
"""Prompts of a step that is shared out over more and more cards."""
MATRIX_SHARE, MEMORY_SHARE = 0.4, 0.6
"""Shares of a card's peaks that passes, and decoding, are taken to reach."""


@dataclass(frozen=True)
class Card:
    """A graphics card, and what it is wired with."""

    name: str
    vram: int
    flops: float
    bandwidth: float
    """Bytes per second of its memory."""
    wires: float
    """Bytes per second that a ring moves from card to card in one machine."""
    between: float = 20e9
    """The same of a ring through several machines: of 25 GB/s that 200 Gb/s are."""


RTX_4090 = Card("RTX 4090, PCIe 4", 24, BF16_AND_FP16["GeForce RTX 4090"] * TERA, 1008e9, 20e9)
A100 = Card("A100, NVLink", 80, BF16_AND_FP16["A100-SXM4-80GB"] * TERA, 2039e9, 200e9)


def settings(model: str, kind: str, cards: int) -> TrainConfig:
    """Full fine-tuning with a KL term; a pack is one prompt with its 8 completions.

    `full` has the reference in parts on the cards, the other kinds in host memory.
    """
    return TrainConfig(
        model=model,
        device="cuda",
        sharding=kind,
        reference="resident" if kind == "full" else "offload",
        prompts_per_step=SHARE * cards,
        recompute="all",
        tokens_per_microbatch=5120,
        eval_samples=0,
    )


@cache
def plan(model: str, kind: str, cards: int) -> Plan:
    """The memory plan of a card."""
    return make_plan(settings(model, kind, cards), find_model_config(model), processes=cards)


# --- seconds on paper -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Seconds of the stages of a step on one card, without any exchange."""

    rollout: float
    reference: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.rollout + self.reference + self.update


@cache
def computed(model: str, card: Card, prompts: int) -> Seconds:
    """Seconds in which a card computes so many prompts with their completions.

    Passes are products of matrices: forward; forward, forward again and backward. Each token of
    decoding reads all weights, and the keys and values of all samples, half of them on average.
    """
    config = settings(model, "none", 1)
    run = planned_run(config, find_model_config(model))
    group = Workload.largest(config, run.model_config, config.num_generations, 1)
    (pack,) = group.packs(config.tokens_per_microbatch)
    trained = count_flop(run.model_config, pack, Trained.of(run.policy.model))
    frozen = count_flop(run.model_config, pack, FROZEN)
    flops = MATRIX_SHARE * card.flops
    forward = prompts * frozen.forward / flops

    samples = prompts * config.num_generations
    rounds = math.ceil(samples / MOST_SAMPLES)
    keys = config.max_prompt_tokens / config.num_generations + config.max_new_tokens / 2
    read = rounds * run.policy.weights + samples * keys * token_bytes(run.policy.text)
    decoding = config.max_new_tokens * read / (MEMORY_SHARE * card.bandwidth)
    prefill = forward * config.max_prompt_tokens / pack.input_ids.numel()
    return Seconds(
        rollout=prefill + decoding,
        reference=forward,
        update=prompts * (2 * trained.forward + trained.backward) / flops,
    )


def waited(kind: str, wires: Wires, seconds: Seconds, speed: float) -> float:
    """Seconds of a step in which a card waits for wires of so many bytes per second.

    Gathering layers ahead and summing their gradients overlaps with computing (`full`), but not
    gathering for the rollout, nor the sums of the other kinds after the last pack.
    """
    rollout, reference, update = (
        size / speed for size in (wires.rollout, wires.reference, wires.update)
    )
    if kind != "full":
        return rollout + reference + update
    late = (max(0.0, reference - seconds.reference), max(0.0, update - seconds.update))
    return rollout + sum(late)


def speed(card: Card, cards: int) -> float:
    """Bytes per second of a ring through so many cards."""
    return card.wires if cards <= A_NODE else min(card.wires, card.between)


# --- tables ---------------------------------------------------------------------------------------


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells: str) -> Iterator[str]:
    """The first two rows of a table."""
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def short(model: str) -> str:
    """A model's name without its maker and its kind."""
    return model.partition("/")[2].removesuffix("-Instruct")


def bytes_table() -> Iterator[str]:
    """Bytes per card at the peak, which cards have them, and bytes that a card sends in a step."""
    yield from header("model", "`--sharding`", *(f"{n} cards" for n in CARDS))
    for model in MODELS:
        for kind in KINDS:
            plans = [plan(model, kind, n) for n in CARDS]
            yield row(short(model), kind, *map(cell, plans))


def cell(planned: Plan) -> str:
    """What a card holds and sends."""
    fits = next((v for v in (24, 80) if planned.peak <= usable_bytes(v)), "–")
    return f"{planned.peak / GIB:.1f} ({fits}), {planned.wires.total / GIB:.1f}"


def efficiency_table() -> Iterator[str]:
    """Share of the time in which cards compute, with as many prompts on each."""
    columns = [(RTX_4090, n) for n in (2, 4, 8)] + [(A100, n) for n in CARDS]
    names = (f"{card.name}, {n}" for card, n in columns)
    yield from header("model", "`--sharding`", "s a step: 4090, A100", *names)
    for model in MODELS:
        alone = [computed(model, card, SHARE) for card in (RTX_4090, A100)]
        for kind in KINDS:
            cells = [efficiency(model, kind, card, n) for card, n in columns]
            steps = ", ".join(f"{each.total:.1f}" for each in alone)
            yield row(short(model), kind, steps, *cells)


def efficiency(model: str, kind: str, card: Card, cards: int) -> str:
    """The share of the time that is computing; – where the run does not fit on the card."""
    planned = plan(model, kind, cards)
    if planned.peak > usable_bytes(card.vram):
        return "–"
    seconds = computed(model, card, SHARE)
    lost = waited(kind, planned.wires, seconds, speed(card, cards))
    return f"{seconds.total / (seconds.total + lost):.0%}"


def batch_table(model: str, kind: str, card: Card) -> Iterator[str]:
    """Seconds of the same step, shared out over more and more cards."""
    yield from header("cards", "rollout, s", "reference, s", "update, s", "wires, s", "speed-up")
    alone = computed(model, card, GLOBAL_BATCH).total
    for cards in (1, *CARDS):
        prompts = GLOBAL_BATCH // cards
        seconds = computed(model, card, prompts)
        config = replace(settings(model, kind, 1), prompts_per_step=GLOBAL_BATCH)
        run = planned_run(config, find_model_config(model), cards)
        lost = waited(kind, step_wires(run, prompts), seconds, speed(card, cards))
        stages = (seconds.rollout, seconds.reference, seconds.update, lost)
        gain = alone / (seconds.total + lost)
        yield row(cards, *(f"{each:.2f}" for each in stages), f"{gain:.1f}")


def main() -> None:
    """Print all tables."""
    tables = {
        "GiB per card, in brackets the card of 24 or 80 GB that has them, and GiB that it sends "
        "in a step": bytes_table(),
        f"Efficiency with {SHARE} prompts on each card": efficiency_table(),
        f"{GLOBAL_BATCH} prompts of {short(MODELS[0])} on more and more cards ({A100.name}, "
        "`--sharding optimizer`)": batch_table(MODELS[0], "optimizer", A100),
    }
    for title, lines in tables.items():
        print(f"**{title}**\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
