"""What the Triton kernels read and write.

Guards around every output, strides, split rows, storage reuse and far offsets.
"""

import pytest
import torch

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.logprobs_triton import LOGPROBS_VARIANTS
from mr1_fast.kernels.grpo.objective import RowResults

from ..data.loss import loss_rows, objective_of
from .data import DTYPES, run_rows

GUARD = 64
SENTINEL = 0xA5
GAP = 24


class Guards:
    """While active, every tensor that new_empty or new_zeros makes lies between sentinel bytes."""

    def __init__(self, monkeypatch):
        self.buffers = []
        patch = {
            name: self.wrap(getattr(torch.Tensor, name)) for name in ("new_empty", "new_zeros")
        }
        for name, function in patch.items():
            monkeypatch.setattr(torch.Tensor, name, function)

    def wrap(self, make):
        def guarded(tensor, *shape, **options):
            inner = make(tensor, *shape, **options)
            if not inner.numel():
                return inner
            size = inner.numel() * inner.element_size()
            buffer = torch.full(
                (size + 2 * GUARD,), SENTINEL, dtype=torch.uint8, device=inner.device
            )
            self.buffers.append(buffer)
            middle = buffer[GUARD : GUARD + size]
            middle.copy_(
                inner.reshape(-1).view(torch.uint8)
            ) if make.__name__ == "new_zeros" else None
            return middle.view(inner.dtype).view(inner.shape)

        return guarded

    def assert_untouched(self):
        assert self.buffers
        for buffer in self.buffers:
            assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all()


def with_gap(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of a wider tensor that hold the logits, the columns between these rows)."""
    wide = torch.full(
        (logits.shape[0], logits.shape[1] + GAP), 7.0, dtype=logits.dtype, device=logits.device
    )
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]], wide[:, logits.shape[1] :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v", "columns"), [(37, 8192), (37, 16), (4099, 8192), (4099, 2048)])
def test_the_loss_writes_all_of_its_outputs_and_nothing_else(
    device, monkeypatch, v, dtype, columns
):
    data = loss_rows(5, v, dtype, device)
    data["logits"], input_gap = with_gap(data["logits"])
    before = data["logits"].clone()
    expected_out = torch.empty_like(before)
    expected = run_rows(data, expected_out, columns)
    guards = Guards(monkeypatch)
    wide = data["logits"].new_empty(5, v + GAP)
    wide.view(torch.uint8).fill_(SENTINEL)
    results = run_rows(data, wide[:, :v], columns)
    guards.assert_untouched()
    assert (wide[:, v:].contiguous().view(torch.uint8) == SENTINEL).all()
    assert torch.equal(wide[:, :v], expected_out)
    assert torch.equal(data["logits"], before) and (input_gap == 7).all()
    for name, value, expected_value in zip(RowResults._fields, results, expected, strict=True):
        assert torch.equal(value, expected_value), name
    for flags in (results.clipped, results.kl_limited):
        assert set(flags.view(torch.uint8).tolist()) <= {0, 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [37, 4099])
def test_logprobs_write_all_of_their_outputs_and_nothing_else(device, monkeypatch, v, dtype):
    data = loss_rows(5, v, dtype, device)
    logits, gap = with_gap(data["logits"])
    temperature = torch.tensor(0.9, device=device)
    incoming = data["advantages"], data["token_weights"]
    expected = rows_triton.row_logprobs(data["logits"], data["targets"], temperature)
    expected_out = torch.empty_like(data["logits"])
    rows_triton.row_logprobs_backward(
        data["logits"], data["targets"], temperature, *expected[1:], *incoming, expected_out
    )
    guards = Guards(monkeypatch)
    for tile in LOGPROBS_VARIANTS:
        variant = rows_triton.row_logprobs(logits, data["targets"], temperature, tile=tile)
        for value, expected_value in zip(variant, expected, strict=True):
            torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=2e-6)
    results = rows_triton.row_logprobs(logits, data["targets"], temperature)
    wide = logits.new_empty(5, v + GAP)
    wide.view(torch.uint8).fill_(SENTINEL)
    rows_triton.row_logprobs_backward(
        logits, data["targets"], temperature, *results[1:], *incoming, wide[:, :v]
    )
    guards.assert_untouched()
    assert (wide[:, v:].contiguous().view(torch.uint8) == SENTINEL).all() and (gap == 7).all()
    assert torch.equal(wide[:, :v], expected_out)
    for value, expected_value in zip(results, expected, strict=True):
        assert torch.equal(value, expected_value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_scaling_touches_its_tensor_alone(device, monkeypatch, size, dtype):
    guards = Guards(monkeypatch)
    gradient = torch.zeros(0, dtype=dtype, device=device).new_empty(size)
    gradient.copy_(torch.linspace(-2, 2, size))
    expected = (gradient.float() * 3).to(dtype)
    rows_triton.scale_(gradient, torch.tensor(3.0, device=device))
    guards.assert_untouched()
    assert torch.equal(gradient, expected)
    rows_triton.scale_(gradient, torch.tensor(1.0, device=device))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("columns", [8192, 2048])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_order_of_programs_does_not_matter(device, reverse_grid, inplace, columns):
    data = loss_rows(5, 4099, torch.bfloat16, device)
    start = data["logits"].clone()

    def run():
        data["logits"] = start.clone()
        out = data["logits"] if inplace else torch.empty_like(start)
        return *run_rows(data, out, columns), out

    forwards = run()
    reverse_grid()
    for value, expected in zip(run(), forwards, strict=True):
        assert torch.equal(value, expected)


def test_the_order_of_programs_does_not_matter_to_logprobs(device, reverse_grid):
    data = loss_rows(5, 4099, torch.bfloat16, device)
    temperature = torch.tensor(0.9, device=device)

    def run():
        results = rows_triton.row_logprobs(data["logits"], data["targets"], temperature)
        out = data["logits"].clone()
        incoming = data["advantages"], data["token_weights"]
        rows_triton.row_logprobs_backward(
            out, data["targets"], temperature, *results[1:], *incoming, out
        )
        return *results, out

    forwards = run()
    reverse_grid()
    for value, expected in zip(run(), forwards, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.5])
@pytest.mark.parametrize(
    ("layout", "inplace"),
    [
        ("contiguous", False),
        ("contiguous", True),
        ("rows of a wider tensor", False),
        ("rows of a wider tensor", True),
        ("columns first", False),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_incoming_gradient_scales_it(device, dtype, layout, inplace, factor):
    data = loss_rows(6, 37, dtype, device)
    arguments = objective_of(data, "old_logp", "ref_logp")

    def gradient(make, factor, inplace):
        leaf = data["logits"].clone().requires_grad_()
        logits = make(leaf)
        (factor * grpo_loss(logits, **arguments, beta=0.1, inplace=inplace).loss).backward()
        return leaf.grad

    def wider(leaf):
        return torch.cat([leaf, leaf.detach()], dim=1)[:, :37]

    def columns_first(leaf):
        return leaf.T.contiguous().T

    make = {
        "contiguous": lambda leaf: leaf * 1,
        "rows of a wider tensor": wider,
        "columns first": columns_first,
    }
    expected = (gradient(make["contiguous"], 1.0, False).float() * factor).to(dtype)
    assert torch.equal(gradient(make[layout], factor, inplace), expected)


@pytest.mark.parametrize("strided", [False, True])
def test_inplace_puts_the_gradient_where_the_logits_were(device, strided):
    data = loss_rows(6, 37, device=device)
    leaf = data["logits"].requires_grad_()
    arguments = objective_of(data, "old_logp", "ref_logp")
    wide = torch.cat([leaf, leaf.detach()], dim=1) if strided else leaf * 1
    logits = wide[:, :37] if strided else wide
    result = grpo_loss(logits, **arguments, beta=0.1, inplace=True)
    held = logits.detach().clone()
    result.loss.backward()
    assert torch.equal(held, leaf.grad)
    expected = torch.autograd.grad(grpo_loss(leaf, **arguments, beta=0.1).loss, leaf)[0]
    assert torch.equal(leaf.grad, expected)


def test_inplace_refuses_rows_that_share_memory(device):
    data = loss_rows(4, 37, device=device)
    row = data["logits"][0].clone().requires_grad_()
    with pytest.raises(ValueError, match="logits"):
        grpo_loss((row * 1).expand(4, 37), **objective_of(data), beta=0.0, inplace=True)


def test_without_gradient_nothing_is_overwritten(device):
    data = loss_rows(4, 37, device=device)
    logits = data["logits"].clone()
    grpo_loss(logits, **objective_of(data), beta=0.0, inplace=True)
    assert torch.equal(logits, data["logits"])
    with torch.no_grad():
        grpo_loss(logits.requires_grad_(), **objective_of(data), beta=0.0, inplace=True)
    assert torch.equal(logits, data["logits"])


@pytest.mark.parametrize("columns", [37, 4099])
def test_offsets_past_two_to_the_31_elements(device, no_copy_back, columns):
    stride = 2**31
    try:  # pages that nobody touches cost nothing on a CPU
        storage = torch.empty(stride + columns, dtype=torch.bfloat16, device=device)
    except (RuntimeError, MemoryError):
        pytest.skip("4.3 GB cannot be had")
    data = loss_rows(2, columns, torch.bfloat16, device)
    far = storage.as_strided((2, columns), (stride, 1))
    far.copy_(data["logits"])
    # Rows of a multiple of 16 columns apart, as the far ones are: a GPU reads those, and adds them
    # up, in wider pieces.
    near = torch.empty(2, columns + -columns % 16, dtype=torch.bfloat16, device=device)[:, :columns]
    data["logits"] = near.copy_(data["logits"])
    temperature = torch.tensor(1.0, device=device)
    expected = rows_triton.row_logprobs(data["logits"], data["targets"], temperature)
    results = rows_triton.row_logprobs(far, data["targets"], temperature)
    for value, expected_value in zip(results, expected, strict=True):
        assert torch.equal(value, expected_value)
    incoming = data["advantages"], data["token_weights"]
    out = near.new_empty(2, columns + -columns % 16)[:, :columns]
    rows_triton.row_logprobs_backward(
        data["logits"], data["targets"], temperature, *expected[1:], *incoming, out
    )
    rows_triton.row_logprobs_backward(
        far, data["targets"], temperature, *results[1:], *incoming, far
    )
    assert torch.equal(far, out)
    for per_program in (8192, 2048):
        far.copy_(data["logits"])
        expected = run_rows(data, out, per_program)
        results = run_rows(data | {"logits": far}, far, per_program)
        assert torch.equal(far, out)
        for value, expected_value in zip(results, expected, strict=True):
            assert torch.equal(value, expected_value)


def test_row_outputs_of_strided_logits(device):
    data = loss_rows(5, 37, device=device)
    logits, _ = with_gap(data["logits"])
    rows = slice(1, 4)
    for value, expected in zip(
        token_logprobs(logits[rows], data["targets"][rows]),
        token_logprobs(data["logits"], data["targets"]),
        strict=True,
    ):
        assert torch.equal(value, expected[rows])
