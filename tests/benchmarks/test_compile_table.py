"""Triton kernels compiled for GPUs that are not here: no spills, wide accesses, one compilation."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU the kernels themselves run", allow_module_level=True)

import compile_table
from triton.backends.compiler import GPUTarget

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo.logprobs_triton import LOGPROBS_VARIANTS
from mr1_fast.kernels.grpo.rows_triton import LOSS_VARIANTS
from mr1_fast.kernels.layers import gate_triton

RTX_3090, H100 = GPUTarget("cuda", 86, 32), GPUTarget("cuda", 90, 32)
MI300X = GPUTarget("hip", "gfx942", 64)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90, 120, "gfx942"])
def test_the_loss_compiles_without_spills_and_with_wide_accesses(arch):
    # `python benchmarks/compile_table.py` compiles for all targets and dtypes.
    (target,) = [each for each in compile_table.TARGETS if each.arch == arch]
    rows = compile_table.loss_table(
        ["fp32", "bf16"] if arch == 90 else ["bf16"], [151_936], [target]
    )
    assert {row["kernel"] for row in rows} == {"grpo", "logprobs", "logprobs_backward", "scale"}
    assert [row for row in rows if not row["fits"]] == []
    loss = [row for row in rows if row["kernel"] == "grpo"]
    assert arch == "gfx942" or all(row["registers"] <= 96 and row["instructions"] for row in loss)


def test_every_setting_that_a_sweep_may_choose_compiles_so():
    rows = compile_table.variants_table("bf16", 151_936, H100)
    assert len(rows) == len(LOSS_VARIANTS) + len(LOGPROBS_VARIANTS) - 2
    assert [row for row in rows if not row["fits"]] == []


def test_decode_kernels_compile_without_spills_and_with_wide_accesses():
    # One target and model only: python benchmarks/compile_table.py compiles for all.
    small = [compile_table.MODELS[i] for i in (0, 3)]
    rows = compile_table.decode_table(["bf16"], [RTX_3090], small)
    assert {row["kernel"] for row in rows} == {
        "attend",
        "attend of normed heads",
        "dequantise",
        "linears",
        "block_sums",
        "sample",
    }
    assert [row for row in rows if not row["fits"]] == []


@pytest.mark.parametrize("target", [RTX_3090, MI300X], ids=str)
def test_kernels_of_layers_compile_without_spills_and_with_wide_accesses(target):
    layers = [compile_table.LAYERS[i] for i in (0, 3, 4, 7)]
    rows = compile_table.layers_table(["bf16"], [target], layers)
    assert {row["kernel"] for row in rows} == {
        f"layer {name}"
        for name in (
            *("norm", "norm_backward", "norm_gradients", "rotary"),
            *("norm_rotary", "norm_rotary_backward"),
            *("silu_mul", "silu_mul_backward", "gelu", "gelu_backward"),
        )
    }
    assert [row for row in rows if not row["fits"]] == []
    # One column of a sum in 16 bits is all that a thread of norm_gradients writes.
    assert {row["kernel"] for row in rows if row["short"]} == {"layer norm_gradients"}


def test_an_mlp_of_3420_columns_has_no_16_bit_accesses():
    """The rows of Qwen2.5-VL's vision tower begin at multiples of 8 bytes."""
    gate_up = torch.empty(64, 2 * 3420, dtype=torch.bfloat16, device="meta")
    with compile_table.captured(H100) as compiled:
        gate_triton.silu_mul(gate_up, gate_up[0])
        gate_triton.silu_mul_backward(gate_up[:, :3420], gate_up, gate_up[0])
    figures = [compile_table.examine(kernel, H100) for _, kernel in compiled]
    assert [(each["short"], each["spills"]) for each in figures] == [(0, 0)] * 2


def test_new_lengths_of_a_layer_compile_nothing():
    (text, *_) = compile_table.LAYERS
    with compile_table.captured(H100) as compiled:
        for tokens in (6144, 1, 16, 77, 4095):
            compile_table.launch_layers(torch.bfloat16, [text], tokens=tokens)
    assert len(compiled) == 5 * 9
    assert len({id(kernel) for _, kernel in compiled}) == 9


def test_a_vocabulary_that_breaks_wide_accesses_is_told_apart():
    figures = []
    for v in (151_936, 151_937):
        with compile_table.captured(RTX_3090) as compiled:
            compile_table.launch_logprobs(torch.bfloat16, v, LOGPROBS_VARIANTS[0])
        figures.append(compile_table.examine(compiled[0][1], RTX_3090))
    even, odd = figures
    assert even["short"] <= compile_table.SHORT_ACCESSES < odd["short"]


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
