"""Weights next to one another are one matrix to a product, and nothing else to anybody."""

import copy

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from mr1_fast.model.joined_weights import as_one, empty_joined, join_weights
from mr1_fast.model.layer_stream import layers
from mr1_fast.model.reference import Reference
from mr1_fast.model.save import save_pretrained
from mr1_fast.optim import make_optimizer

from ..data.models import fill_adapters, tiny_policy
from .test_forward import packed_logprobs, weighted


def groups(layer) -> list[list[torch.nn.Parameter]]:
    """The weights of a text layer that belong together; under adapters, too."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    )
    return [[getattr(m, "base_layer", m).weight for m in group] for group in modules]


def text_layers(policy):
    return [layer for layer in layers(policy.model) if hasattr(layer, "self_attn")]


@pytest.mark.parametrize("settings", [{}, {"lora": True}, {"family": "qwen2_5_vl"}], ids=str)
def test_a_policys_weights_are_joined(settings):
    policy = tiny_policy(**settings)
    for layer in text_layers(policy):
        for weights in groups(layer):
            assert torch.equal(as_one(weights), torch.cat([w.detach() for w in weights]))
    if settings.get("family"):
        mlp = policy.model.model.visual.blocks[0].mlp
        assert as_one([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None


def test_without_fused_layers_they_stay_where_they_are():
    layer = text_layers(tiny_policy(fused_layers=False))[0]
    assert all(as_one(weights) is None for weights in groups(layer))


def test_joining_changes_no_value_and_no_result_beyond_rounding():
    policy = tiny_policy()
    apart = copy.deepcopy(policy)
    for layer in text_layers(apart):
        assert all(as_one(weights) is None for weights in groups(layer))
    pairs = zip(policy.model.parameters(), apart.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(packed_logprobs(policy), packed_logprobs(apart))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_exact"])
def test_an_optimizers_step_keeps_them_joined(optimizer):
    policy = tiny_policy(torch.bfloat16)
    from mr1_fast.config import TrainConfig

    step = make_optimizer(policy.model, TrainConfig(optimizer=optimizer, learning_rate=0.1))
    before = groups(text_layers(policy)[0])[0][1].clone()
    weighted(packed_logprobs(policy).float()).backward()
    step.step()
    for layer in text_layers(policy):
        assert all(as_one(weights) is not None for weights in groups(layer))
    assert not torch.equal(groups(text_layers(policy)[0])[0][1], before)


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_holds_each_weight_by_itself(lora, tmp_path):
    policy = tiny_policy(lora=lora, lora_rank=4)
    if lora:
        fill_adapters(policy, torch.float32)
    save_pretrained(policy, tmp_path)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    expected = policy.model
    if lora:
        expected = copy.deepcopy(expected).merge_and_unload()
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(p.nbytes for p in loaded.parameters())


def test_a_resident_reference_has_joined_weights_of_its_own():
    policy = tiny_policy()
    frozen = Reference(policy, "resident").policy
    for ours, theirs in zip(text_layers(policy), text_layers(frozen), strict=True):
        for weights, others in zip(groups(ours), groups(theirs), strict=True):
            assert as_one(others) is not None
            assert weights[0].data_ptr() != others[0].data_ptr()


def test_joined_weights_that_a_reference_shares_stay_where_they_are():
    policy = tiny_policy(family="qwen2_5_vl", freeze_vision=True)
    mlp = policy.model.model.visual.blocks[0].mlp
    before = mlp.gate_proj.weight.data_ptr()
    frozen = Reference(policy, "resident").policy
    assert frozen.model.model.visual.blocks[0].mlp.gate_proj.weight is mlp.gate_proj.weight
    assert mlp.gate_proj.weight.data_ptr() == before


def test_what_is_allocated_for_a_layer_is_joined_where_all_of_a_group_is_wanted():
    layer = text_layers(tiny_policy(fused_layers=False))[0]
    like = [(p, p.data) for p in layer.parameters()]
    made = empty_joined(layer, like, torch.device("cpu"))
    assert [x.shape for x in made] == [p.shape for p, _ in like]
    by_parameter = {id(p): x for (p, _), x in zip(like, made, strict=True)}
    for weights in groups(layer):
        assert as_one([by_parameter[id(w)] for w in weights]) is not None

    q = groups(layer)[0][0]
    rest = [(p, p.data) for p in layer.parameters() if p is not q]
    assert len(empty_joined(layer, rest, torch.device("cpu"))) == len(rest)


def test_gaps_other_storages_and_other_orders_are_not_one():
    joined = torch.randn(6, 4)
    a, b, c = joined.split(2)
    assert torch.equal(as_one([a, b, c]), joined) and as_one([b, c]) is not None
    for parts in ([a, c], [b, a], [a, b.clone()], [a, b[:, :2]], [a, b.t()]):
        assert as_one(parts) is None
    join_weights([])
