"""Packs that go through the layers side by side end as packs that go one by one."""

from types import SimpleNamespace

import pytest
import torch

from mr1_fast.model import layerwise
from mr1_fast.model.forward import LayerRun, packed_hidden
from mr1_fast.model.layer_stream import LayerStream
from mr1_fast.model.layerwise import run_by_layers, states_wait_on_device
from mr1_fast.packing import packs
from mr1_fast.types import PackedBatch

from ..data.models import mixed_examples, tiny_policy

CPU = torch.device("cpu")


@pytest.fixture
def policy():
    return tiny_policy(torch.bfloat16)


@pytest.fixture
def batches(policy):
    completions = [torch.tensor([5, 6, 7 + i]) for i in range(8)]
    return list(packs([policy.encode(e) for e in mixed_examples()], completions, 90))


def itself(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    assert hidden.shape == (len(batch.targets), 128)
    return hidden


@torch.no_grad()
@pytest.mark.parametrize("wait_on_device", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_hidden_states_are_those_of_the_packs_one_by_one(policy, batches, fused, wait_on_device):
    expected = [packed_hidden(policy.model, batch, LayerRun(fused)) for batch in batches]
    stream = LayerStream(policy.model, CPU)
    with stream:
        found = run_by_layers(policy.model, batches, stream, itself, fused, wait_on_device)
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_each_layer_runs_over_all_packs_before_the_next(policy, batches, monkeypatch):
    order, text = [], policy.model.model.language_model

    def note(layer, *args):
        order.append(list(text.layers).index(layer))
        return text_layer(layer, *args)

    text_layer = layerwise.text_layer
    monkeypatch.setattr(layerwise, "text_layer", note)
    stream = LayerStream(policy.model, CPU)
    with stream:
        run_by_layers(policy.model, batches, stream, itself)
    assert order == [layer for layer in range(len(text.layers)) for _ in batches]


def test_states_wait_on_the_device_if_they_are_no_more_than_the_gradients(policy):
    """A hidden state has 128 numbers of 2 bytes a token, and 64 a patch."""

    def pack(tokens: int, patches: int):
        pixels = torch.empty(patches, 0) if patches else None
        return SimpleNamespace(input_ids=torch.empty(tokens), pixel_values=pixels)

    for some, states in (
        ([pack(10, 0)], 10 * 256),
        ([pack(10, 16), pack(5, 0)], 15 * 256),
        ([pack(10, 40), pack(5, 0)], 40 * 128 + 5 * 256),
    ):
        model = policy.model
        assert states_wait_on_device(model, some, streamed=100, gradients=states + 100)
        assert not states_wait_on_device(model, some, streamed=101, gradients=states + 100)
