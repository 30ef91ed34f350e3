"""Rows whose parts belong to several programs: how they are cut, and how programs wait."""

import pytest
import torch

from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.objective import RowResults
from mr1_fast.kernels.grpo.reference import token_logprobs_ref

from ..data.loss import assert_within_bound, loss_rows
from .conftest import INTERPRETED
from .data import DTYPES, objective, run_rows, tile_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 3, 19])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_split_row_equals_a_whole_one(device, inplace, parts, dtype):
    columns = {2: 32_768, 3: 16_384, 19: 2048}[parts]
    v = 37 * 1024 + 500
    data = loss_rows(4, v, dtype, device)
    assert rows_triton.split_row(data["logits"], tile_of(columns, dtype))[2] == parts
    # Targets in the first, the last and a middle part, and the last column of a part.
    data["targets"] = torch.tensor([0, v - 1, 20_000, 2047], device=device)
    whole_out = torch.empty_like(data["logits"])
    whole = run_rows(data, whole_out, 65_536)
    exact_data = {name: t.double() if t.is_floating_point() else t for name, t in data.items()}
    exact = torch.log_softmax(exact_data["logits"] / 0.9, -1).gather(1, data["targets"][:, None])[
        :, 0
    ]
    out = data["logits"] if inplace else torch.empty_like(data["logits"])
    split = run_rows(data, out, columns)
    for name in ("loss", "logp", "entropy", "kl"):
        # rounding of logp grows with the loss through the ratio
        torch.testing.assert_close(
            getattr(split, name), getattr(whole, name), rtol=2e-5, atol=1e-5, msg=name
        )
    assert_within_bound(split.logp, whole.logp, exact, "logp")
    assert torch.equal(split.clipped, whole.clipped) and torch.equal(
        split.kl_limited, whole.kl_limited
    )
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out, whole_out, rtol=max(1e-4, step), atol=1e-6)


@pytest.mark.parametrize("v", [1, 37, 8192, 8193, 151_936, 152_064])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_cover_a_row_once_and_begin_at_wide_accesses(v, dtype):
    logits = torch.empty(1, v, dtype=dtype, device="meta")
    for tile in rows_triton.LOSS_VARIANTS:
        columns, part_columns, parts = rows_triton.split_row(logits, tile)
        assert part_columns <= columns and (parts - 1) * part_columns < v <= parts * part_columns
        assert parts == 1 or part_columns % 64 == 0
        assert part_columns * parts - v < 64 * parts  # balanced


@pytest.mark.parametrize("last_first", [False, True])
def test_a_part_that_does_not_come_gives_nan_and_ends(
    device, monkeypatch, reverse_grid, last_first
):
    # In one launch, programs of the interpreter that run first wait in vain for those after them.
    monkeypatch.setattr(rows_triton, "PHASES", (0,))
    monkeypatch.setattr(rows_triton, "SPIN_LIMIT", 3)
    if last_first:
        reverse_grid()
    data = loss_rows(3, 4099, torch.bfloat16, device)
    data["token_weights"][1] = 0
    out = torch.zeros_like(data["logits"])
    results = run_rows(data, out, 2048)
    first, last = slice(0, 1408), slice(2816, 4099)
    waits, complete = (last, first) if last_first else (first, last)
    assert out[:, waits].isnan().all()
    assert out[:, complete].isfinite().all()
    assert results.loss.isnan().all() != last_first  # the first part reports the loss
    assert results.logp.isnan().all() != last_first


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's part is above")
def test_parts_that_never_come_give_nan_and_end_on_a_gpu(device, monkeypatch):
    monkeypatch.setattr(rows_triton, "PHASES", (2,))  # nobody publishes
    monkeypatch.setattr(rows_triton, "SPIN_LIMIT", 3)
    data = loss_rows(64, 151_936, torch.bfloat16, device)
    out = torch.zeros_like(data["logits"])
    results = run_rows(data, out, 8192)
    assert results.loss.isnan().all() and out.isnan().all()


def test_a_nan_whose_bits_are_all_one_is_a_value_and_not_a_part_that_is_absent(device):
    data = loss_rows(2, 4099, device=device)
    bits = data["logits"].view(torch.int32)
    bits[0, 7], bits[1, data["targets"][1]] = -1, -1
    out = torch.empty_like(data["logits"])
    results = run_rows(data, out, 2048)
    assert results.loss.isnan().all() and (out == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="programs of the interpreter run one after the other")
@pytest.mark.parametrize("tile", rows_triton.LOSS_VARIANTS, ids=str)
def test_parts_wait_for_each_other_on_a_gpu(device, tile):
    data = loss_rows(300, 151936, torch.bfloat16, device)
    exact = token_logprobs_ref(data["logits"].double(), data["targets"], 0.9)[0]
    expected_out = torch.empty_like(data["logits"])
    rows_triton.row_grpo(
        data["logits"],
        data["targets"],
        objective(data),
        RowResults.empty(expected_out),
        expected_out,
        rows_triton.LOSS_VARIANTS[0],
    )
    for _ in range(20):
        logits = data["logits"].clone()
        results = RowResults.empty(logits)
        rows_triton.row_grpo(logits, data["targets"], objective(data), results, logits, tile)
        torch.testing.assert_close(results.logp.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, expected_out, rtol=1e-2, atol=1e-6)
