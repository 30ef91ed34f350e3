"""Launches and bytes of every layer, variant and pass that bench_layers.py compares, and tables."""

from typing import NamedTuple

import torch
from count_kernels import KINDS, Launch, Totals, counted
from layer_parts import PARTS, TEXT, TRAINING, VISION, WORK, Part, meta_part
from layer_variants import ADDED, PASSES, RECOMPUTED, VARIANTS, pieces, run_pass
from measure import excused, print_table

from mr1_fast.plan.workload import Workload

ALL_WEIGHTS = next(iter(TRAINING))
SAME_VISION = {"7B": "2B", "3-4B": "3-2B"}
"""Models whose vision blocks are those of another."""


class Setting(NamedTuple):
    """A layer of a model, and what of it is trained."""

    model: str
    training: str
    kind: str
    """A text layer or a vision block."""


def settings(models: list[str]) -> list[Setting]:
    """All settings of some models; a vision block is frozen where adapters are trained."""
    found = [Setting(model, training, TEXT) for model in models for training in TRAINING]
    with_vision = [model for model in models if SAME_VISION.get(model) not in models]
    return [*found, *(Setting(model, ALL_WEIGHTS, VISION) for model in with_vision)]


def launches(
    setting: Setting, variant: str, name: str, work: Workload = WORK
) -> tuple[list[Launch], Part]:
    """The launches of one pass of a variant, and the part on the meta device that was run."""
    part = meta_part(setting.model, setting.kind, setting.training, work)
    way = VARIANTS[variant](part)
    inputs, gradient = pieces(way, part.x), torch.empty_like(part.x)
    part.layer.zero_grad(set_to_none=True)
    if name == ADDED:
        for parameter in part.trained:
            parameter.grad = torch.empty_like(parameter)
    with counted() as found:
        run_pass(name, way, inputs, gradient)
    part.layer.zero_grad(set_to_none=True)
    return found, part


def count(models: list[str], variants: list[str], work: Workload) -> dict:
    """Count every pass of every setting by every variant that can be counted; print tables."""
    skipped, rows = {}, []
    for setting in settings(models):
        for variant in variants:
            if variant in skipped:
                continue
            passes = {}
            with excused(variant, skipped):
                for name in PASSES:
                    found, part = launches(setting, variant, name, work)
                    passes[name] = Totals.of(found, part.tokens, part.width)._asdict()
            if variant not in skipped:
                rows.append({**setting._asdict(), "variant": variant, "passes": passes})
    print_counts(rows, work)
    return {"rows": rows, "skipped": skipped}


def print_counts(rows: list[dict], work: Workload) -> None:
    """Print the launches of all passes, and those of the first model's layers by kind."""
    tokens = sum(work.prompts) + sum(work.completions) - len(work.completions)
    table = []
    for row in rows:
        cells = [
            f"{totals['launches']} ({totals['alone']}), {gigabytes(totals['nbytes'])}"
            for totals in row["passes"].values()
        ]
        table.append([row["model"], row["kind"], row["training"], row["variant"], *cells])
    title = (
        f"Launches (of which alone), and GB of all but products and attention; {tokens:,} tokens, "
        f"{sum(work.patches):,} patches, bf16"
    )
    print_table(title, ["model", "layer", "trained", "variant", *PASSES], table)

    for kind in PARTS:
        chosen = {
            row["variant"]: row["passes"][RECOMPUTED]["kinds"]
            for row in rows
            if (row["model"], row["kind"]) == (rows[0]["model"], kind)
            and row["training"] == ALL_WEIGHTS
        }
        table = [
            [name, *(by_kind(kinds.get(name)) for kinds in chosen.values())]
            for name in KINDS
            if any(name in kinds for kinds in chosen.values())
        ]
        title = f"Launches and GB by kind: {kind} of the {rows[0]['model']}, {RECOMPUTED}"
        print_table(title, ["kind", *chosen], table)


def by_kind(found: tuple[int, int] | None) -> str | None:
    """A cell of the table by kind."""
    return found and f"{found[0]}, {gigabytes(found[1])}"


def gigabytes(value: float) -> str:
    """Bytes as a number of GB."""
    return f"{value / 1e9:.2f}"
