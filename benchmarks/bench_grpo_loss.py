"""The GRPO loss on logits, forward and backward, and log-probs alone: ours beside other libraries.

    python benchmarks/bench_grpo_loss.py [--tokens 8192] [--vocab 151936] [--dtype bfloat16]
    [--sweep]

Old and reference log-probs are given; β = 0.04. GB/s counts one read and one write of the logits,
whatever a method really moves; the limit is a copy of as many bytes, timed in turn with the others.
Peak memory excludes the inputs and includes the gradient. With --sweep, launch settings of our
kernel are timed instead. Prints Markdown tables; the last line is one JSON document.
"""

import contextlib
import itertools
import json
import os
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from measure import (
    Case,
    copy_case,
    excused,
    finish,
    make_parser,
    megabytes,
    peak,
    peak_in_subprocess,
    pick_device,
    print_table,
    time_alternating,
    warm_up,
)  # fmt: skip
from torch import Tensor

from mr1_fast.kernels.grpo import rows_cuda, rows_triton
from mr1_fast.loss import grpo_loss, grpo_loss_ref, token_logprobs

BETA, CLIP, SEQUENCES = 0.04, 0.2, 4
DEFAULT_TOKENS = {"cuda": 8192, "cpu": 256}
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
BLOCKS, WARPS, PROGRAMS = (2048, 4096, 8192), (4, 8, 16), (1, 2, 4, 6, 8, 12)
COPY = "copy (the limit)"


class Batch(NamedTuple):
    """Logits and the loss' other inputs, for S sequences of equal length: all averages agree."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    advantages: Tensor  # (S,)
    old_logp: Tensor  # (N,)
    ref_logp: Tensor  # (N,)

    @classmethod
    def random(cls, tokens: int, vocab: int, dtype: torch.dtype, device: str) -> "Batch":
        """A batch with normal logits of standard deviation 2."""
        torch.manual_seed(0)
        logits = torch.empty(tokens, vocab, dtype=dtype, device=device).normal_(std=2.0)
        targets = torch.randint(vocab, (tokens,), device=device)
        return cls.near(logits, targets, token_logprobs(logits, targets)[0])

    @classmethod
    def near(cls, logits: Tensor, targets: Tensor, logp: Tensor) -> "Batch":
        """A batch whose old and reference log-probs are near `logp`; some ratios are clipped."""
        if len(targets) % SEQUENCES:
            raise SystemExit(f"--tokens is {len(targets)}: expected a multiple of {SEQUENCES}")
        around = [logp + 0.15 * torch.randn_like(logp) for _ in range(2)]
        return cls(logits, targets, torch.linspace(-1, 2, SEQUENCES, device=logp.device), *around)

    def per_sequence(self, tensor: Tensor) -> Tensor:
        """The tensor (N, …) as (S, L, …)."""
        return tensor.view(SEQUENCES, -1, *tensor.shape[1:])

    @property
    def loss_arguments(self) -> dict:
        """The arguments of `grpo_loss` after logits and targets."""
        n = len(self.targets)
        return dict(
            advantages=self.advantages.repeat_interleave(n // SEQUENCES, output_size=n),
            token_weights=torch.full_like(self.old_logp, 1 / n),
            beta=BETA,
            old_logp=self.old_logp,
            ref_logp=self.ref_logp,
        )


def eager_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The loss as R1-V's grpo_trainer.py computes it, with PPO's clip for the old log-probs.

    Its `_get_per_token_logps` loops over sequences and takes log_softmax in the dtype of the
    logits. Behind it come k3 and the masked mean of each sequence.
    """
    rows = []
    for sequence, ids in zip(
        batch.per_sequence(logits), batch.per_sequence(batch.targets), strict=True
    ):
        rows.append(torch.gather(sequence.log_softmax(dim=-1), 1, ids.unsqueeze(1)).squeeze(1))
    logp = torch.stack(rows)
    old, ref = batch.per_sequence(batch.old_logp), batch.per_sequence(batch.ref_logp)
    ratio, advantages = torch.exp(logp - old), batch.advantages.unsqueeze(1)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    policy = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    mask = torch.ones_like(old)
    return ((-(policy - BETA * kl) * mask).sum(1) / mask.sum(1)).mean()


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


def compare(builders: dict, first: str, passes: int, batch: Batch, arguments, device: str) -> dict:
    """Time and peak memory of every case; bytes are `passes` times those of the logits.

    `first` names our case, with which the others are compared.
    """
    cases, off, skipped = warm_up(builders, batch, device, against=first)
    cases_and_copy = {**cases, COPY: copy_case(batch.logits)}
    times = time_alternating(cases_and_copy, arguments.rounds, device, skipped)
    size = batch.logits.nbytes
    copied = 2 * size / times[COPY]["least"]
    flags = ("tokens", "vocab", "dtype", "device")
    options = [f"--{flag}={getattr(arguments, flag)}" for flag in flags]
    rows = []
    for name in [name for name in cases if name in times]:
        memory = None
        with excused(name, skipped):
            if device == "cuda":
                memory = peak(cases[name], device)
            else:
                memory = peak_in_subprocess(__file__, name, options)
        taken = times[name]
        rate = passes * size / taken["median"]
        rows.append(
            {
                "name": name,
                **taken,
                "bytes_per_second": rate,
                "of_copy": rate / copied,
                "ratio": taken["median"] / times[first]["median"],
                "peak": memory and memory["peak"],
                "from_ours": off[name],
            }
        )
    return {"rows": rows, "copy_bytes_per_second": copied, "skipped": skipped}


def show(title: str, result: dict) -> None:
    """Print the table of `compare`."""
    columns = [
        "what",
        "ms",
        "GB/s",
        "of a copy",
        "peak beside inputs, MiB",
        "time / ours",
        "loss / gradient off by",
    ]
    table = [
        [
            row["name"],
            f"{row['median'] * 1000:,.2f}",
            f"{row['bytes_per_second'] / 1e9:,.1f}",
            f"{row['of_copy']:.0%}",
            megabytes(row["peak"]),
            f"{row['ratio']:.2f}",
            "{loss:.0e} / {gradient:.0e}".format(**row["from_ours"]),
        ]
        for row in result["rows"]
    ]
    rate = result["copy_bytes_per_second"] / 1e9
    print_table(f"{title}; a copy: {rate:,.1f} GB/s", columns, table)


@contextlib.contextmanager
def launched_with(block: int, warps: int, programs: int):
    """Launch our Triton kernels with these settings inside."""
    settings = {"BLOCK": block, "NUM_WARPS": warps, "PROGRAMS_PER_SM": programs}
    with mock.patch.multiple(rows_triton, **settings):
        yield


def sweep(batch: Batch, rounds: int) -> dict:
    """Time the in-place loss with every launch setting, once for settings that split rows alike."""
    from triton.runtime.errors import OutOfResources

    case, v = ours(batch, inplace=True), batch.logits.shape[1]
    copied = time_alternating({COPY: copy_case(batch.logits)}, rounds, "cuda", {})[COPY]["least"]
    rows = {}
    for block, warps, programs in itertools.product(BLOCKS, WARPS, PROGRAMS):
        with launched_with(block, warps, programs):
            columns = rows_triton.split_columns(batch.logits)
            if (block, warps, columns) in rows:
                rows[block, warps, columns]["programs_per_sm"].append(programs)
                continue
            try:
                time_alternating({"ours": case}, 2, "cuda", {})
                taken = time_alternating({"ours": case}, rounds, "cuda", {})["ours"]
            except OutOfResources as error:
                print(f"skipped: block {block}, {warps} warps, {columns} columns: {error}")
                continue
        row = {"block": block, "warps": warps, "parts": -(-v // columns)}
        row |= {"programs_per_sm": [programs], **taken, "of_copy": copied / taken["median"]}
        rows[block, warps, columns] = row
    ordered = sorted(rows.values(), key=lambda row: row["median"])
    table = [
        [
            row["block"],
            row["warps"],
            " ".join(map(str, row["programs_per_sm"])),
            row["parts"],
            f"{row['median'] * 1000:.3f}",
            f"{row['of_copy']:.0%}",
        ]
        for row in ordered
    ]
    columns = ["BLOCK", "NUM_WARPS", "PROGRAMS_PER_SM", "programs per row", "ms", "of a copy"]
    print_table("Launch settings of the loss in place, best first", columns, table)
    return {"rows": ordered, "copy_seconds": copied}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, help="default 8192, on a CPU 256")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default bfloat16, on a CPU float32",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sweep", action="store_true", help="time launch settings; needs a GPU")
    parser.add_argument("--peak", help="print the peak memory of this case, and nothing else")
    arguments = parser.parse_args()
    device = arguments.device = pick_device(arguments.device)
    arguments.tokens = arguments.tokens or DEFAULT_TOKENS[device]
    arguments.dtype = arguments.dtype or DEFAULT_DTYPE[device]
    batch = Batch.random(arguments.tokens, arguments.vocab, getattr(torch, arguments.dtype), device)
    if arguments.peak:
        case = {**LOSS, **LOGPROBS}[arguments.peak](batch)
        case.restore()
        case.call()
        print(json.dumps(peak(case, device)))
        return
    shape = f"{arguments.tokens:,} × {arguments.vocab:,} {arguments.dtype} on {device}"
    settings = {key: getattr(arguments, key) for key in ("tokens", "vocab", "dtype", "rounds")}
    if arguments.sweep:
        if device != "cuda":
            raise SystemExit("--sweep needs a CUDA device")
        finish("grpo_loss_sweep", device, settings=settings, **sweep(batch, arguments.rounds))
        return
    loss_cases = {
        name: build
        for name, build in LOSS.items()
        if arguments.dtype != "float32" or "fp32" not in name
    }
    loss = compare(loss_cases, "ours", 2, batch, arguments, device)
    logprobs = compare(LOGPROBS, "ours, token_logprobs", 1, batch, arguments, device)
    show(f"Loss and gradient, {shape}", loss)
    show(f"Log-probs alone (one read counted), {shape}", logprobs)
    finish("grpo_loss", device, settings=settings, loss=loss, logprobs=logprobs)


if __name__ == "__main__":
    main()
