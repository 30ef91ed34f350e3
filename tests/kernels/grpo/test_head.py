"""What the fused head stores, and the sum of a 16-bit weight's gradient over chunks."""

import pytest
import torch

from mr1_fast import linear_grpo_loss
from mr1_fast.kernels.grpo import head
from mr1_fast.kernels.grpo.head import Head, NeedsGradient, slice_rows

from ...data.memory_trace import peak_bytes

WEIGHT_ONLY = NeedsGradient(hidden=False, weight=True, bias=False)


def arguments(n: int, v: int) -> dict[str, torch.Tensor | float]:
    """Targets and the rest of an on-policy loss."""
    generator = torch.Generator().manual_seed(1)
    return dict(
        targets=torch.randint(v, (n,), generator=generator),
        advantages=torch.randn(n, generator=generator),
        token_weights=torch.full((n,), 1 / n),
        beta=0.0,
    )


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.bfloat16, {"fp32_accumulation": True}),
        (torch.bfloat16, {"fp32_accumulation": False}),
    ],
    ids=str,
)
def test_the_logits_are_freed_before_the_gradient_is_cast(dtype, options, monkeypatch):
    n, d, v, rows = 512, 64, 4096, 256
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * d * 64)
    hidden, weight = (torch.randn(size, d).to(dtype).requires_grad_() for size in (n, v))
    budget = rows * v * dtype.itemsize
    call = lambda: linear_grpo_loss(  # noqa: E731
        hidden, weight, **arguments(n, v), chunk_bytes=budget, **options
    )
    in_fp32 = options.get("fp32_accumulation", False)
    dhidden, dweight, results = hidden.nbytes, weight.nbytes, n * 4 * 8
    total = (2 if in_fp32 else 1) * dweight
    copies = 0
    if dtype == torch.bfloat16:
        part = min(v, slice_rows(d))
        copies = 4 * (rows * (part + d) + part * d * (not in_fp32))
    most = total + max(budget + copies, dweight if in_fp32 else 0) + dhidden + results
    # Without bf16 instructions oneDNN multiplies fp32 copies that it makes in each product.
    with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
        peak = peak_bytes(call)
    assert peak <= most + 64_000, "what is computed per row is small beside"
    assert peak > total + budget, "the logits do count"


def test_a_given_tensor_takes_the_place_of_the_weights_gradient():
    n, d, v = 64, 64, 4096
    hidden, weight = (torch.randn(size, d, requires_grad=True) for size in (n, v))
    rest = dict(**arguments(n, v), chunk_bytes=16 * v * 4)
    weight.grad = torch.zeros_like(weight)
    step = lambda **options: linear_grpo_loss(hidden, weight, **rest, **options)  # noqa: E731
    assert peak_bytes(lambda: step(weight_grad=weight.grad)) < weight.nbytes
    assert peak_bytes(step) > weight.nbytes


# --- the sum over chunks ------------------------------------------------------------------------


def errors(chunks: int, fp32_accumulation: bool, dtype=torch.bfloat16, scale: float = 4.0):
    """Relative error of dweight against fp64, and its projection on the exact one less 1.

    dlogits, which have the dtype of the weight, are the same for both: the sum alone differs. They
    are those of a softmax whose rows have advantages of both signs.
    """
    n, v, d = 1024, 512, 64
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, d, generator=generator).to(dtype) for size in (n, v))
    advantages = torch.randn(n, 1, generator=generator) / n
    targets = torch.randint(v, (n,), generator=generator)
    fused = Head(hidden, weight, None, WEIGHT_ONLY, -(-n // chunks), fp32_accumulation)
    exact = torch.zeros(v, d, dtype=torch.float64)

    def work(rows: slice, logits: torch.Tensor) -> None:
        p = (logits.float() * scale / d**0.5).softmax(-1)
        p[torch.arange(len(p)), targets[rows]] -= 1
        logits.copy_(p * advantages[rows])
        exact.add_(logits.double().T @ hidden[rows].double())
        fused.backward(rows, logits)

    fused.for_each_chunk(work)
    gradient = fused.gradients()[1].double()
    distance = ((gradient - exact).norm() / exact.norm()).item()
    return distance, ((gradient - exact).flatten() @ exact.flatten() / exact.norm() ** 2).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_in_16_bits_is_less_exact_but_not_biased(dtype):
    unit = 1.7e-3 if dtype == torch.bfloat16 else 1.7e-3 / 8  # of one rounding
    bounds = {1: 1.1, 3: 1.6, 5: 1.9, 8: 2.4, 16: 3.3, 64: 7.0}
    for count, bound in bounds.items():
        distance, projection = errors(count, False, dtype)
        assert distance < bound * unit, count
        assert abs(projection) < 2e-4, count
        distance, projection = errors(count, True, dtype)
        assert distance < 1.1 * unit and abs(projection) < 5e-5, count


def test_in_16_bits_over_few_chunks_and_in_fp32_over_many():
    hidden, weight = (torch.zeros(n, 8, dtype=torch.bfloat16) for n in (90, 20))
    made = lambda rows, *rest: Head(hidden, weight, None, WEIGHT_ONLY, rows, *rest)  # noqa: E731
    assert made(12).sum.dtype == torch.bfloat16, "8 chunks"
    assert made(11).sum.dtype == torch.float32, "9 chunks"
    assert made(11, False).sum.dtype == torch.bfloat16
    assert made(45, True).sum.dtype == torch.float32
    assert made(90, True).sum.dtype == torch.bfloat16, "a single share is rounded once in any case"
    assert Head(*(t.double() for t in (hidden, weight)), None, WEIGHT_ONLY, 1).sum.dtype == (
        torch.float64
    )


@pytest.mark.parametrize("fp32_accumulation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_the_vocabulary_change_nothing(dtype, fp32_accumulation, monkeypatch):
    n, d, v = 12, 8, 37
    hidden, weight = (torch.randn(size, d).to(dtype).requires_grad_() for size in (n, v))
    buffer = torch.ones(v, d, dtype=dtype)

    def gradients() -> list[torch.Tensor]:
        rest = dict(**arguments(n, v), chunk_bytes=4 * v * dtype.itemsize)
        rest |= {"fp32_accumulation": fp32_accumulation}
        loss = linear_grpo_loss(hidden, weight, **rest).loss
        added = buffer.clone()
        linear_grpo_loss(hidden, weight, **rest, weight_grad=added)
        return [*torch.autograd.grad(loss, (hidden, weight)), added]

    whole = gradients()
    monkeypatch.setattr(head, "SLICE_BYTES", 5 * 4 * d)
    for cut, right in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(cut, right, rtol=1e-5, atol=1e-6)
