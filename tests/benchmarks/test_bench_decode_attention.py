"""The cases of the decode attention's benchmark attend to the same, in another order of rows."""

import pytest
import torch
from bench_decode_attention import MODELS, Shape, apart, least_bytes, spans_of


@pytest.mark.parametrize("model", MODELS)
def test_the_same_rows_once_with_neighbours_that_share_and_once_without(model):
    shape = MODELS[model]
    spans = spans_of(shape)
    other = apart(spans, shape)
    assert spans.dtype == other.dtype == torch.int32
    assert sorted(spans.tolist()) == sorted(other.tolist())

    def shared(rows):
        return (rows[1:, 0] == rows[:-1, 0]).sum().item()

    assert shared(spans) == shape.groups * (shape.group - 1)
    assert shared(other) == 0


def test_the_least_bytes_have_a_prefix_once():
    shape = Shape(heads=4, kv_heads=2, d=8, groups=2, group=3, prefix=10, own=4)
    own = 1 + 2 + 3 + 4 + 1 + 2
    assert least_bytes(shape, spans_of(shape), 4) == 2 * (2 * 10 + own) * 2 * 8 * 4
