"""Which way a decoded linear layer takes, and what a CUDA graph of it depends on."""

import torch

from mr1_fast.model.families import text_model
from mr1_fast.rollout.engine import describe_decoding
from mr1_fast.rollout.projection import KernelProjection, Projection, layer_of

from ..data.models import tiny_policy


def test_what_a_graph_holds_has_a_key():
    policy = tiny_policy(lora=True)
    layer = text_model(policy.model).layers[0]
    like = layer.input_layernorm.weight
    kinds = {
        "adapters": lambda: Projection((layer.self_attn.q_proj,)).key,
        "kernel": lambda: kernel_projection(layer.self_attn.q_proj, like).key,
    }
    for key in kinds.values():
        first = key()
        assert key() == first
        layer.self_attn.q_proj.scaling["default"] *= 2
        assert key() != first
        layer.self_attn.q_proj.scaling["default"] /= 2
        with policy.model.disable_adapter():
            assert key() != first
        policy.model.merge_adapter()
        assert key() != first
        policy.model.unmerge_adapter()
    first = kinds["kernel"]()
    b = layer.self_attn.q_proj.lora_B["default"]
    b.weight = torch.nn.Parameter(b.weight.detach().clone())
    assert kinds["kernel"]() != first


def kernel_projection(module: torch.nn.Module, like: torch.Tensor) -> KernelProjection:
    return KernelProjection((module, module), (layer_of(module, like.dtype),) * 2, like)


def test_how_layers_are_decoded_is_told():
    policy = tiny_policy(lora=True)
    layer = text_model(policy.model).layers[1]
    told = describe_decoding(policy.model.train())
    assert policy.model.training
    assert told.startswith("attention: ") and told.count(" · ") == 4
    assert "layers)" not in told
    layer.mlp.down_proj.use_dora["default"] = True
    assert "down: " in told and "module by module (1 layers)" in describe_decoding(policy.model)
