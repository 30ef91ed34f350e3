"""What a GPU would launch, counted on meta tensors: operators, stand-ins and Triton kernels."""

import pytest
import torch
from count_kernels import (
    ATTENTION,
    COPY,
    DEQUANTISE,
    ELEMENTWISE,
    FUSED,
    GATHER,
    GEMM,
    REDUCTION,
    Totals,
    counted,
)
from torch import nn

from mr1_fast.model.linears import Linears
from mr1_fast.plan.stand_ins import FourBitLinear, _Rows, _VariableLengths


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def launched(call) -> list[tuple[str, str, int]]:
    """Names, kinds and bytes of what a call launches."""
    with counted() as launches:
        call()
    return [(each.name.partition("::")[2] or each.name, *each[1:3]) for each in launches]


def test_views_and_allocations_launch_nothing():
    x = meta(4, 6)
    assert not launched(lambda: x.T.unsqueeze(0).expand(3, 6, 4)[1:].detach().transpose(0, 1))
    assert not launched(lambda: (torch.empty_like(x), x.new_empty(3), x.view(24).split(8)))


@pytest.mark.parametrize(
    ("call", "kind", "numbers"),
    [
        (lambda x, y: x * y, ELEMENTWISE, 3 * 24),
        (lambda x, y: x * y[:1].expand(4, 6), ELEMENTWISE, 24 + 6 + 24),
        (lambda x, y: x.add_(y), ELEMENTWISE, 3 * 24),
        (lambda x, y: x.copy_(y), COPY, 2 * 24),
        (lambda x, y: x.zero_(), COPY, 24),
        (lambda x, y: x.float(), COPY, 24 + 2 * 24),
        (lambda x, y: torch.cat([x, y]), COPY, 2 * 48),
        (lambda x, y: x.sum(0), REDUCTION, 24 + 6),
        (lambda x, y: torch.mm(x, y.T, out=meta(4, 4)), GEMM, 2 * 24 + 16),
        (lambda x, y: torch.addmm(meta(4), x, y.T), GEMM, 4 + 2 * 24 + 16),
    ],
)
def test_an_operator_moves_its_inputs_and_outputs_once(call, kind, numbers):
    ((_, found, size),) = launched(lambda: call(meta(4, 6), meta(4, 6)))
    assert (found, size) == (kind, 2 * numbers)


def test_a_product_has_its_sizes_and_operations():
    with counted() as launches:
        torch.mm(meta(3, 5), meta(7, 5).T)
        torch.bmm(meta(2, 3, 5), meta(2, 5, 7))
    products = [each.product for each in launches]
    assert [each.flop for each in products] == [2 * 3 * 5 * 7, 2 * 2 * 3 * 5 * 7]
    assert products[0].transposed == (False, True) and products[1].count == 2


def test_what_autograd_adds_up_is_counted():
    x, w = meta(8, 6, requires_grad=True), meta(6, requires_grad=True)

    def call():
        y = x * 1.0  # two paths lead to it
        ((y * w) + y).sum().backward()

    names = [name for name, *_ in launched(call)]
    assert names.count("add") == 2  # that of the forward, and that of the two gradients
    assert names.count("add_") == 0
    names = [name for name, *_ in launched(call)]
    assert names.count("add_") == 2  # the gradients of both leaves are there already


def test_stand_ins_count_as_what_they_stand_for():
    q, k = meta(10, 4, 8, requires_grad=True), meta(10, 2, 8, requires_grad=True)
    attention = launched(lambda: _VariableLengths.apply(q, k, k, 3).backward(meta(10, 4, 8)))
    kinds = [kind for _, kind, _ in attention]
    assert kinds[:2] == [ATTENTION, ATTENTION] and attention[0][2] == 2 * (2 * 320 + 2 * 160)
    gathers = launched(lambda: _Rows.apply(k, 30).backward(meta(30, 2, 8)))
    assert [kind for _, kind, _ in gathers][:2] == [GATHER, GATHER]

    linear = FourBitLinear(nn.Linear(128, 256, bias=False, device="meta"))
    found = launched(lambda: linear(meta(3, 128)))
    assert [kind for _, kind, _ in found] == [DEQUANTISE] * 3 + [GEMM]
    assert found[2][2] == 128 * 256 * (0.5 + 4 / 64 + 2)
    assert found[3][2] == 2 * (3 * 128 + 128 * 256 + 3 * 256)
    # Layers on the same input, by our fused layers: both weights in one launch, and one product
    pair = [FourBitLinear(nn.Linear(128, 256, bias=False, device="meta")) for _ in range(2)]
    for layer in pair:
        layer.compute_dtype = torch.bfloat16
    found = launched(lambda: Linears.of(*pair).product(meta(3, 128)))
    assert [kind for _, kind, _ in found] == [DEQUANTISE, GEMM]
    scales = 1 / 64 + 4 / 64 / 256
    assert found[0][2] == 2 * 128 * 256 * (0.5 + scales + 2)


def test_an_operator_of_ours_is_one_launch():
    hidden, weight = meta(5, 16, dtype=torch.float32), meta(40, 16, dtype=torch.float32)
    targets, temperature = meta(5, dtype=torch.int64), meta(dtype=torch.float32)
    operator = torch.ops.mr1_fast.linear_token_logprobs
    import mr1_fast  # noqa: F401  # registers it

    found = launched(lambda: operator(hidden, weight, None, targets, temperature, 1024))
    assert [each[:2] for each in found] == [("linear_token_logprobs", FUSED)]


def test_triton_kernels_are_counted_and_do_not_run():
    triton = pytest.importorskip("triton")

    @triton.jit
    def _triton_rope(q_ptr, k_ptr, cos, n):  # its first two arguments are changed in place
        pass

    @triton.jit
    def _other_kernel(x, y, n):
        pass

    def call():
        _triton_rope[(1,)](meta(10), meta(4), meta(3), 10)
        _other_kernel[(1,)](meta(10), y=meta(4), n=3)

    run = triton.runtime.jit.JITFunction.run
    assert launched(call) == [
        ("triton_rope", FUSED, 2 * (2 * 10 + 2 * 4 + 3)),
        ("other_kernel", FUSED, 2 * (10 + 4)),
    ]
    assert triton.runtime.jit.JITFunction.run is run


def test_totals_leave_out_products_and_tell_what_is_alone():
    def call():
        x = meta(16, 8)
        (x @ meta(8, 8)) + x  # alone: an addition on all tokens
        meta(16, 2) * 2.0  # narrower than a hidden state
        meta(8, 32) * 2.0  # of no tokens
        x.sum(0)  # no element-wise operation

    with counted() as launches:
        call()
    totals = Totals.of(launches, tokens=16, width=8)
    assert (totals.launches, totals.alone, totals.flop) == (5, 1, 2 * 16 * 8 * 8)
    assert totals.nbytes == 2 * (3 * 128 + 2 * 32 + 2 * 256 + 128 + 8)
    assert totals.kinds[ELEMENTWISE] == (3, 2 * (3 * 128 + 2 * 32 + 2 * 256))
