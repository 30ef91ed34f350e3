"""The place of the reference and of checkpoints changes no number; 8 bits change them a little."""

import pytest
import torch

from mr1_fast.model import reference as reference_module
from mr1_fast.model.reference import Int8Linear, Reference, layers
from mr1_fast.packing import pack

from ..data.models import mixed_examples, tiny_policy

TEMPERATURE = 0.7


def batch_of(policy, text_only: bool = False):
    examples = mixed_examples()[:1] if text_only else mixed_examples()
    completions = [torch.tensor([5, 6, 7 + i]) for i in range(2 * len(examples))]
    return pack([policy.encode(e) for e in examples], completions, list(range(len(completions))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_resident_and_neither_moves_with_the_policy(dtype):
    policy = tiny_policy(dtype)
    batch, text_only = batch_of(policy), batch_of(policy, text_only=True)
    start = policy.logprobs(batch, TEMPERATURE)[0]
    resident, offload = Reference(policy, "resident"), Reference(policy, "offload")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05)
    # Text alone skips the vision tower, whose first block is the layer that is loaded first.
    for some in (batch, text_only, batch):
        assert torch.equal(
            offload.logprobs(some, TEMPERATURE), resident.logprobs(some, TEMPERATURE)
        )
    assert torch.equal(resident.logprobs(batch, TEMPERATURE), start)
    assert (policy.logprobs(batch, TEMPERATURE)[0] - start).abs().max() > 1e-2


def test_offload_holds_two_layers_of_a_kind_at_a_time():
    policy = tiny_policy()
    reference = Reference(policy, "offload")
    model, stream, seen = reference.policy.model, reference.stream, []
    host = {name: p.data_ptr() for name, p in model.named_parameters()}

    def count(*_):
        slots = {tensors[0].data_ptr() for tensors in stream.slots.values()}
        seen.append(
            (len(slots), sum(p.data_ptr() != host[name] for name, p in model.named_parameters()))
        )

    layers(model)[-1].register_forward_hook(count)
    reference.logprobs(batch_of(policy), TEMPERATURE)
    assert seen[0][0] == 4, (
        "two slots for vision blocks, two for decoder layers, however many there are"
    )
    assert seen[0][1] > 0
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == host, (
        "nothing stays on the device"
    )
    assert not stream.slots


def test_a_failed_pass_leaves_the_reference_usable():
    policy = tiny_policy()
    reference, batch = Reference(policy, "offload"), batch_of(policy)
    expected = reference.logprobs(batch, TEMPERATURE)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    hook = layers(reference.policy.model)[3].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        reference.logprobs(batch, TEMPERATURE)
    hook.remove()
    assert torch.equal(reference.logprobs(batch, TEMPERATURE), expected)


def test_no_room_for_the_ends_leaves_nothing_on_the_device(monkeypatch):
    policy = tiny_policy()
    reference, batch = Reference(policy, "offload"), batch_of(policy)
    expected = reference.logprobs(batch, TEMPERATURE)
    parameters = list(reference.policy.model.parameters())
    host, moved, to = [p.data_ptr() for p in parameters], [], torch.Tensor.to

    def second_fails(self, *args, **kwargs):
        if kwargs.get("non_blocking"):
            moved.append(self)
            if len(moved) == 2:
                raise torch.OutOfMemoryError("no room")
            return self.clone()
        return to(self, *args, **kwargs)

    on_device = batch.to("cpu")
    monkeypatch.setattr(torch.Tensor, "to", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        reference.logprobs(on_device, TEMPERATURE)
    monkeypatch.undo()
    assert [p.data_ptr() for p in parameters] == host
    assert torch.equal(reference.logprobs(batch, TEMPERATURE), expected)


@pytest.mark.parametrize("place", ["resident", "8bit", "offload"])
def test_only_the_chosen_copy_is_made(monkeypatch, place):
    made = []
    for name in ("in_8_bits", "on_host"):
        make = getattr(reference_module, name)
        monkeypatch.setattr(
            reference_module,
            name,
            lambda model, name=name, make=make: (made.append(name), make(model))[1],
        )
    Reference(tiny_policy(), place)
    assert made == {"resident": [], "8bit": ["in_8_bits"], "offload": ["on_host"]}[place]


def test_8_bits_are_close_and_hold_a_quarter_of_the_layers_bytes():
    policy = tiny_policy()
    batch = batch_of(policy)
    reference = Reference(policy, "8bit")
    start = policy.logprobs(batch, TEMPERATURE)[0]
    error = (reference.logprobs(batch, TEMPERATURE) - start).abs()
    assert 0 < error.mean() < 0.02
    quantised = [m for m in reference.policy.model.modules() if isinstance(m, Int8Linear)]
    linears = [
        m
        for layer in layers(policy.model)
        for m in layer.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    assert len(quantised) == len(linears) > 0
    assert sum(m.weight.nbytes for m in quantised) * 4 == sum(m.weight.nbytes for m in linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_weights_are_within_half_a_step(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32).to(dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    quantised = Int8Linear(linear)
    restored = quantised.weight.float() * quantised.scale.float()[:, None]
    step = quantised.scale.float()[:, None]
    # The scale is rounded to the dtype, so the largest weights may be cut by that rounding.
    bound = step * (0.5 + 127 * torch.finfo(dtype).eps) + 1e-12
    assert ((restored - linear.weight.float()).abs() <= bound).all()
    assert not restored[3].any()
    x = torch.randn(5, 64, dtype=dtype)
    expected = torch.nn.functional.linear(x.double(), restored.double(), linear.bias.double())
    assert (quantised(x).double() - expected).abs().max() <= 8 * torch.finfo(
        dtype
    ).eps * expected.abs().max()


def test_offloaded_checkpoints_are_the_layers_inputs_and_change_no_gradient(monkeypatch):
    packed = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (packed.append(tuple(tensor.shape)), pack(tensor))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    gradients = []
    for offload in (False, True):
        policy = tiny_policy(gradient_checkpointing=True, offload_checkpoints=offload)
        batch = batch_of(policy)
        policy.logprobs(batch, TEMPERATURE)[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    tokens, patches = len(batch.input_ids), len(batch.pixel_values)
    packed = [
        shape for shape in packed if shape != (0,)
    ]  # torch 2.11 saves an empty tensor beside each input
    assert packed == [(patches, 64)] * 2 + [(1, tokens, 128)] * 3
