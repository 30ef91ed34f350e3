"""Running layers again in the backward pass changes no bit of loss and gradients."""

import pytest
import torch

from mr1_fast.model.forward import add_deepstack
from mr1_fast.model.recompute import Carry, run_layers

from ..data.models import fill_adapters, gradients, tiny_policy
from .test_forward import packed_logprobs, weighted

SETTINGS = [
    {},
    {"family": "qwen2_5_vl"},
    {"family": "qwen3_vl"},
    {"family": "qwen3"},
    {"lora": True, "lora_rank": 4},
    {"family": "qwen3_vl", "lora": True, "lora_rank": 4},
    {"fused_layers": False},
    {"dtype": torch.bfloat16},
]


def loss_and_gradients(policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = weighted(packed_logprobs(policy))
    return loss.detach(), gradients(policy, loss)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_bits_whatever_is_recomputed(settings):
    policy = tiny_policy(**settings)
    if settings.get("lora"):
        fill_adapters(policy, torch.float32)
    run, depth = policy.layers, 9
    loss, expected = loss_and_gradients(policy)
    for run.recompute_text, run.recompute_vision in ((depth, depth), (1, 0), (0, 1)):
        again, ours = loss_and_gradients(policy)
        assert torch.equal(again, loss)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_dropout_drops_the_same_again():
    policy = tiny_policy(lora=True, lora_rank=4)
    fill_adapters(policy, torch.float32)
    for module in policy.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    results = []
    for policy.layers.recompute_text in (0, 9):
        torch.manual_seed(7)
        results.append(loss_and_gradients(policy))
    (loss, expected), (again, ours) = results
    assert torch.equal(again, loss)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_recomputed_layer_keeps_the_sum_of_its_inputs_alone():
    """Bytes that are saved for the backward, of layers that multiply by weights of their own.

    After two of them a feature is added to some rows.
    """
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(3)]

    def layer(weight, residual, update, remember=None, again=False):
        hidden = residual if update is None else residual + update
        if remember is not None:
            remember(hidden)
        return hidden, (hidden @ weight).tanh()

    layers = [lambda *a, weight=weight, **k: layer(weight, *a, **k) for weight in weights]
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel():  # not the rows of features
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    x, feature, rows = torch.randn(8, 32), torch.randn(2, 32), torch.tensor([1, 5])

    def after(index: int, carry: Carry) -> Carry:
        return add_deepstack(carry, rows, feature) if index < 2 else carry

    results = []
    for recomputed in (0, 3):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            residual, update = run_layers(layers, (x, None), recomputed, after=after)
            kept = len(saved)
        grads = torch.autograd.grad((residual + update).square().sum(), weights)
        results.append((kept, grads))
    (stored, expected), (recomputed, ours) = results
    assert recomputed == 0 < stored, "checkpointed layers save nothing through autograd"
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_without_gradients_nothing_is_kept():
    calls = []

    def layer(residual, update, remember=None, again=False):
        calls.append((remember, again))
        return residual, residual

    with torch.no_grad():
        run_layers([layer, layer], (torch.ones(2, 2), None), recomputed=2)
    assert calls == [(None, False)] * 2
