"""csrc/'s CPU kernels on each instruction set of this machine, beside a copy and PyTorch.

    python benchmarks/bench_native.py [--tokens 256] [--vocab 151936] [--rounds 20]

Measured are loss and gradient in place: the row operation alone on each instruction set, then the
public function with autograd on the best. Behind them come log-probabilities, which read the logits
alone: of all rows, and of every other one where the rest is masked. The copy reads and writes the
bytes of the logits with the same threads. Ratios are between the least times of alternating calls.
The last line is one JSON document.
"""

from functools import partial

import torch
from bench_grpo_loss import COPY, Batch, compiled, differentiated, eager_loss, ours
from measure import (
    Case,
    copy_case,
    finish,
    make_parser,
    print_table,
    time_alternating,
    warm_up,
)

from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_native
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.loss import token_logprobs

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "neon", "scalar")
TARGETS = {
    ("float32", "avx512"): 1.2,
    ("bfloat16", "avx512"): 1.5,
    ("float32", "avx2"): 2,
    ("bfloat16", "avx2"): 4.5,
}
"""Dtype and instruction set → the time of a copy that the kernel may take at most.

AVX-512 with bf16 instructions has the same targets.
"""


def row_operation(name: str, batch: Batch) -> Case:
    """A case of the native kernel alone on one instruction set, in place."""
    library, logits, arguments = native.status()[0], batch.logits.clone(), batch.loss_arguments
    objective = Objective(
        arguments["advantages"],
        arguments["token_weights"],
        beta=torch.tensor(arguments["beta"]),
        temperature=torch.tensor(1.0),
        old_logp=batch.old_logp,
        ref_logp=batch.ref_logp,
    )
    results = RowResults.empty(logits)

    def call():
        if library.mr1_use_instruction_set(name.encode()):
            raise RuntimeError("this machine or build does not have it")
        rows_native.row_grpo(logits, batch.targets, objective, results, logits)
        return results.loss.sum(), [logits]

    return Case(call, lambda: logits.copy_(batch.logits))


def public_function(name: str, batch: Batch) -> Case:
    """A case of `grpo_loss(…, inplace=True)` and its backward on one instruction set."""
    case = ours(batch, inplace=True)

    def restore():
        native.status()[0].mr1_use_instruction_set(name.encode())
        case.restore()

    return Case(case.call, restore)


def log_probs(name: str, weights: torch.Tensor | None, batch: Batch) -> Case:
    """A case of `token_logprobs` on one instruction set, without its gradient."""

    @torch.no_grad()
    def call():
        return token_logprobs(batch.logits, batch.targets, token_weights=weights)[0], []

    return Case(call, lambda: native.status()[0].mr1_use_instruction_set(name.encode()))


def measure(batch: Batch, rounds: int) -> dict:
    """Time every case."""
    builders = {name: partial(row_operation, name) for name in INSTRUCTION_SETS}
    best = native.status()[0].mr1_instruction_set().decode()
    builders[f"grpo_loss and backward, {best}"] = partial(public_function, best)
    every_other = torch.arange(len(batch.targets)) % 2
    builders[f"token_logprobs, {best}"] = partial(log_probs, best, None)
    builders["token_logprobs, every other row masked"] = partial(log_probs, best, every_other)
    builders["eager (R1-V)"] = lambda batch: differentiated(
        batch.logits, lambda x: eager_loss(x, batch)
    )
    builders["torch.compile"] = compiled
    cases, _, skipped = warm_up(builders, batch, "cpu")
    cases = {COPY: copy_case(batch.logits), **cases}
    return {"times": time_alternating(cases, rounds, "cpu", skipped), "skipped": skipped}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    library, status = native.status()
    if library is None:
        raise SystemExit(f"the native kernels are {status}")
    results = {}
    for dtype in ("float32", "bfloat16", "float16"):
        batch = Batch.random(arguments.tokens, arguments.vocab, getattr(torch, dtype), "cpu")
        results[dtype] = result = measure(batch, arguments.rounds)
        copy = result["times"][COPY]["least"]
        rows = []
        for name, times in result["times"].items():
            times["of_copy"] = times["least"] / copy
            target = TARGETS.get((dtype, name.removesuffix("bf16")))
            milliseconds = f"{times['least'] * 1e3:.2f}", f"{times['median'] * 1e3:.2f}"
            rows.append([name, *milliseconds, f"{times['of_copy']:.2f}", target and f"{target}"])
        title = (
            f"{arguments.tokens} × {arguments.vocab:,} {dtype}, {torch.get_num_threads()} threads"
        )
        print_table(title, ["what", "least ms", "median ms", "× a copy", "target"], rows)
    finish("native", "cpu", settings=vars(arguments), active=status, results=results)


if __name__ == "__main__":
    main()
