"""The self-test at start passes where the kernels work, and refuses a device where one does not."""

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.kernels import self_test
from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.decode import attention_triton, linear_triton
from mr1_fast.kernels.grpo import logprobs_triton, rows_triton
from mr1_fast.kernels.layers import gate_triton, norm_rotary_triton, norm_triton, rotary_triton

KERNELS = [
    (rows_triton, "_grpo_kernel"),
    (logprobs_triton, "_logprobs_kernel"),
    (logprobs_triton, "_logprobs_backward_kernel"),
    (step_triton, "_adamw_kernel"),
    (step_triton, "_add_stochastic_kernel"),
    (norm_triton, "_norm_kernel"),
    (norm_triton, "_norm_backward_kernel"),
    (norm_triton, "_norm_gradients_kernel"),
    (rotary_triton, "_rotary_kernel"),
    (norm_rotary_triton, "_norm_rotary_kernel"),
    (norm_rotary_triton, "_norm_rotary_backward_kernel"),
    (gate_triton, "_silu_mul_kernel"),
    (gate_triton, "_silu_mul_backward_kernel"),
    (gate_triton, "_gelu_kernel"),
    (gate_triton, "_gelu_backward_kernel"),
    (attention_triton, "_attend_kernel"),
    (linear_triton, "_linears_kernel"),
]
LAYERS = norm_triton, rotary_triton, norm_rotary_triton, gate_triton


def test_passes(device):
    self_test.self_test(torch.device(device), four_bits=True)


@pytest.mark.parametrize(("module", "silent"), KERNELS)
def test_a_kernel_that_writes_nothing_is_refused(device, monkeypatch, module, silent):
    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    make = torch.Tensor.new_empty

    def full_of_nan(*args, **options):
        made = make(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    if module in LAYERS:  # the rest takes seconds under the interpreter
        for part in ("_loss_pairs", "_optimizer_pairs", "_decode_pairs", "_decode_linear_pairs"):
            monkeypatch.setattr(self_test, part, lambda *_: {})
        nothing = torch.zeros(1), torch.zeros(1)
        monkeypatch.setattr(self_test, "_weight_gradients", lambda *_, **__: nothing)
    monkeypatch.setattr(module, silent, Silent())
    # An allocator gives back memory that an earlier test wrote.
    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    with pytest.raises(UserError, match="self-test"):
        self_test.self_test(torch.device(device))


def test_a_kernel_that_fails_is_refused(device, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(rows_triton, "launch", fail)
    with pytest.raises(UserError, match="no kernel image"):
        self_test.self_test(torch.device(device))
