"""What a change of import buys: each library's own function beside ours at its place, on the same padded batch.

    python benchmarks/bench_integrations.py [--completions 8] [--length 96] [--hidden 1536] [--vocab 151936]

Completions of unequal lengths, padded as the library wants them; every case yields the loss and the gradients of hidden
states and LM head (or of hidden states alone, where the head is frozen). Time is alternating, the median; peak memory
is beside inputs and gradients, on a CPU of a process of its own. "Off by" is the relative difference of the library's
loss and gradient from ours. The whole update of a GRPOTrainer with and without is in bench_train_step.py. verl's own
kernels need CUDA and its package; its definition in PyTorch stands for it. Prints a Markdown table; the last line is
one JSON document.
"""

import argparse
import json

import torch
from measure import (
    Case,
    differentiated,
    finish,
    gemm_case,
    megabytes,
    peak,
    peak_in_subprocess,
    pick_device,
    print_table,
    release,
    time_alternating,
    warm_up,
)
from torch import Tensor

from mr1_fast import linear_grpo_loss, linear_token_logprobs, token_weights
from mr1_fast.integrations import liger as our_liger
from mr1_fast.integrations import verl as our_verl
from mr1_fast.integrations.objective import packed_rows
from mr1_fast.loss import policy_loss_ref

BETA, TEMPERATURE, CLIP = 0.04, 0.9, 0.2
GEMMS = "three bare GEMMs over the rows that count"
SIDES = ("theirs", "ours")
SIZES = ("completions", "length", "hidden", "vocab", "dtype")
"""Arguments that make a batch."""


class PaddedBatch:
    """Hidden states (B, T, D), an LM head (V, D), and what the loss needs beside, with masks of unequal lengths."""

    def __init__(self, arguments):
        torch.manual_seed(0)
        count, length, width = arguments.completions, arguments.length, arguments.hidden
        like = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
        lengths = torch.linspace(length / 8, length, count).round().int()
        self.mask = (torch.arange(length) < lengths[:, None]).to(arguments.device)
        self.hidden = torch.randn(count, length, width, **like)
        self.weight = torch.randn(arguments.vocab, width, **like) * (2 / width**0.5)
        self.ids = torch.randint(arguments.vocab, self.mask.shape, device=arguments.device)
        self.advantages = torch.randn(count, device=arguments.device)
        logp, _ = linear_token_logprobs(
            self.hidden.flatten(0, 1), self.weight, self.ids.flatten(), TEMPERATURE
        )
        near = [
            logp.view_as(self.ids) + 0.1 * torch.randn_like(logp).view_as(self.ids)
            for _ in range(2)
        ]
        self.old_logp, self.ref_logp = (torch.where(self.mask, each, 0.0) for each in near)

    def packed(self) -> dict:
        """What our own functions take beside hidden states and head."""
        _, ends = packed_rows(self.mask)
        rows = {
            "old_logp": self.old_logp[self.mask],
            "ref_logp": self.ref_logp[self.mask],
            "cu_seqlens": ends,
        }
        weights = token_weights(ends, "grpo")
        advantages = self.advantages.repeat_interleave(ends.diff())
        return {"advantages": advantages, "token_weights": weights, "beta": BETA, **rows}

    def case(self, loss, frozen: bool = False) -> Case:
        """`loss(hidden, weight)` and its gradients."""
        return differentiated(loss, self.hidden, self.weight, frozen)


def liger(batch: PaddedBatch, module, **options):
    """LigerFusedLinearGRPOLoss of `module`."""
    settings = {
        "beta": BETA,
        "loss_type": "grpo",
        "temperature": TEMPERATURE,
        "compiled": batch.hidden.is_cuda,
    }
    loss = module.LigerFusedLinearGRPOLoss(**settings)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        inputs = (hidden, weight, batch.ids, batch.mask, batch.advantages)
        return loss(
            *inputs, ref_per_token_logps=batch.ref_logp, old_per_token_logps=batch.old_logp
        )[0]

    return batch.case(call, **options)


def on_logits(batch: PaddedBatch, module):
    """triton_grpo_loss of `module`, whose logits are made by the model's own head."""

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (
            torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ weight.T
        )  # it wants one position more
        settings = {
            "temperature": TEMPERATURE,
            "beta": BETA,
            "eps_high": CLIP,
            "loss_type": "grpo",
            "reduce": True,
        }
        given = (batch.old_logp, batch.ref_logp, batch.ids, batch.advantages, batch.mask)
        return module.triton_grpo_loss(logits, *given, **settings)[0]

    return batch.case(call)


def by_logprobs(batch: PaddedBatch, function):
    """verl: packed rows, `function(hidden, weight, labels, temperature, "none")`, then the policy loss in PyTorch."""
    arguments = batch.packed()

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, _ = function(hidden[batch.mask], weight, batch.ids[batch.mask], TEMPERATURE, "none")
        return policy_loss_ref(logp, **arguments)[0].sum()

    return batch.case(call)


def whole_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str
):
    """Log-probs and entropy as verl defines them, and as a plain loop has them that drops padding before the head."""
    logp = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def our_loop(batch: PaddedBatch, chunk_bytes: int | None = None):
    """linear_grpo_loss on the rows that count."""
    arguments, targets = batch.packed(), batch.ids[batch.mask]

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"temperature": TEMPERATURE, "chunk_bytes": chunk_bytes}
        return linear_grpo_loss(hidden[batch.mask], weight, targets, **arguments, **options).loss

    return batch.case(call)


def their_liger():
    """Liger's functions in one namespace."""
    from types import SimpleNamespace

    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return SimpleNamespace(
        LigerFusedLinearGRPOLoss=LigerFusedLinearGRPOLoss, triton_grpo_loss=triton_grpo_loss
    )


PAIRS = {
    "Liger LigerFusedLinearGRPOLoss": (
        lambda b: liger(b, their_liger()),
        lambda b: liger(b, our_liger),
    ),
    "Liger LigerFusedLinearGRPOLoss, frozen head": (
        lambda b: liger(b, their_liger(), frozen=True),
        lambda b: liger(b, our_liger, frozen=True),
    ),
    "Liger triton_grpo_loss": (
        lambda b: on_logits(b, their_liger()),
        lambda b: on_logits(b, our_liger),
    ),
    "verl linear_cross_entropy (its definition)": (
        lambda b: by_logprobs(b, whole_logits),
        lambda b: by_logprobs(b, our_verl.linear_cross_entropy),
    ),
    "plain PyTorch loop": (lambda b: by_logprobs(b, whole_logits), our_loop),
    "plain PyTorch loop, ours with chunks of 192 MiB": (
        lambda b: by_logprobs(b, whole_logits),
        lambda b: our_loop(b, 192 * 2**20),
    ),
}
"""Name → (the library's case, ours), each from a batch."""
CASES = {
    f"{side}: {name}": build
    for name, pair in PAIRS.items()
    for side, build in zip(SIDES, pair, strict=True)
}


def measure(arguments) -> tuple[list[dict], dict]:
    """A row for each pair; what does not run here is a line."""
    device, batch = arguments.device, PaddedBatch(arguments)
    cases, far, skipped = {}, {}, {}
    for name in PAIRS:
        builders = {key: CASES[key] for key in (f"ours: {name}", f"theirs: {name}")}
        for known, found in zip(
            (cases, far, skipped), warm_up(builders, batch, device, f"ours: {name}"), strict=True
        ):
            known |= found
    floor = gemm_case(batch.hidden[batch.mask], batch.weight)
    times = time_alternating({**cases, GEMMS: floor}, arguments.rounds, device, skipped)
    keys = list(cases)
    if device == "cuda":
        memory = {key: peak(cases[key], device) for key in keys}
    else:
        del cases, batch, floor  # room for the processes that measure
        release()
        options = [f"--{name}={getattr(arguments, name)}" for name in (*SIZES, "device")]
        memory = {key: peak_in_subprocess(__file__, key, options) for key in keys}
    table = []
    for name in PAIRS:
        # A frozen head needs no weight gradient: two of the three.
        row = {"name": name, "gemms": times[GEMMS]["median"] * (2 / 3 if "frozen" in name else 1)}
        for side in SIDES:
            if (key := f"{side}: {name}") in times:
                row[side] = times[key] | {"peak": memory[key]["peak"] - memory[key]["gradients"]}
        table.append(row | {"off": far.get(f"theirs: {name}")})
    return table, skipped


def show(rows: list[dict], arguments) -> None:
    table = []
    for row in rows:
        ours, theirs = row["ours"], row.get("theirs")
        line = [
            row["name"],
            f"{theirs['median'] * 1000:,.0f}" if theirs else None,
            f"{ours['median'] * 1000:,.0f}",
        ]
        line += [
            f"{theirs['median'] / ours['median']:.2f}" if theirs else None,
            f"{row['gemms'] / ours['median']:.0%}",
        ]
        line += [megabytes(theirs["peak"]) if theirs else None, megabytes(ours["peak"])]
        table.append(
            [*line, "{loss:.0e} / {gradient:.0e}".format(**row["off"]) if theirs else None]
        )
    columns = [
        "what",
        "theirs, ms",
        "ours, ms",
        "theirs / ours",
        "bare GEMMs / ours",
        "theirs, MiB",
        "ours, MiB",
    ]
    sizes = f"B = {arguments.completions}, T = {arguments.length}, D = {arguments.hidden:,}, V = {arguments.vocab:,}"
    print_table(
        f"{sizes}, {arguments.dtype} on {arguments.device}",
        [*columns, "loss / gradient off by"],
        table,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--peak", choices=CASES, help="print the peak memory of one case and nothing else"
    )
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    gpu = arguments.device == "cuda"
    arguments.completions = arguments.completions or (16 if gpu else 8)
    arguments.length = arguments.length or (1024 if gpu else 96)
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    arguments.rounds = arguments.rounds or (10 if gpu else 3)
    if arguments.peak:
        print(json.dumps(peak(CASES[arguments.peak](PaddedBatch(arguments)), arguments.device)))
        return
    rows, skipped = measure(arguments)
    show(rows, arguments)
    sizes = {name: getattr(arguments, name) for name in (*SIZES, "rounds")}
    finish("integrations", arguments.device, settings=sizes, rows=rows, skipped=skipped)


if __name__ == "__main__":
    main()
