"""LM head and GRPO loss, forward and backward: ours beside what others do and beside the three bare GEMMs.

    python benchmarks/bench_linear_grpo_loss.py [--tokens 8192] [--hidden 4096 1536] [--vocab 151936] [--dtype bfloat16]

Everything but the bare GEMMs yields the loss and the gradients of the hidden states and of the head (unless frozen).
Peak memory is beside inputs and gradients: the most a call holds beyond what was there before it, less the gradients
that it returns. A CPU takes it in a fresh process for each case, at --peak-tokens. "Off by" is the relative difference
from ours, so that a wrong baseline shows. Prints Markdown tables; the last line is one JSON document.
"""

import argparse
import json
from functools import partial

import torch
from bench_grpo_loss import BETA, CLIP, DEFAULT_DTYPE, Batch, eager_loss
from measure import (
    Case,
    differentiated,
    excused,
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
)  # fmt: skip
from torch import Tensor

from mr1_fast.loss import linear_grpo_loss, linear_token_logprobs, policy_loss_ref

DEFAULT_TOKENS = {"cuda": 8192, "cpu": 256}
DEFAULT_HIDDEN = {"cuda": [4096, 1536], "cpu": [1536]}
DEFAULT_ROUNDS = {"cuda": 10, "cpu": 2}
GEMMS = "three bare GEMMs"
WARM_UP_TOKENS = 16


class LinearBatch:
    """Hidden states and a head; what the loss needs beside is a `Batch` without logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, batch: Batch):
        self.hidden, self.weight, self.batch = hidden, weight, batch

    @classmethod
    def random(
        cls, tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str
    ) -> "LinearBatch":
        """Logits of standard deviation 2."""
        torch.manual_seed(0)
        hidden = torch.empty(tokens, width, dtype=dtype, device=device).normal_()
        weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(std=2 / width**0.5)
        targets = torch.randint(vocab, (tokens,), device=device)
        logp = linear_token_logprobs(hidden, weight, targets)[0]
        return cls(hidden, weight, Batch.near(hidden.new_empty(0), targets, logp))

    def first(self, tokens: int) -> "LinearBatch":
        """The same head and a few tokens."""
        b = self.batch
        few = Batch(
            b.logits, b.targets[:tokens], b.advantages, b.old_logp[:tokens], b.ref_logp[:tokens]
        )
        return LinearBatch(self.hidden[:tokens], self.weight, few)

    def differentiated(self, loss, frozen: bool = False) -> Case:
        """`loss(hidden, weight)` and its gradients."""
        return differentiated(loss, self.hidden, self.weight, frozen)

    def differentiated_by_logprobs(self, logprobs) -> Case:
        """The same with log-probs from `logprobs(hidden, weight)` and the loss in plain PyTorch."""
        objective = self.batch.objective
        return self.differentiated(
            lambda hidden, weight: policy_loss_ref(logprobs(hidden, weight), **objective)[0].sum()
        )


# --- cases --------------------------------------------------------------------------------------------------------


def ours(batch: LinearBatch, frozen: bool) -> Case:
    targets, objective = batch.batch.targets, batch.batch.objective
    return batch.differentiated(
        lambda h, w: linear_grpo_loss(h, w, targets, **objective).loss, frozen
    )


def eager(batch: LinearBatch, frozen: bool = False) -> Case:
    """R1-V: the head, then its loss on all the logits."""
    return batch.differentiated(lambda h, w: eager_loss(h @ w.T, batch.batch), frozen)


def compiled(batch: LinearBatch) -> Case:
    return batch.differentiated(
        torch.compile(lambda h, w: eager_loss(h @ w.T, batch.batch), dynamic=False)
    )


def liger(batch: LinearBatch) -> Case:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    b = batch.batch
    loss = LigerFusedLinearGRPOLoss(
        beta=BETA,
        compiled=batch.hidden.is_cuda,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="grpo",
        temperature=1.0,
    )
    ids, old, ref = (b.per_sequence(x) for x in (b.targets, b.old_logp, b.ref_logp))
    mask = torch.ones_like(old)

    def call(hidden, weight):
        inputs = (b.per_sequence(hidden), weight, ids, mask, b.advantages)
        return loss(*inputs, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return batch.differentiated(call)


def trl(batch: LinearBatch) -> Case:
    """With entropy, as its GRPOTrainer asks for."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    targets, outputs = batch.batch.targets, ("entropy",)
    return batch.differentiated_by_logprobs(
        lambda h, w: ChunkedLogProbFunction.apply(
            h, w, None, targets, 1.0, CHUNK, None, 1.0, outputs
        )[0]
    )


def cut_cross_entropy(batch: LinearBatch) -> Case:
    """nll = −logp; a temperature would scale the hidden states. Its gradient filter is on, as by default."""
    from cut_cross_entropy import linear_cross_entropy

    settings = dict(reduction="none", impl="cce" if batch.hidden.is_cuda else "torch_compile")
    return batch.differentiated_by_logprobs(
        lambda h, w: -linear_cross_entropy(h, w, batch.batch.targets, **settings).float()
    )


CASES = {
    "ours": partial(ours, frozen=False),
    "ours, frozen head": partial(ours, frozen=True),
    "eager (R1-V)": eager,
    "eager (R1-V), frozen head": partial(eager, frozen=True),
    "torch.compile": compiled,
    "Liger LigerFusedLinearGRPOLoss": liger,
    "TRL ChunkedLogProbFunction": trl,
    "cut-cross-entropy": cut_cross_entropy,
}
COMPILED = ("torch.compile", "cut-cross-entropy")
"""Warmed up at full size before memory is measured; the others on a few tokens."""

# --- runs ---------------------------------------------------------------------------------------------------------


def compare(width: int, arguments) -> dict:
    """Time and peak memory of every case at one width."""
    device, tokens = arguments.device, arguments.tokens
    batch = LinearBatch.random(
        tokens, width, arguments.vocab, getattr(torch, arguments.dtype), device
    )
    cases, far, skipped = warm_up(CASES, batch, device, against="ours")
    floor = gemm_case(batch.hidden, batch.weight)
    floor.call()
    times = time_alternating({**cases, GEMMS: floor}, arguments.rounds, device, skipped)
    del floor
    names = [name for name in cases if name in times]
    if device == "cuda":
        measured = lambda name: peak(cases[name], device)  # noqa: E731
    else:
        del cases, batch  # room for the processes that measure
        release()
        common = (f"--{key}={getattr(arguments, key)}" for key in ("vocab", "dtype", "device"))
        options = [f"--peak-tokens={arguments.peak_tokens}", f"--hidden={width}", *common]
        measured = partial(peak_in_subprocess, __file__, arguments=options)
    memory = dict.fromkeys(names)
    for name in names:
        with excused(name, skipped):
            memory[name] = measured(name)
    floor_seconds, own = times[GEMMS]["median"], times["ours"]["median"]
    rows = []
    for name, m in memory.items():
        row = {"name": name, **times[name], "of_gemms": times[name]["median"] / floor_seconds}
        row |= {"ratio": row["median"] / own, "from_ours": far[name]}
        rows.append({**row, "peak": m and m["peak"], "beside": m and m["peak"] - m["gradients"]})
    rate = 6 * tokens * width * arguments.vocab / floor_seconds
    return {
        "width": width,
        "rows": rows,
        "gemms": {**times[GEMMS], "flop_per_second": rate},
        "skipped": skipped,
    }


def show(result: dict, arguments) -> None:
    gemms = result["gemms"]
    columns = ["what", "ms", "× bare GEMMs", "time / ours", "peak, MiB", "beside gradients, MiB"]
    columns, off = [*columns, "loss / gradient off by"], "{loss:.0e} / {gradient:.0e}"
    table = [
        [r["name"], f"{r['median'] * 1000:,.1f}", f"{r['of_gemms']:.2f}", f"{r['ratio']:.2f}", megabytes(r["peak"]),
         megabytes(r["beside"]), off.format(**r["from_ours"])]
        for r in result["rows"]
    ]  # fmt: skip
    own = result["rows"][0]["median"]
    table.append(
        [
            GEMMS,
            f"{gemms['median'] * 1000:,.1f}",
            "1.00",
            f"{gemms['median'] / own:.2f}",
            None,
            None,
            None,
        ]
    )
    title = (
        f"N = {arguments.tokens:,} (memory: {arguments.peak_tokens:,}), D = {result['width']:,}, V = "
        f"{arguments.vocab:,}, {arguments.dtype} on {arguments.device}; "
        f"bare GEMMs: {gemms['flop_per_second'] / 1e12:,.3f} TFLOP/s"
    )
    print_table(title, columns, table)


def print_peak(name: str, arguments) -> None:
    """What `--peak` prints: one JSON line."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    batch = LinearBatch.random(
        arguments.peak_tokens, arguments.hidden[0], arguments.vocab, dtype, device
    )
    case = CASES[name](batch)
    (case if name in COMPILED else CASES[name](batch.first(WARM_UP_TOKENS))).call()
    print(json.dumps(peak(case, device)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, help="default 8192, on a CPU 256")
    parser.add_argument(
        "--peak-tokens", type=int, help="tokens where a CPU measures memory, default 1024"
    )
    parser.add_argument("--hidden", type=int, nargs="+", help="default 4096 1536, on a CPU 1536")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default bfloat16, on a CPU float32",
    )
    parser.add_argument("--rounds", type=int, help="default 10, on a CPU 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", help="print the peak memory of this case and end")
    arguments = parser.parse_args()
    device = arguments.device = pick_device(arguments.device)
    arguments.tokens = arguments.tokens or DEFAULT_TOKENS[device]
    arguments.peak_tokens = (arguments.peak_tokens or 1024) if device == "cpu" else arguments.tokens
    arguments.hidden = arguments.hidden or DEFAULT_HIDDEN[device]
    arguments.dtype = arguments.dtype or DEFAULT_DTYPE[device]
    arguments.rounds = arguments.rounds or DEFAULT_ROUNDS[device]
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    results = [compare(width, arguments) for width in arguments.hidden]
    for result in results:
        show(result, arguments)
    settings = {
        key: getattr(arguments, key)
        for key in ("tokens", "peak_tokens", "vocab", "dtype", "rounds")
    }
    finish("linear_grpo_loss", device, settings=settings, results=results)


if __name__ == "__main__":
    main()
