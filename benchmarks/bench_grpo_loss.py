"""The GRPO loss on logits, forward and backward, and log-probs alone: ours beside other libraries.

    python benchmarks/bench_grpo_loss.py [--tokens 8192 2048] [--vocab 151936] [--dtype bfloat16]

Old and reference log-probs are given; β = 0.04. 2,048 rows are what a chunk of the fused head has.
GB/s counts one read and one write of the logits, of log-probs one read, whatever a method really
moves; the limit is a copy of the logits, of log-probs a kernel that reads them, timed in turn with
the others. Peak memory excludes the inputs and includes the gradient. Launch settings are timed by
sweep.py. Prints Markdown tables; the last line is one JSON document.
"""

import json
import os
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from loss_batch import BETA, CLIP, Batch, eager_loss
from measure import (
    Case,
    copy_case,
    excused,
    finish,
    make_parser,
    megabytes,
    microseconds,
    peak,
    peak_in_subprocess,
    pick_device,
    print_table,
    read_case,
    release,
    time_alternating,
    warm_up,
)  # fmt: skip
from torch import Tensor

from mr1_fast.kernels.grpo import rows_cuda, rows_triton
from mr1_fast.loss import grpo_loss, grpo_loss_ref, token_logprobs

DEFAULT_TOKENS = {"cuda": 8192, "cpu": 256}
CHUNK_TOKENS = {"cuda": [2048], "cpu": []}
"""Rows that are measured, too: those of a chunk of the fused head."""
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
COPY, READ = "copy (the limit)", "read (the limit)"


# --- cases ----------------------------------------------------------------------------------------


def differentiated(logits: Tensor, loss, restore=None) -> Case:
    """A case of `loss` and its gradient; the logits are not a leaf, as behind a layer."""

    def call():
        leaf = logits.detach().requires_grad_()
        value = loss(leaf.view(leaf.shape))
        return value, list(torch.autograd.grad(value, leaf))

    return Case(call, restore or (lambda: None))


def ours(batch: Batch, inplace: bool) -> Case:
    logits = batch.logits.clone() if inplace else batch.logits
    arguments = batch.loss_arguments
    restore = partial(logits.copy_, batch.logits) if inplace else None

    def loss(x: Tensor) -> Tensor:
        return grpo_loss(x, batch.targets, **arguments, inplace=inplace).loss

    return differentiated(logits, loss, restore)


def native_cuda(batch: Batch) -> Case:
    """A case of our loss in place by csrc/'s CUDA kernel instead of Triton's."""
    library, status = rows_cuda.status()
    if library is None or not batch.logits.is_cuda:
        raise RuntimeError(f"csrc/'s CUDA kernel is {status}")
    case = ours(batch, inplace=True)
    native_on = mock.patch.dict(os.environ, MR1_FAST_CUDA="1")
    with native_on:
        if not rows_cuda.takes(batch.logits):
            raise RuntimeError(f"csrc/'s CUDA kernel does not take {tuple(batch.logits.shape)}")

    def call():
        with native_on:
            return case.call()

    return Case(call, case.restore)


def compiled(batch: Batch) -> Case:
    """A case of `grpo_loss_ref` under torch.compile."""
    reference, arguments = torch.compile(grpo_loss_ref, dynamic=False), batch.loss_arguments
    return differentiated(batch.logits, lambda x: reference(x, batch.targets, **arguments).loss)


def padded_logits(batch: Batch) -> Tensor:
    """The logits as (S, L+1, V), contiguous: Liger ignores the last position of each sequence."""
    rows = batch.per_sequence(batch.logits)
    padded = rows.new_empty(len(rows), rows.shape[1] + 1, rows.shape[2])
    padded[:, :-1], padded[:, -1] = rows, 0
    return padded


def liger(batch: Batch, inplace: bool) -> Case:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    _needs_gpu(batch)
    logits = padded_logits(batch)
    old, ref, ids = (batch.per_sequence(x) for x in (batch.old_logp, batch.ref_logp, batch.targets))
    settings = dict(eps_low=CLIP, eps_high=CLIP, loss_type="grpo", inplace=inplace, reduce=True)

    def loss(x: Tensor) -> Tensor:
        given = old, ref, ids, batch.advantages
        value, _ = triton_grpo_loss(x, *given, temperature=1.0, beta=BETA, **settings)
        return value

    def restore() -> None:
        logits[:, :-1].copy_(batch.per_sequence(batch.logits))

    return differentiated(logits, loss, restore if inplace else None)


def _needs_gpu(batch: Batch) -> None:
    if not batch.logits.is_cuda and not rows_triton.INTERPRETED:
        raise RuntimeError("its Triton kernels need a GPU")


def without_gradient(logprobs) -> Case:
    """A case of a function that returns log-probs."""
    return Case(lambda: (torch.no_grad()(logprobs)(), []))


def liger_logprobs(batch: Batch) -> Case:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    _needs_gpu(batch)
    logits, ids = padded_logits(batch), batch.per_sequence(batch.targets)
    return Case(lambda: (fused_selective_log_softmax(logits, ids, temperature=1.0).flatten(), []))


LOSS = {
    "ours": partial(ours, inplace=False),
    "ours, in place": partial(ours, inplace=True),
    "csrc/ on CUDA, in place": native_cuda,
    "eager (R1-V)": lambda batch: differentiated(batch.logits, lambda x: eager_loss(x, batch)),
    "eager (R1-V), logits to fp32": lambda batch: differentiated(
        batch.logits, lambda x: eager_loss(x.float(), batch)
    ),
    "torch.compile": compiled,
    "Liger triton_grpo_loss": partial(liger, inplace=False),
    "Liger triton_grpo_loss, in place": partial(liger, inplace=True),
}
LOGPROBS = {
    "ours, token_logprobs": lambda b: without_gradient(
        lambda: token_logprobs(b.logits, b.targets)[0]
    ),
    "log_softmax + gather": lambda b: without_gradient(
        lambda: torch.log_softmax(b.logits, -1).gather(1, b.targets[:, None]).squeeze(1)
    ),
    "Liger fused_selective_log_softmax": liger_logprobs,
}

# --- runs -----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Cases with one limit."""

    title: str
    builders: dict
    first: str
    """Our case, with which the others are compared."""
    passes: int
    """How often the logits' bytes move."""
    limit: str


PARTS = {
    "loss": Part("Loss and gradient", LOSS, "ours", 2, COPY),
    "logprobs": Part("Log-probs alone", LOGPROBS, "ours, token_logprobs", 1, READ),
}


def compare(part: Part, batch: Batch, arguments) -> dict:
    """Time and peak memory of every case of a part, and of its limit."""
    device, tokens = arguments.device, len(batch.targets)
    builders = {
        name: build
        for name, build in part.builders.items()
        if arguments.dtype != "float32" or "fp32" not in name
    }
    cases, off, skipped = warm_up(builders, batch, device, against=part.first)
    limit = copy_case(batch.logits) if part.limit == COPY else read_case(batch.logits)
    limit.call()
    times = time_alternating({**cases, part.limit: limit}, arguments.rounds, device, skipped)
    moved = part.passes * batch.logits.nbytes
    names = [name for name in cases if name in times]
    rows = []
    for name in names:
        memory = None
        with excused(name, skipped):
            if device == "cuda" or arguments.quick:
                memory = peak(cases[name], device)
            else:
                flags = [f"--{flag}={getattr(arguments, flag)}" for flag in ("vocab", "dtype")]
                flags += [f"--tokens={tokens}", f"--device={device}"]
                memory = peak_in_subprocess(__file__, name, flags)
        taken = times[name]
        rows.append(
            {
                "name": name,
                **taken,
                "bytes_per_second": moved / taken["median"],
                "of_limit": times[part.limit]["median"] / taken["median"],
                "ratio": taken["median"] / times[part.first]["median"],
                "peak": memory and memory["peak"],
                "from_ours": off[name],
            }
        )
    limit = {"name": part.limit, **times[part.limit]}
    limit["bytes_per_second"] = moved / limit["median"]
    return {"rows": rows, "limit": limit, "skipped": skipped}


def show(title: str, result: dict) -> None:
    """Print the table of `compare`."""
    columns = ["what", "ms", "GB/s", "of the limit", "host µs a call", "peak beside inputs, MiB"]
    columns += ["time / ours", "loss / gradient off by"]
    table = [
        [
            row["name"],
            f"{row['median'] * 1000:,.3f}",
            f"{row['bytes_per_second'] / 1e9:,.1f}",
            f"{row['of_limit']:.0%}",
            microseconds(row["host"]),
            megabytes(row["peak"]),
            f"{row['ratio']:.2f}",
            "{loss:.0e} / {gradient:.0e}".format(**row["from_ours"]),
        ]
        for row in result["rows"]
    ]
    limit = result["limit"]
    rate = f"{limit['name']}: {limit['bytes_per_second'] / 1e9:,.1f} GB/s"
    print_table(f"{title}; {rate}", columns, table)


def measure(tokens: int, arguments) -> dict:
    """Measure both parts with this many rows."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    batch = Batch.random(tokens, arguments.vocab, dtype, device)
    results = {name: compare(part, batch, arguments) for name, part in PARTS.items()}
    shape = f"{tokens:,} × {arguments.vocab:,} {arguments.dtype} on {device}"
    for name, part in PARTS.items():
        show(f"{part.title}, {shape}", results[name])
    return {"tokens": tokens, **results}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 8192 2048, on a CPU 256")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default bfloat16, on a CPU float32",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure memory on a CPU in this process, to try the script out",
    )
    parser.add_argument("--peak", help="print the peak memory of this case, and nothing else")
    arguments = parser.parse_args()
    device = arguments.device = pick_device(arguments.device)
    arguments.tokens = arguments.tokens or [DEFAULT_TOKENS[device], *CHUNK_TOKENS[device]]
    arguments.dtype = arguments.dtype or DEFAULT_DTYPE[device]
    if arguments.peak:
        dtype = getattr(torch, arguments.dtype)
        batch = Batch.random(arguments.tokens[0], arguments.vocab, dtype, device)
        case = {**LOSS, **LOGPROBS}[arguments.peak](batch)
        case.restore()
        case.call()
        print(json.dumps(peak(case, device)))
        return
    settings = {key: getattr(arguments, key) for key in ("tokens", "vocab", "dtype", "rounds")}
    results = []
    for tokens in arguments.tokens:
        results.append(measure(tokens, arguments))
        release()
    finish("grpo_loss", device, settings=settings, results=results)


if __name__ == "__main__":
    main()
