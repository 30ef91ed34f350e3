"""LM head and GRPO loss, forward and backward: ours beside other libraries and three bare GEMMs.

    python benchmarks/bench_linear_grpo_loss.py [--tokens 8192] [--hidden 4096 1536]
    [--vocab 151936] [--stages] [--rows 1024 2816]

With --stages, one chunk is timed by stage; with --rows, the whole loss at these rows per chunk: see
head_parts.py. Without them, libraries are compared.

Every case but the bare GEMMs yields the loss and the gradients of the hidden states and of the head
(unless it is frozen). Peak memory excludes inputs and gradients: it is the most that a call holds
beyond what was in use before it, minus the gradients that it returns. On a CPU a fresh process
measures it for each case, at --peak-tokens. "Off by" is the relative difference from ours, so that
a wrong baseline shows. Prints Markdown tables; the last line is one JSON document.
"""

import json
from functools import partial

import head_parts
import torch
from bench_grpo_loss import BETA, CLIP, DEFAULT_DTYPE, DEFAULT_TOKENS, Batch, eager_loss
from device_time import sm_clock
from measure import (
    Case,
    differentiated,
    excused,
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
)  # fmt: skip
from torch import Tensor

from mr1_fast.loss import linear_grpo_loss, linear_token_logprobs, policy_loss_ref

DEFAULT_HIDDEN = {"cuda": [4096, 1536], "cpu": [1536]}
DEFAULT_ROUNDS = {"cuda": 10, "cpu": 2}
GEMMS = "three bare GEMMs"
WARM_UP_TOKENS = 16


class LinearBatch:
    """Hidden states (N, D), an LM head (V, D), and the other inputs: a `Batch` without logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, batch: Batch):
        self.hidden, self.weight, self.batch = hidden, weight, batch

    @classmethod
    def random(
        cls, tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str
    ) -> "LinearBatch":
        """A batch whose logits have standard deviation 2."""
        torch.manual_seed(0)
        hidden = torch.empty(tokens, width, dtype=dtype, device=device).normal_()
        weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(std=2 / width**0.5)
        targets = torch.randint(vocab, (tokens,), device=device)
        logp = linear_token_logprobs(hidden, weight, targets)[0]
        return cls(hidden, weight, Batch.near(hidden.new_empty(0), targets, logp))

    def first(self, tokens: int) -> "LinearBatch":
        """A batch of the first tokens, with the same head."""
        batch = self.batch
        few = batch._replace(
            targets=batch.targets[:tokens],
            old_logp=batch.old_logp[:tokens],
            ref_logp=batch.ref_logp[:tokens],
        )
        return LinearBatch(self.hidden[:tokens], self.weight, few)

    def differentiated(self, loss, frozen: bool = False) -> Case:
        """A case of `loss(hidden, weight)` and its gradients."""
        return differentiated(loss, self.hidden, self.weight, frozen)

    def differentiated_by_logprobs(self, logprobs) -> Case:
        """A case with log-probs from `logprobs(hidden, weight)` and the loss in plain PyTorch."""
        arguments = self.batch.loss_arguments

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            per_token, *_ = policy_loss_ref(logprobs(hidden, weight), **arguments)
            return per_token.sum()

        return self.differentiated(loss)


# --- cases ----------------------------------------------------------------------------------------


def ours(batch: LinearBatch, frozen: bool) -> Case:
    targets, arguments = batch.batch.targets, batch.batch.loss_arguments

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden, weight, targets, **arguments).loss

    return batch.differentiated(loss, frozen)


def eager(batch: LinearBatch, frozen: bool = False) -> Case:
    """A case of R1-V's code: the head, then its loss on all logits."""
    return batch.differentiated(lambda h, w: eager_loss(h @ w.T, batch.batch), frozen)


def compiled(batch: LinearBatch) -> Case:
    """A case of R1-V's code under torch.compile."""
    loss = torch.compile(lambda h, w: eager_loss(h @ w.T, batch.batch), dynamic=False)
    return batch.differentiated(loss)


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
    """A case of TRL's function, with the entropy that its GRPOTrainer asks for."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    targets, outputs = batch.batch.targets, ("entropy",)

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        given = hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs
        logp, *_ = ChunkedLogProbFunction.apply(*given)
        return logp

    return batch.differentiated_by_logprobs(logprobs)


def cut_cross_entropy(batch: LinearBatch) -> Case:
    """A case of cut-cross-entropy, whose loss is −logp, with its default gradient filter."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if batch.hidden.is_cuda else "torch_compile"
    loss = partial(linear_cross_entropy, reduction="none", impl=implementation)
    return batch.differentiated_by_logprobs(
        lambda hidden, weight: -loss(hidden, weight, batch.batch.targets).float()
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
"""Cases that are warmed up at full size before memory is measured; the others on a few tokens."""

# --- runs -----------------------------------------------------------------------------------------


def compare(width: int, arguments) -> dict:
    """Time and peak memory of every case at one hidden size."""
    device, tokens = arguments.device, arguments.tokens
    dtype = getattr(torch, arguments.dtype)
    batch = LinearBatch.random(tokens, width, arguments.vocab, dtype, device)
    cases, off, skipped = warm_up(CASES, batch, device, against="ours")
    floor = gemm_case(batch.hidden, batch.weight)
    floor.call()
    times = time_alternating({**cases, GEMMS: floor}, arguments.rounds, device, skipped)
    clock = sm_clock(floor.call, times[GEMMS]["median"], device)
    del floor
    names = [name for name in cases if name in times]
    if device == "cuda" or arguments.quick:
        measured = lambda name: peak(cases[name], device)  # noqa: E731
    else:
        del cases, batch  # leaves the memory to the processes that measure
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
        row |= {"ratio": row["median"] / own, "from_ours": off[name]}
        rows.append({**row, "peak": m and m["peak"], "beside": m and m["peak"] - m["gradients"]})
    rate = 6 * tokens * width * arguments.vocab / floor_seconds
    gemms = {**times[GEMMS], "flop_per_second": rate, "sm_mhz": clock}
    return {"width": width, "rows": rows, "gemms": gemms, "skipped": skipped}


def show(result: dict, arguments) -> None:
    """Print the table of `compare`."""
    gemms = result["gemms"]
    columns = ["what", "ms", "× bare GEMMs", "time / ours", "peak, MiB", "beside gradients, MiB"]
    columns.append("loss / gradient off by")
    table = [
        [
            row["name"],
            f"{row['median'] * 1000:,.1f}",
            f"{row['of_gemms']:.2f}",
            f"{row['ratio']:.2f}",
            megabytes(row["peak"]),
            megabytes(row["beside"]),
            "{loss:.0e} / {gradient:.0e}".format(**row["from_ours"]),
        ]
        for row in result["rows"]
    ]
    ratio = gemms["median"] / result["rows"][0]["median"]
    figures = f"{gemms['median'] * 1000:,.1f}", "1.00", f"{ratio:.2f}"
    table.append([GEMMS, *figures, None, None, None])
    title = (
        f"N = {arguments.tokens:,} (memory: {arguments.peak_tokens:,}), D = {result['width']:,}, "
        f"V = {arguments.vocab:,}, {arguments.dtype} on {arguments.device}; "
        f"bare GEMMs: {gemms['flop_per_second'] / 1e12:,.3f} TFLOP/s"
    )
    print_table(title, columns, table)


def print_peak(name: str, arguments) -> None:
    """Print what `--peak` asks for, as one line of JSON."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    sizes = arguments.peak_tokens, arguments.hidden[0], arguments.vocab
    batch = LinearBatch.random(*sizes, dtype, device)
    case = CASES[name](batch)
    warm_up_case = case if name in COMPILED else CASES[name](batch.first(WARM_UP_TOKENS))
    warm_up_case.call()
    print(json.dumps(peak(case, device)))


def time_parts(arguments) -> list[dict]:
    """Time what --stages or --rows ask for, at each hidden size."""
    time = head_parts.by_stage if arguments.stages else head_parts.by_rows
    dtype, results = getattr(torch, arguments.dtype), []
    for width in arguments.hidden:
        b = LinearBatch.random(arguments.tokens, width, arguments.vocab, dtype, arguments.device)
        inputs = b.hidden, b.weight, b.batch.targets, b.batch.loss_arguments
        results.append(time(*inputs, arguments))
    return results


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, help="default 8192, on a CPU 256")
    parser.add_argument(
        "--peak-tokens", type=int, help="tokens for peak memory on a CPU; default 1024"
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
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure memory on a CPU in this process, to try the script out",
    )
    parser.add_argument("--peak", help="print the peak memory of this case, and nothing else")
    parser.add_argument("--stages", action="store_true", help="time one chunk by stage")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="rows per chunk of --stages, or of the whole loss"
    )
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
    keys = ("tokens", "peak_tokens", "vocab", "dtype", "rounds")
    settings = {key: getattr(arguments, key) for key in keys}
    if arguments.stages or arguments.rows:
        name = "linear_stages" if arguments.stages else "linear_rows"
        finish(name, device, settings=settings, results=time_parts(arguments))
        return
    results = [compare(width, arguments) for width in arguments.hidden]
    for result in results:
        show(result, arguments)
    finish("linear_grpo_loss", device, settings=settings, results=results)


if __name__ == "__main__":
    main()
