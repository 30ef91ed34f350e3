"""Layers with adapters: equal to peft's own, computed again or not, and in how many operations."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mr1_fast.kernels.layers.strides import require_adjacent
from mr1_fast.model import block_parts, blocks, forward
from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.families import base_model, text_model, vision_tower
from mr1_fast.model.forward import packed_hidden, text_angles, text_layer, vision_layer
from mr1_fast.model.policy import Policy
from mr1_fast.model.recompute import run_layers
from mr1_fast.model.reference import Reference
from mr1_fast.model.save import save_pretrained
from mr1_fast.model.vision import BlockCall, begin_patches
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


# --- families with norms of heads, and GELU by a tanh ---------------------------------------------

HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


def one_layer(policy: Policy, kind: str, fused: bool = True, again: bool = False):
    """Return the output of a layer on drawn hidden states, and the gradients by name."""
    model, generator = policy.model, torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    if kind == "text":
        text = text_model(model)
        batch = pack([policy.encode(mixed_examples()[0])], completions(0)[:2], [0, 1])
        tokens, module = len(batch.input_ids), text.layers[0]
        angles = text_angles(text, random(tokens, 1), batch.position_ids)
        layer = text_layer(module, angles, batch.segments, fused)
    else:
        module = vision_tower(model).blocks[0]
        tokens, width = 24, module.attn.head_dim
        angles = tuple(random(tokens, width).float() for _ in range(2))
        bounds = torch.tensor([0, 8, 24], dtype=torch.int32)
        told = dict(cu_seqlens=bounds, max_seqlen=16, position_embeddings=angles)
        layer = vision_layer(BlockCall(module, told), fused)
    norm = module.input_layernorm if kind == "text" else module.norm1
    x = random(tokens, len(norm.weight)).requires_grad_()
    carry = run_layers([layer], (x, None), 1 if again else 0)
    hidden = sum(each for each in carry if each is not None)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    incoming = random(*hidden.shape)
    found = torch.autograd.grad(hidden, [x, *trained.values()], incoming)
    return hidden.detach(), dict(zip(["x", *trained], found, strict=True))


@pytest.mark.parametrize("kind, lora", [("text", False), ("text", True), ("vision", False)])
def test_a_layer_of_qwen3_equals_its_module(kind, lora, monkeypatch):
    """Output and every gradient, computed again or not."""
    policy = (adapted_policy if lora else tiny_policy)(torch.float64, family="qwen3_vl")
    theirs = one_layer(policy, kind, fused=False)
    monkeypatch.setattr(forward, "_run_module", None)
    for again in (False, True):
        ours = one_layer(policy, kind, again=again)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-7)
        # Norms of transformers round to fp32, also in the backward pass
        assert_same_gradients(ours[1], theirs[1], 1e-6)
        norms = [name for name in ours[1] if name.endswith(HEAD_NORMS)]
        assert len(norms) == (2 if kind == "text" and not lora else 0)


@pytest.mark.parametrize("width", [1024, 1152])
def test_a_vision_block_of_real_width_equals_its_module(width):
    """The towers of Qwen3-VL's 4B and 8B have 16 heads, of 64 and 72 channels."""
    policy = tiny_policy(torch.float64, family="qwen3_vl")
    tower = vision_tower(policy.model)
    config = copy.deepcopy(tower.config)
    config.hidden_size, config.num_heads, config.intermediate_size = width, 16, 80
    tower.blocks[0] = type(tower.blocks[0])(config).double()
    assert block_parts.vision_block(tower.blocks[0]) is not None
    assert_equals_its_module(policy, "vision")


@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads_need_not_have_the_hidden_states_width_together(head_dim, no_module_runs):
    policy = tiny_policy(torch.float64, family="qwen3")
    text = text_model(policy.model)
    config = copy.deepcopy(text.config)
    assert config.hidden_size != config.num_attention_heads * head_dim
    config.head_dim = head_dim
    text.layers[0] = type(text.layers[0])(config, 0).double()
    text.rotary_emb = type(text.rotary_emb)(config)
    assert_equals_its_module(policy, "text")


def assert_equals_its_module(policy: Policy, kind: str) -> None:
    """Compare a layer in fp64 with transformers' module: its output and every gradient."""
    ours, theirs = (one_layer(policy, kind, fused=fused) for fused in (True, False))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-7)
    # Norms of transformers round to fp32, also in the backward pass
    assert_same_gradients(ours[1], theirs[1], 1e-6)


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_qwen3_is_no_less_exact_than_its_module(dtype, kind):
    policy = tiny_policy(dtype, "qwen3_vl")
    ours, eager = (one_layer(policy, kind, fused=fused) for fused in (True, False))
    policy.model.double()
    exact = one_layer(policy, kind, fused=False)
    for name, right in {"hidden": exact[0], **exact[1]}.items():
        error, allowed = (
            ({"hidden": found[0], **found[1]}[name].double() - right).norm()
            for found in (ours, eager)
        )
        assert error <= 2 * allowed + 1e-7 * right.norm(), name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_the_norms_of_heads_count(family, no_module_runs):
    policy = tiny_policy(family=family)
    right, _ = one_layer(policy, "text")
    for part in ("q", "k"):
        attention = text_model(policy.model).layers[0].self_attn
        with torch.no_grad():
            getattr(attention, f"{part}_norm").weight[::2] *= 1.5
        changed, _ = one_layer(policy, "text")
        assert (changed - right).abs().max() > 1e-3
        right = changed


def test_heads_of_an_unknown_kind_are_left_to_the_module():
    layer = text_model(tiny_policy(family="qwen3").model).layers[0]
    assert block_parts.text_block(layer) is not None
    layer.self_attn.k_norm.variance_epsilon = 1e-3
    assert block_parts.text_block(layer) is None
    layer.self_attn.k_norm.variance_epsilon = layer.self_attn.q_norm.variance_epsilon
    layer.self_attn.q_norm.double()
    assert block_parts.text_block(layer) is None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_kernels_get_gradients_with_adjacent_columns(family, monkeypatch):
    """A sum's gradient is one number, expanded: no kernel on a GPU takes that."""
    policy = tiny_policy(family=family)
    visual, text = policy.model.model.visual, policy.model.model.language_model
    batch = batch_of(policy)
    patches, calls = begin_patches(visual, batch.pixel_values, batch.image_grid_thw)
    tokens = text.embed_tokens(batch.input_ids)
    angles = text_angles(text, tokens, batch.position_ids)

    for name in ("norm_backward", "rotary_backward", "norm_rotary_backward"):
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
