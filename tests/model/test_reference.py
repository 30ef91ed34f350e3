"""The place of the reference changes no number; 8 bits change them a little."""

import gc

import pytest
import torch
import torch.nn.functional as F

from mr1_fast import stages
from mr1_fast.config import TrainConfig
from mr1_fast.model import reference as reference_module
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.reference import Int8Linear, Reference, layers
from mr1_fast.optim import make_optimizer
from mr1_fast.packing import MicroBatches, packs
from mr1_fast.types import PackedBatch

from ..data.models import VISION_FAMILIES, examples_for, mixed_examples, tiny_policy
from ..data.runs import stage_run

TEMPERATURE = 0.7


def packs_of(policy, budget: int = 90, examples=None) -> list[PackedBatch]:
    """Pack two completions each of examples without images, with one, and with two."""
    examples = examples_for(policy) if examples is None else examples
    completions = [torch.tensor([5, 6, 7 + i]) for i in range(2 * len(examples))]
    return list(packs([policy.encode(e) for e in examples], completions, budget))


def one_pack(policy) -> PackedBatch:
    (batch,) = packs_of(policy, budget=10**6)
    return batch


def move(policy) -> None:
    """Train the policy a little."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- in host memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_layers", [True, False])
@pytest.mark.parametrize(
    "family, dtype",
    [
        *((family, torch.bfloat16) for family in FAMILIES),
        *((family, torch.float32) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
    ],
)
def test_offload_equals_resident_and_neither_moves_with_the_policy(dtype, family, fused_layers):
    policy = tiny_policy(dtype, family, fused_layers=fused_layers)
    several, text_only = packs_of(policy), packs_of(policy, examples=mixed_examples()[:1])
    with_images = [batch.pixel_values is not None for batch in several]
    assert len(several) > 2 and not all(with_images)
    assert any(with_images) == (family in VISION_FAMILIES)
    start = [policy.logprobs(batch, TEMPERATURE)[0] for batch in several]
    resident, offload = Reference(policy, "resident"), Reference(policy, "offload")
    move(policy)
    for some in (several, text_only, [one_pack(policy)], several[::-1]):
        assert_equal(offload.logprobs(some, TEMPERATURE), resident.logprobs(some, TEMPERATURE))
    assert_equal(resident.logprobs(several, TEMPERATURE), start)
    moved = torch.cat([policy.logprobs(batch, TEMPERATURE)[0] for batch in several])
    assert (moved - torch.cat(start)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_that_wait_in_host_memory_are_the_same(family, monkeypatch):
    policy = tiny_policy(torch.bfloat16, family)
    several = packs_of(policy)
    resident, offload = Reference(policy, "resident"), Reference(policy, "offload")
    monkeypatch.setattr(reference_module, "states_wait_on_device", lambda *_: False)
    assert_equal(offload.logprobs(several, TEMPERATURE), resident.logprobs(several, TEMPERATURE))


class CopiedBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that are copied out of a module's parameters."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.sources = {p.data_ptr() for p in module.parameters()}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copied = {"aten::copy_": args[1:2], "aten::_to_copy": args[:1]}.get(function.name(), ())
        self.count += sum(x.nbytes for x in copied if x.data_ptr() in self.sources)
        return function(*args, **(kwargs or {}))


def test_weights_cross_the_bus_once_whatever_the_number_of_packs():
    policy = tiny_policy()
    reference = Reference(policy, "offload")
    inner = reference.policy.model.model
    text = sum(p.nbytes for p in inner.language_model.layers.parameters())
    vision = sum(p.nbytes for p in inner.visual.blocks.parameters())
    for batches, expected in (
        (packs_of(policy), text + vision),
        (packs_of(policy, 110), text + vision),
        ([one_pack(policy)], text + vision),
        (packs_of(policy, examples=mixed_examples()[:1]), text),
    ):
        with CopiedBytes(reference.policy.model) as copied:
            reference.logprobs(batches, TEMPERATURE)
        # What is not in a layer is moved by `Tensor.to`, which copies nothing on a CPU.
        assert copied.count == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("waits_on_device", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_all_weights_once_and_computes_the_same(dtype, waits_on_device, monkeypatch):
    monkeypatch.setattr(reference_module, "states_wait_on_device", lambda *_: waits_on_device)
    policy = tiny_policy(dtype)
    policy.model.cuda()
    several = packs_of(policy)
    resident, offload = Reference(policy, "resident"), Reference(policy, "offload")
    expected = resident.logprobs(several, TEMPERATURE)
    before = torch.cuda.memory_allocated()
    for _ in range(3):  # a slot that is filled too early, or too late, shows at one time or another
        with CopiedBytes(offload.policy.model) as copied:
            assert_equal(offload.logprobs(several, TEMPERATURE), expected)
        assert copied.count == sum(p.nbytes for p in offload.policy.model.parameters())
    assert torch.cuda.memory_allocated() == before


def live_tensors() -> list[tuple]:
    gc.collect()
    # By type: a tensor that torch.compile has left behind in this process has a symbolic shape.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sorted((tuple(x.shape), str(x.dtype)) for x in tensors)


@pytest.mark.parametrize("fused_layers", [True, False])
@pytest.mark.parametrize("failing", [1, 4, 9])
def test_running_out_of_memory_in_a_layer_leaves_nothing_behind(failing, fused_layers, monkeypatch):
    """The first of these calls of attention are those of the two vision blocks."""
    policy = tiny_policy(fused_layers=fused_layers)
    reference, several = Reference(policy, "offload"), packs_of(policy)
    parameters = list(reference.policy.model.parameters())
    host = [p.data_ptr() for p in parameters]
    expected, before = reference.logprobs(several, TEMPERATURE), live_tensors()
    calls, attend = [], F.scaled_dot_product_attention

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no room")
        return attend(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", fail)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            reference.logprobs(several, TEMPERATURE)
    del raised
    assert len(calls) == failing
    assert [p.data_ptr() for p in parameters] == host
    assert live_tensors() == before
    assert_equal(reference.logprobs(several, TEMPERATURE), expected)


def test_after_running_out_of_memory_the_step_goes_on_with_smaller_packs(monkeypatch):
    policy = tiny_policy()
    config, said = TrainConfig(), []
    reference = Reference(policy, "offload")
    examples = mixed_examples()
    completions = [torch.tensor([5, 6, 7 + i]) for i in range(2 * len(examples))]
    prompts = [policy.encode(e) for e in examples]
    batches = MicroBatches(prompts, completions, 180)
    run = stage_run(policy, config, 180, said, reference=reference)
    calls, attend = [], F.scaled_dot_product_attention

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no room")
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    stages.add_logprobs(run, batches)
    assert len(said) == 1 and batches.tokens_per_pack == 90
    assert_equal(
        [batch.row_data["ref_logp"] for batch in batches],
        Reference(policy, "resident").logprobs(packs_of(policy), config.temperature),
    )


def test_no_room_for_the_ends_leaves_nothing_on_the_device(monkeypatch):
    policy = tiny_policy()
    reference, batch = Reference(policy, "offload"), one_pack(policy)
    expected = reference.logprobs([batch], TEMPERATURE)
    parameters = list(reference.policy.model.parameters())
    host, moved, to = [p.data_ptr() for p in parameters], [], torch.Tensor.to

    def second_fails(self, *args, **kwargs):
        if kwargs.get("non_blocking"):
            moved.append(self)
            if len(moved) == 2:
                raise torch.OutOfMemoryError("no room")
            return self.clone()
        return to(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            reference.logprobs([batch], TEMPERATURE)
    assert [p.data_ptr() for p in parameters] == host
    assert_equal(reference.logprobs([batch], TEMPERATURE), expected)


# --- what is shared with the policy ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["resident", "8bit", "offload"])
def test_what_is_not_trained_is_the_policys_own(place):
    policy = tiny_policy()
    policy.model.model.visual.requires_grad_(False)
    several = packs_of(policy)
    reference = Reference(policy, place)
    mine, its = (dict(p.model.named_parameters()) for p in (policy, reference.policy))
    assert {name for name in its if its[name] is mine[name]} == {
        name for name in mine if "visual" in name
    }
    shared = {p.data_ptr() for name, p in mine.items() if "visual" in name}
    assert all(p.data_ptr() not in shared for name, p in its.items() if "visual" not in name)

    start = [policy.logprobs(batch, TEMPERATURE)[0] for batch in several]
    before = reference.logprobs(several, TEMPERATURE)
    if place != "8bit":
        assert_equal(before, start)
    config = TrainConfig(learning_rate=1e-2)
    optimizer = make_optimizer(policy.model, config)
    torch.cat([policy.logprobs(batch, TEMPERATURE)[0] for batch in several]).sum().backward()
    optimizer.step()
    assert_equal(reference.logprobs(several, TEMPERATURE), before)
    moved = torch.cat([policy.logprobs(batch, TEMPERATURE)[0] for batch in several])
    assert (moved - torch.cat(start)).abs().max() > 1e-2


def test_a_shared_tower_neither_moves_nor_is_copied():
    policy = tiny_policy()
    policy.model.model.visual.requires_grad_(False)
    reference = Reference(policy, "offload")
    inner = reference.policy.model.model
    with CopiedBytes(reference.policy.model) as copied:
        reference.logprobs(packs_of(policy), TEMPERATURE)
    assert copied.count == sum(p.nbytes for p in inner.language_model.layers.parameters())
    streamed = {
        id(p) for ws in (reference.stream.others, *reference.stream.host.values()) for p, _ in ws
    }
    assert streamed == {id(p) for p in reference.policy.model.parameters()} - {
        id(p) for p in inner.visual.parameters()
    }


# --- in 8 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["resident", "8bit", "offload"])
def test_only_the_chosen_copy_is_made(monkeypatch, place):
    made = []
    for name in ("in_8_bits", "on_host"):
        make = getattr(reference_module, name)
        monkeypatch.setattr(
            reference_module,
            name,
            lambda *given, name=name, make=make: (made.append(name), make(*given))[1],
        )
    Reference(tiny_policy(), place)
    assert made == {"resident": [], "8bit": ["in_8_bits"], "offload": ["on_host"]}[place]


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bits_are_close_and_hold_a_quarter_of_the_layers_bytes(family):
    policy = tiny_policy(family=family)
    batch = one_pack(policy)
    reference = Reference(policy, "8bit")
    start = policy.logprobs(batch, TEMPERATURE)[0]
    error = (reference.logprobs([batch], TEMPERATURE)[0] - start).abs()
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
