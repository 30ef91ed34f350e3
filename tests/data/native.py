"""Instruction sets, direct calls and guards around outputs, for tests of the native kernels."""

import platform
from contextlib import contextmanager

import pytest
import torch

from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_native
from mr1_fast.kernels.grpo.objective import Objective, RowResults

INSTRUCTION_SETS = {
    "x86_64": ["avx512bf16", "avx512", "avx2", "scalar"],
    "aarch64": ["neon", "scalar"],
}.get(platform.machine(), ["scalar"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = ("old_logp", "ref_logp", "is_weights")
GUARD = 64
SENTINEL = 0xA5


@contextmanager
def using(instruction_set: str):
    """Run the library on this instruction set; skip where the machine or the build refuses it."""
    library = native.status()[0]
    if library is None:
        pytest.skip(f"the native CPU kernels are {native.status()[1]}")
    former = library.mr1_instruction_set()
    if library.mr1_use_instruction_set(instruction_set.encode()):
        pytest.skip(f"this machine or build cannot run {instruction_set}")
    assert library.mr1_instruction_set().decode() == instruction_set
    yield
    assert library.mr1_use_instruction_set(former) == 0


@contextmanager
def threads(count: int):
    """Set torch's number of threads for a while."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(former)


def objective(data, *optional, beta=0.1, temperature=1.0, **settings) -> Objective:
    """Build the Objective of `loss_rows`' data.

    Of old_logp, ref_logp and is_weights it has those that `optional` names.
    """
    bounds = dict(clip_high=0.28, delta=1.6, tau_negative=1.1)
    return Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(beta),
        temperature=torch.tensor(temperature),
        **{name: data[name] for name in optional},
        **bounds | settings,
    )


def run_rows(data, out=None, optional=EVERYTHING, **settings) -> RowResults:
    """Call rows_native.row_grpo on fresh results."""
    results = RowResults.empty(data["logits"])
    rows_native.row_grpo(
        data["logits"], data["targets"], objective(data, *optional, **settings), results, out
    )
    return results


def gradient_rows(data, **settings) -> tuple[RowResults, torch.Tensor]:
    """Return the results, and the gradient out of place."""
    out = torch.empty(data["logits"].shape, dtype=data["logits"].dtype)
    return run_rows(data, out, **settings), out


class Guards:
    """Put every tensor that new_empty makes between sentinel bytes, which fill it at first too."""

    def __init__(self, monkeypatch):
        self.buffers = []
        make = torch.Tensor.new_empty

        def guarded(tensor, *shape, **options):
            inner = make(tensor, *shape, **options)
            size = inner.numel() * inner.element_size()
            self.buffers.append(torch.full((size + 2 * GUARD,), SENTINEL, dtype=torch.uint8))
            return self.buffers[-1][GUARD : GUARD + size].view(inner.dtype).view(inner.shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", guarded)

    def assert_untouched(self):
        assert self.buffers
        for buffer in self.buffers:
            assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all()
