"""Layers with adapters: equal to peft's own, computed again or not, and in how many operations."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mr1_fast.kernels.layers.strides import require_adjacent
from mr1_fast.model import block_parts, blocks
from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.families import base_model, text_model
from mr1_fast.model.forward import packed_hidden, text_angles, text_layer, vision_layer
from mr1_fast.model.policy import Policy
from mr1_fast.model.recompute import run_layers
from mr1_fast.model.reference import Reference
from mr1_fast.model.save import save_pretrained
from mr1_fast.model.vision import begin_patches
from mr1_fast.packing import pack

from ..data.models import assert_same_gradients, gradients, mixed_examples, tiny_policy
from .test_forward import completions, packed_logprobs, weighted


def adapted_policy(dtype: torch.dtype = torch.float32, rank: int = 4, **settings) -> Policy:
    """A policy with adapters that are not zero, in fp32 where the weights have 16 bits."""
    policy = tiny_policy(dtype, lora=True, lora_rank=rank, **settings)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.model.named_parameters():
        if dtype == torch.float64:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def batch_of(policy: Policy):
    prompts = [policy.encode(example) for example in mixed_examples()]
    return pack(prompts, completions(0), list(range(8)))


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_layers_with_adapters_equal_pefts_own(recompute, no_module_runs):
    policy = adapted_policy(torch.float64, recompute=recompute)
    logp = packed_logprobs(policy)
    ours = gradients(policy, weighted(logp))
    policy.layers.fused = False
    expected = packed_logprobs(policy)
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    # Qwen2-VL's RMSNorm rounds to fp32
    assert_same_gradients(ours, gradients(policy, weighted(expected)), 3e-7)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_adapters_are_no_less_exact_than_pefts(dtype, rank, no_module_runs):
    """Loss and every gradient, against the same numbers in fp64."""

    def measured(dtype: torch.dtype, fused: bool):
        policy = adapted_policy(dtype, rank, fused_layers=fused)
        policy.model.load_state_dict(rounded)
        logp = packed_logprobs(policy)
        return logp.double().detach(), gradients(policy, weighted(logp.double()))

    rounded = adapted_policy(dtype, rank).model.state_dict()
    exact, exact_gradients = measured(torch.float64, fused=False)
    ours, our_gradients = measured(dtype, fused=True)
    eager, eager_gradients = measured(dtype, fused=False)
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()
    assert our_gradients.keys() == exact_gradients.keys()
    for name, right in exact_gradients.items():
        assert our_gradients[name].dtype == eager_gradients[name].dtype
        error, allowed = (
            (each[name].double() - right).norm() for each in (our_gradients, eager_gradients)
        )
        assert error <= 2 * allowed, name


def test_without_adapters_the_policy_is_its_reference(no_module_runs):
    """Switched off, adapters cost no operation, and the numbers are the base model's."""
    policy = adapted_policy()
    batch = batch_of(policy)
    with policy.model.disable_adapter():
        block = block_parts.text_block(text_model(policy.model).layers[0])
    assert all(linears.adapters is None for linears in block.linears)
    ours = Reference(policy).logprobs([batch], 0.7)[0]
    plain = tiny_policy().logprobs(batch, 0.7)[0]
    assert torch.equal(ours, plain)
    assert (policy.logprobs(batch, 0.7)[0] - ours).abs().max() > 1e-2


def test_what_is_saved_is_what_runs(tmp_path):
    policy = adapted_policy()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    hidden = policy.hidden(batch_of(policy))
    hidden.sum().backward()
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    save_pretrained(policy, tmp_path)
    merged = type(base_model(policy.model)).from_pretrained(tmp_path)
    use_packed_attention(merged)
    again = packed_hidden(merged, batch_of(policy))
    torch.testing.assert_close(again, hidden, rtol=1e-4, atol=1e-5)


# --- operations -----------------------------------------------------------------------------------

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm_"}
VIEWS = {"empty", "empty_like", "new_empty", "detach", "alias"}


class Operations(TorchDispatchMode):
    """Count the operations that start a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if not function.is_view and name not in VIEWS:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def operations_per_layer(policy: Policy, recompute: bool) -> Counter:
    """Operations that one text layer adds to forward, recomputation and backward."""
    batch = batch_of(policy)
    text = text_model(policy.model)
    x = torch.randn(len(batch.input_ids), text.config.hidden_size, dtype=policy.model.dtype)
    angles = tuple(torch.randn(len(x), text.layers[0].self_attn.head_dim) for _ in range(2))
    trained = [p for p in text.parameters() if p.requires_grad]
    counts = []
    for depth in (1, 2):
        layers = [text_layer(layer, angles, batch.segments) for layer in text.layers[:depth]]
        with Operations() as operations:
            carry = run_layers(layers, (x.requires_grad_(), None), depth if recompute else 0)
            torch.autograd.grad(sum(each.sum() for each in carry), [x, *trained], allow_unused=True)
        counts.append(operations.count)
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    "recompute, products, casts", [(True, 35, 2), (False, 27, 1)], ids=["again", "kept"]
)
def test_adapters_add_few_operations(recompute, products, casts):
    """Beside their products, one each time that a layer runs, which casts all of its matrices.

    Forward, each of the four groups makes t and adds its runs of layers, of which q, k, v are two:
    4 + 5. So does recomputation, but for the MLP's last layer, which it leaves out: 3 + 4. Backward
    has dt and dB for each run, dA and dx for each group: 2·5 + 2·4, and after recomputation t of
    the layer that was left out.
    """
    plain = tiny_policy()
    plain.model.requires_grad_(False)
    added = operations_per_layer(adapted_policy(), recompute)
    added.subtract(operations_per_layer(plain, recompute))
    assert sum(added.pop(name, 0) for name in PRODUCTS) == products
    assert added.pop("_foreach_copy_") == casts
    assert not any(added.values())


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_cast_adapters_live_as_long_as_their_layer_needs_them(recompute, monkeypatch):
    policy, made = adapted_policy(torch.bfloat16, recompute=recompute), []
    of = block_parts.Linears.of
    monkeypatch.setattr(
        block_parts.Linears, "of", lambda *modules: (made.append(of(*modules)), made[-1])[1]
    )

    def cast() -> int:
        return sum(bool(each.adapters and each.adapters._cast) for each in made)

    batch = batch_of(policy)
    with torch.no_grad():
        policy.logprobs(batch, 0.7)
    assert made and cast() == 0
    logp = policy.logprobs(batch, 0.7)[0]
    assert cast() == (3 * 4 if recompute == "none" else 0), "three layers of four groups"
    logp.sum().backward()
    assert cast() == 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_kernels_get_gradients_with_adjacent_columns(family, monkeypatch):
    """A sum's gradient is one number, expanded: no kernel on a GPU takes that."""
    policy = tiny_policy(family=family)
    visual, text = policy.model.model.visual, policy.model.model.language_model
    batch = batch_of(policy)
    patches, calls = begin_patches(visual, batch.pixel_values, batch.image_grid_thw)
    tokens = text.embed_tokens(batch.input_ids)
    angles = text_angles(text, tokens, batch.position_ids)

    for name in ("norm_backward", "rotary_backward"):
        backward = getattr(blocks.fused, name)

        def checked(*arguments, backward=backward):
            require_adjacent(*(x for x in arguments if isinstance(x, torch.Tensor)))
            return backward(*arguments)

        monkeypatch.setattr(blocks.fused, name, checked)
    layers = {
        vision_layer(calls[0]): patches,
        text_layer(text.layers[0], angles, batch.segments): tokens,
    }
    for layer, hidden in layers.items():
        sum(each.sum() for each in layer(hidden, None)).backward()
    assert visual.blocks[0].norm1.weight.grad is not None
    assert text.layers[0].input_layernorm.weight.grad is not None
