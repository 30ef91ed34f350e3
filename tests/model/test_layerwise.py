"""Packs that go through the layers side by side end as packs that go one by one."""

from types import SimpleNamespace

import pytest
import torch

from mr1_fast.model import layerwise
from mr1_fast.model.families import text_model
from mr1_fast.model.forward import LayerRun, packed_hidden
from mr1_fast.model.layer_stream import LayerStream
from mr1_fast.model.layerwise import run_by_layers, states_wait_on_device
from mr1_fast.packing import packs
from mr1_fast.types import PackedBatch

from ..data.models import examples_for, tiny_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "qwen3"])
def policy(request):
    return tiny_policy(torch.bfloat16, request.param)


@pytest.fixture(scope="module")
def batches(policy):
    completions = [torch.tensor([5, 6, 7 + i]) for i in range(8)]
    return list(packs([policy.encode(e) for e in examples_for(policy)], completions, 90))


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
    assert len(found) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_each_layer_runs_over_all_packs_before_the_next(policy, batches, monkeypatch):
    order, text = [], text_model(policy.model)

    def note(layer, *args):
        order.append(list(text.layers).index(layer))
        return text_layer(layer, *args)

    text_layer = layerwise.text_layer
    monkeypatch.setattr(layerwise, "text_layer", note)
    stream = LayerStream(policy.model, CPU)
    with stream:
        run_by_layers(policy.model, batches, stream, itself)
    assert order == [layer for layer in range(len(text.layers)) for _ in batches]


@pytest.mark.parametrize("family, features", [("qwen2_vl", 0), ("qwen3_vl", 2)])
def test_states_wait_on_the_device_if_they_are_no_more_than_the_gradients(family, features):
    """A hidden state has 128 numbers of 2 bytes a token, and 64 a patch.

    With it wait deepstack features, of which each has 128 numbers for four patches.
    """
    model = tiny_policy(torch.bfloat16, family).model

    def pack(tokens: int, patches: int):
        pixels = torch.empty(patches, 0) if patches else None
        return SimpleNamespace(input_ids=torch.empty(tokens), pixel_values=pixels)

    for some, states, patches in (
        ([pack(10, 0)], 10 * 256, 0),
        ([pack(10, 16), pack(5, 0)], 15 * 256, 16),
        ([pack(10, 40), pack(5, 0)], 40 * 128 + 5 * 256, 40),
    ):
        states += features * patches // 4 * 256
        assert states_wait_on_device(model, some, streamed=100, gradients=states + 100)
        assert not states_wait_on_device(model, some, streamed=101, gradients=states + 100)


@torch.no_grad()
def test_the_states_of_a_pack_are_what_is_counted(monkeypatch):
    """The most that waits at once, of a pack with deepstack features."""
    policy = tiny_policy(torch.bfloat16, "qwen3_vl")
    prompts = [policy.encode(example) for example in examples_for(policy)[1:]]
    (batch,) = packs(prompts, [torch.tensor([5, 6])] * len(prompts), 10**6)
    waiting, most = {}, []
    put, take = layerwise._State.put, layerwise._State.take

    def note_put(state, hidden):
        put(state, hidden)
        waiting[state] = hidden.nbytes
        most.append(sum(waiting.values()))

    def note_take(state):
        del waiting[state]
        return take(state)

    monkeypatch.setattr(layerwise._State, "put", note_put)
    monkeypatch.setattr(layerwise._State, "take", note_take)
    stream = LayerStream(policy.model, CPU)
    with stream:
        run_by_layers(policy.model, [batch], stream, itself)
    assert not waiting
    assert max(most) == layerwise.state_bytes(policy.model, batch)
