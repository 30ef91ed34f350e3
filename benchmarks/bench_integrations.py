"""What a change of import gains: each library's own function and our replacement on the same batch.

    python benchmarks/bench_integrations.py [--completions 8] [--length 96] [--hidden 1536]

Completions have unequal lengths and are padded as the library wants them. Every case yields the
loss and the gradients of hidden states and LM head (of hidden states alone if the head is frozen).
Times are medians of alternating calls. Peak memory excludes inputs and gradients; on a CPU a
process of its own measures it. "Off by" is the relative difference of the library's loss and
gradient from ours. The whole update of a GRPOTrainer with and without our loss is in
bench_train_step.py. verl's own kernels need CUDA and its package; its definition in PyTorch stands
in for it. Prints a Markdown table; the last line is one JSON document.
"""

import json
from types import SimpleNamespace

import torch
from device_time import sm_clock
from measure import (
    Case,
    differentiated,
    finish,
    gemm_case,
    make_parser,
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
from mr1_fast.integrations.loss_options import rows_with_loss
from mr1_fast.loss import policy_loss_ref

BETA, TEMPERATURE, CLIP = 0.04, 0.9, 0.2
GEMMS = "three bare GEMMs over the rows that count"
SIDES = ("theirs", "ours")
BATCH_FLAGS = ("completions", "length", "hidden", "vocab", "dtype")
"""The flags that determine a batch."""


class PaddedBatch:
    """Hidden states (B, T, D) of unequal lengths, an LM head (V, D), and the loss' other inputs."""

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
        rows = self.hidden.flatten(0, 1)
        logp, _ = linear_token_logprobs(rows, self.weight, self.ids.flatten(), TEMPERATURE)
        near = [(logp + 0.1 * torch.randn_like(logp)).view_as(self.ids) for _ in range(2)]
        self.old_logp, self.ref_logp = (torch.where(self.mask, each, 0.0) for each in near)

    def loss_arguments(self) -> dict:
        """The arguments of `linear_grpo_loss` after the targets, packed."""
        _, cu_seqlens = rows_with_loss(self.mask)
        return {
            "advantages": self.advantages.repeat_interleave(cu_seqlens.diff()),
            "token_weights": token_weights(cu_seqlens, "grpo"),
            "beta": BETA,
            "old_logp": self.old_logp[self.mask],
            "ref_logp": self.ref_logp[self.mask],
            "cu_seqlens": cu_seqlens,
        }

    def case(self, loss, frozen: bool = False) -> Case:
        """A case of `loss(hidden, weight)` and its gradients."""
        return differentiated(loss, self.hidden, self.weight, frozen)


def liger(batch: PaddedBatch, module, frozen: bool = False) -> Case:
    """A case of LigerFusedLinearGRPOLoss of `module`."""
    loss = module.LigerFusedLinearGRPOLoss(
        beta=BETA, loss_type="grpo", temperature=TEMPERATURE, compiled=batch.hidden.is_cuda
    )
    logps = {"ref_per_token_logps": batch.ref_logp, "old_per_token_logps": batch.old_logp}

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        value, _ = loss(hidden, weight, batch.ids, batch.mask, batch.advantages, **logps)
        return value

    return batch.case(call, frozen)


def on_logits(batch: PaddedBatch, module) -> Case:
    """A case of triton_grpo_loss of `module` on logits of the model's own head."""
    given = batch.old_logp, batch.ref_logp, batch.ids, batch.advantages, batch.mask
    settings = {"beta": BETA, "eps_high": CLIP, "loss_type": "grpo", "reduce": True}

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        one_more = torch.nn.functional.pad(hidden, (0, 0, 0, 1))  # the position that it ignores
        logits = one_more @ weight.T
        value, _ = module.triton_grpo_loss(logits, *given, temperature=TEMPERATURE, **settings)
        return value

    return batch.case(call)


def by_logprobs(batch: PaddedBatch, function) -> Case:
    """A case of log-probs by a function with verl's arguments, then the policy loss in PyTorch."""
    arguments = batch.loss_arguments()

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, _ = function(hidden[batch.mask], weight, batch.ids[batch.mask], TEMPERATURE, "none")
        per_token, *_ = policy_loss_ref(logp, **arguments)
        return per_token.sum()

    return batch.case(call)


def whole_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str
):
    """Log-probs and entropy as verl defines them, and as a plain loop without padding has them."""
    logp = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def our_loop(batch: PaddedBatch, chunk_bytes: int | None = None) -> Case:
    """A case of linear_grpo_loss on the rows that carry loss."""
    arguments, targets = batch.loss_arguments(), batch.ids[batch.mask]

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"temperature": TEMPERATURE, "chunk_bytes": chunk_bytes}
        return linear_grpo_loss(hidden[batch.mask], weight, targets, **arguments, **options).loss

    return batch.case(call)


def their_liger():
    """Liger's functions in one namespace, like our module of them."""
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
"""Name → functions of a batch that build the library's case and ours."""
CASES = {
    f"{side}: {name}": build
    for name, pair in PAIRS.items()
    for side, build in zip(SIDES, pair, strict=True)
}


def measure(arguments) -> tuple[list[dict], dict]:
    """Return a row for each pair, and why the cases that do not run here do not."""
    device, batch = arguments.device, PaddedBatch(arguments)
    cases, off, skipped = {}, {}, {}
    for name in PAIRS:
        own = f"ours: {name}"
        builders = {key: CASES[key] for key in (own, f"theirs: {name}")}
        working, differences, failed = warm_up(builders, batch, device, against=own)
        cases |= working
        off |= differences
        skipped |= failed
    floor = gemm_case(batch.hidden[batch.mask], batch.weight)
    times = time_alternating({**cases, GEMMS: floor}, arguments.rounds, device, skipped)
    clock = sm_clock(floor.call, times[GEMMS]["median"], device)
    keys = list(cases)
    if device == "cuda" or arguments.quick:
        memory = {key: peak(cases[key], device) for key in keys}
    else:
        del cases, batch, floor  # leaves the memory to the processes that measure
        release()
        options = [f"--{name}={getattr(arguments, name)}" for name in (*BATCH_FLAGS, "device")]
        memory = {key: peak_in_subprocess(__file__, key, options) for key in keys}
    table = []
    for name in PAIRS:
        # A frozen head needs no weight gradient: two of the three products.
        gemms = times[GEMMS]["median"] * (2 / 3 if "frozen" in name else 1)
        row = {"name": name, "gemms": gemms, "sm_mhz": clock}
        for side in SIDES:
            if (key := f"{side}: {name}") in times:
                row[side] = times[key] | {"peak": memory[key]["peak"] - memory[key]["gradients"]}
        table.append(row | {"off": off.get(f"theirs: {name}")})
    return table, skipped


def show(rows: list[dict], arguments) -> None:
    """Print the table of `measure`."""
    table = []
    for row in rows:
        ours, theirs = row["ours"], row.get("theirs")
        table.append(
            [
                row["name"],
                f"{theirs['median'] * 1000:,.0f}" if theirs else None,
                f"{ours['median'] * 1000:,.0f}",
                f"{theirs['median'] / ours['median']:.2f}" if theirs else None,
                f"{row['gemms'] / ours['median']:.0%}",
                megabytes(theirs["peak"]) if theirs else None,
                megabytes(ours["peak"]),
                "{loss:.0e} / {gradient:.0e}".format(**row["off"]) if theirs else None,
            ]
        )
    columns = [
        "what",
        "theirs, ms",
        "ours, ms",
        "theirs / ours",
        "bare GEMMs / ours",
        "theirs, MiB",
        "ours, MiB",
        "loss / gradient off by",
    ]
    title = (
        f"B = {arguments.completions}, T = {arguments.length}, D = {arguments.hidden:,}, "
        f"V = {arguments.vocab:,}, {arguments.dtype} on {arguments.device}"
    )
    print_table(title, columns, table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--completions", type=int, help="default 8, on a GPU 16")
    parser.add_argument("--length", type=int, help="default 96, on a GPU 1024")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", help="default float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, help="default 3, on a GPU 10")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure memory on a CPU in this process, to try the script out",
    )
    parser.add_argument(
        "--peak",
        choices=CASES,
        metavar="CASE",
        help="print the peak memory of this case, and nothing else",
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
    settings = {name: getattr(arguments, name) for name in (*BATCH_FLAGS, "rounds")}
    finish("integrations", arguments.device, settings=settings, rows=rows, skipped=skipped)


if __name__ == "__main__":
    main()
