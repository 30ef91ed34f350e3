"""The layers of a model in host memory take turns in two slots on the device."""

import pytest
import torch

from mr1_fast.model.layer_stream import LayerStream, layers, on_host, streamed_bytes

from ..data.models import tiny_policy

CPU = torch.device("cpu")


def model_and_stream(family: str = "qwen2_vl") -> tuple[torch.nn.Module, LayerStream]:
    model = tiny_policy(family=family).model.requires_grad_(False)
    return model, LayerStream(model, CPU)


def addresses(model) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("family, count, slots", [("qwen2_vl", 5, 4), ("qwen3", 3, 2)])
def test_each_layer_has_its_weights_in_one_of_two_slots_of_its_kind(family, count, slots):
    model, stream = model_and_stream(family)
    host, expected = addresses(model), {n: p.clone() for n, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    used = set()
    with stream:
        for layer in stream.through(layers(model)):
            for parameter in layer.parameters():
                assert parameter.data_ptr() not in host
                assert torch.equal(parameter, expected[names[id(parameter)]])
            used.add(next(layer.parameters()).data_ptr())
        assert len(layers(model)) == count and len(used) == len(stream.slots) == slots
        assert held(stream) == streamed_bytes(model)[0]
    assert addresses(model) == host and not stream.slots


def held(stream: LayerStream) -> int:
    return sum(tensor.nbytes for slot in stream.slots.values() for tensor in slot)


def test_the_next_layer_is_loaded_while_one_is_used():
    model, stream = model_and_stream()
    every = layers(model)
    with stream:
        for _ in stream.through(every[:2], then=every[2]):
            pass
        assert list(stream.ready) == [every[2]]
        for number, layer in enumerate(stream.through(every[2:]), start=2):
            assert list(stream.ready) == [layer, *every[number + 1 : number + 2]]
        assert not stream.ready


def test_a_layer_may_be_used_again_within_the_context():
    model, stream = model_and_stream()
    layer = layers(model)[3]
    expected = [p.clone() for p in layer.parameters()]
    with stream:
        for chosen in (layers(model)[2:], [layer]):
            for each in stream.through(chosen):
                last = [p.clone() for p in each.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True))


def test_a_loop_that_is_left_leaves_nothing_on_the_device():
    model, stream = model_and_stream()
    host = addresses(model)
    with pytest.raises(torch.OutOfMemoryError), stream:
        for number, _ in enumerate(stream.through(layers(model))):
            if number == 3:
                raise torch.OutOfMemoryError("no room")
    assert addresses(model) == host and not stream.slots


def test_what_is_resident_is_never_moved():
    model = tiny_policy().model.requires_grad_(False)
    resident = {id(p): p for p in model.model.visual.parameters()}
    stream, host = LayerStream(model, CPU, resident), addresses(model)
    with stream:
        for layer in stream.through(layers(model)):
            is_block = layer in list(model.model.visual.blocks)
            assert all((p.data_ptr() in host) == is_block for p in layer.parameters())
        slots, others = streamed_bytes(model, resident)
        text = model.model.language_model
        assert slots == held(stream) == 2 * sum(p.nbytes for p in text.layers[0].parameters())
        assert others == text.embed_tokens.weight.nbytes + text.norm.weight.nbytes


def test_host_copies_are_frozen_and_equal():
    parameters = list(tiny_policy(torch.bfloat16).model.parameters())
    copies = on_host(parameters)
    for parameter in parameters:
        copy = copies[id(parameter)]
        assert torch.equal(copy, parameter) and not copy.requires_grad
        assert copy.data_ptr() != parameter.data_ptr() and copy.dtype == parameter.dtype
