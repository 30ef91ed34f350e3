"""How the values of rows become one number of a step."""

import pytest
import torch

from mr1_fast.metrics import Largest, Mean, RowMetrics


def test_means_and_maxima_do_not_depend_on_how_rows_are_spread_over_batches():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for sizes in ([12], [5, 7], [1, 0, 11]):
        metrics = RowMetrics()
        for part in values.split(sizes):
            metrics.add({"mean": Mean(part), "max": Largest(part), "share": Mean(part > 0)})
        result = metrics.result()
        assert list(result) == ["mean", "share", "max"]
        assert result["mean"] == pytest.approx(values.mean().item())
        assert result["share"] == pytest.approx((values > 0).float().mean().item())
        assert result["max"] == values.max().item()


def test_the_kind_decides_and_not_the_name():
    metrics = RowMetrics()
    values = torch.tensor([1.0, 3.0])
    metrics.add({"length_max": Mean(values), "length_mean": Largest(values)})
    assert metrics.result() == {"length_max": 2.0, "length_mean": 3.0}


def test_without_rows_nothing_is_claimed():
    metrics = RowMetrics()
    metrics.add({"mean": Mean(torch.zeros(0)), "max": Largest(torch.zeros(0))})
    assert metrics.result() == {}


def test_a_value_that_is_not_finite_shows():
    metrics = RowMetrics()
    metrics.add(
        {"mean": Mean(torch.tensor([1.0, torch.nan])), "max": Largest(torch.tensor([torch.inf]))}
    )
    result = metrics.result()
    assert result["mean"] != result["mean"] and result["max"] == float("inf")
