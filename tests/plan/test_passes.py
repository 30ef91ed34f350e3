"""What the plan says of the LM head and the loss is what they allocate, chunk by chunk."""

from types import SimpleNamespace

import pytest
import torch

from mr1_fast.kernels.grpo.chunks import CHUNK_BYTES
from mr1_fast.loss import linear_grpo_loss, linear_token_logprobs
from mr1_fast.plan.passes import loss_head

from ..data.memory_trace import peak_bytes

N, D, V = 384, 48, 6000


def planned(dtype: torch.dtype, trains: bool, trains_head: bool, in_one_pass: bool = True):
    model = SimpleNamespace(
        vocabulary=V,
        width=D,
        itemsize=dtype.itemsize,
        trains_head=trains_head,
        head_bytes=V * D * dtype.itemsize,
        hidden_bytes=lambda rows: rows * D * dtype.itemsize,
    )
    return loss_head(SimpleNamespace(policy=model, device="cpu"), N, trains, in_one_pass)


@pytest.mark.parametrize("trains, trains_head", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_bytes_of_the_head_are_what_it_allocates(chunks, dtype, trains, trains_head, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", N // chunks * V * dtype.itemsize)
    hidden = torch.randn(N, D).to(dtype).requires_grad_(trains)
    weight = torch.randn(V, D).to(dtype).requires_grad_(trains and trains_head)
    rest = torch.zeros(N, dtype=torch.int64), torch.ones(N), torch.ones(N)

    def call():
        if trains:
            linear_grpo_loss(hidden, weight, *rest, beta=0.0)
        else:
            linear_token_logprobs(hidden, weight, rest[0])

    # Without bf16 instructions oneDNN multiplies fp32 copies that it makes in each product.
    with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
        measured = peak_bytes(call)
    assert planned(dtype, trains, trains_head).most == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("loss", ["a ratio per sequence", "an entropy"])
def test_bytes_of_a_loss_that_takes_two_passes(loss, chunks, dtype, trains_head, monkeypatch):
    """Beside the head, the equations keep some numbers of each row."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", N // chunks * V * dtype.itemsize)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trains_head)
    options = {"entropy_weights": torch.ones(N)}
    if loss != "an entropy":
        options = {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 9, N])}

    def call():
        targets = torch.zeros(N, dtype=torch.int64)
        linear_grpo_loss(
            hidden, weight, targets, torch.ones(N), torch.ones(N), beta=0.0, **options
        ).loss.backward()

    with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
        measured = peak_bytes(call)
    assert planned(dtype, True, trains_head, in_one_pass=False).most == pytest.approx(
        measured, rel=0.05
    )
