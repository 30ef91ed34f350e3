"""Triton kernels compiled for GPUs that are not here: no spills, wide accesses, one compilation."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU the kernels themselves run", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from mr1_fast import grpo_loss, token_logprobs

path = Path(__file__).parents[2] / "benchmarks" / "compile_table.py"
spec = importlib.util.spec_from_file_location("compile_table", path)
compile_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compile_table)

RTX_3090, H100 = GPUTarget("cuda", 86, 32), GPUTarget("cuda", 90, 32)


@pytest.mark.slow
@pytest.mark.parametrize("target", compile_table.TARGETS, ids=lambda target: str(target.arch))
def test_every_kernel_compiles_without_spills_and_with_wide_accesses(target):
    # 80 and 89 differ least from their neighbours.
    dtypes = ["bf16"] if target.arch in (80, 89) else ["fp32", "bf16"]
    rows = compile_table.loss_table(dtypes, [151_936], [target])
    assert {row["kernel"] for row in rows} == {"grpo", "logprobs", "logprobs_backward", "scale"}
    assert [row for row in rows if not row["fits"]] == []


def test_decode_kernels_compile_without_spills_and_with_wide_accesses():
    # One target and model only: python benchmarks/compile_table.py compiles for all.
    small = compile_table.MODELS[:1]
    rows = compile_table.decode_table(["bf16"], [RTX_3090], small)
    assert {row["kernel"] for row in rows} == {
        "attend",
        "linears",
        "add_rms_norm",
        "silu_mul",
        "block_sums",
        "sample",
    }
    assert [row for row in rows if not row["fits"]] == []


def test_a_vocabulary_that_breaks_wide_accesses_is_told_apart():
    rows = compile_table.loss_table(["bf16"], [151_937], [RTX_3090])
    (row,) = [row for row in rows if row["kernel"] == "logprobs"]
    assert not row["fits"] and row["short"] > 2


def test_a_new_beta_temperature_or_length_compiles_nothing(monkeypatch):
    monkeypatch.setattr("mr1_fast.kernels.grpo.rows.use_triton", lambda logits: True)
    memory = torch.zeros(64, 4096)
    targets, rows = torch.zeros(64, dtype=torch.int64), torch.zeros(64)

    def launch(n: int, beta: float, temperature: float, first: int = 0) -> None:
        part = slice(first, first + n)
        logits = memory[part].detach().requires_grad_()
        settings = dict(
            beta=beta, temperature=temperature, clip_high=0.2 + beta, ref_logp=rows[part]
        )
        grpo_loss(logits, targets[part], rows[part], rows[part], **settings)
        logp, entropy = token_logprobs(logits, targets[part], temperature)
        (logp + entropy).sum().backward()

    with compile_table.captured(H100) as compiled:
        launch(64, 0.1, 1.0)
        first = {id(kernel) for _, kernel in compiled}
        for step in range(100):
            launch(1 + step % 50, step / 1000, 0.5 + step / 100, first=step % 7)
    assert len(first) == 3 and len(compiled) == 303
    assert {id(kernel) for _, kernel in compiled} == first
