"""A prompt packed once for its group gives the loss and the gradients of repeated, padded rows.

The reference shares nothing with the packed side. It has one padded row per completion, each with
its prompt and its images again. It uses the model's own forward pass and attention, an eager
log-softmax, and the equations in `policy_loss_ref`.
"""

import sys
from types import ModuleType

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.kernels.grpo.reference import policy_loss_ref
from mr1_fast.model import attention
from mr1_fast.model.families import FAMILIES
from mr1_fast.segments import Gather
from mr1_fast.stages import grpo_batch_loss, pack_rollout
from mr1_fast.types import Rollout

from ..data.models import (
    assert_same_gradients,
    examples_for,
    fill_adapters,
    gradients,
    own_attention,
    own_logprobs,
    tiny_policy,
    wide_policy,
)
from ..data.segments import SHAPES, segments_of

GROUPS = [(3, 1, 5, 0), (1, 4, 0, 2), (6, 1, 2, 3), (0, 5, 4, 1)]
"""Lengths of the completions of each of `mixed_examples`; some have no token or only one."""
NAMES = ("text", "square", "wide", "two images")
BETA = 0.3
CONFIG = TrainConfig(temperature=0.7, clip_low=0.2, clip_high=0.3)
WHOLE = 10**6
LOSS = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How far losses may be apart, relatively; they are sums of terms of both signs."""
GRADIENT = {torch.float64: 3e-7, torch.float32: 2e-5}
"""How far gradients may be apart, relative to the largest entry. It is this much for a model in
fp64 because Qwen2-VL's RMSNorm rounds to fp32."""


def rollout(policy, chosen: list[int], groups=GROUPS) -> Rollout:
    """Random completions of the chosen examples."""
    examples = [examples_for(policy)[i] for i in chosen]
    generator = torch.Generator().manual_seed(2)
    drawn = [
        [torch.randint(0, 300, (n,), generator=generator) for n in lengths] for lengths in groups
    ]
    completions = [ids for i in chosen for ids in drawn[i]]
    texts, reasons = [""] * len(completions), ["eos"] * len(completions)
    logprobs, prompts = (
        [torch.zeros(len(ids)) for ids in completions],
        [policy.encode(e) for e in examples],
    )
    return Rollout(examples, prompts, completions, texts, reasons, logprobs, len(groups[chosen[0]]))


def repeated_and_padded(policy, drawn: Rollout, advantages) -> tuple[torch.Tensor, dict, dict]:
    """Loss, gradients, and the old and reference log-probs that it was off policy with."""
    examples = [e for e in drawn.examples for _ in range(drawn.num_generations)]
    with own_attention(policy):
        logp = own_logprobs(policy, examples, drawn.completions, CONFIG.temperature)
        generator = torch.Generator().manual_seed(3)
        noise = [scale * torch.randn(len(logp), generator=generator) for scale in (0.4, 0.5)]
        old, ref = (logp.detach().float() + each for each in noise)
        lengths = torch.tensor([len(ids) for ids in drawn.completions])
        weights = torch.cat(
            [torch.full((n,), 1 / (max(1, n) * len(lengths))) for n in lengths.tolist()]
        )
        per_token, _, clipped, _ = policy_loss_ref(
            logp,
            advantages.flatten().repeat_interleave(lengths).to(logp.dtype),
            weights.to(logp.dtype),
            beta=BETA,
            old_logp=old.to(logp.dtype),
            ref_logp=ref.to(logp.dtype),
            clip_low=CONFIG.clip_low,
            clip_high=CONFIG.clip_high,
        )
        assert 0 < clipped.sum() < len(clipped), "the clip acts on some tokens and not on others"
        loss = per_token.sum()
        return loss.detach(), gradients(policy, loss), {"old_logp": old, "ref_logp": ref}


def shared(
    policy, drawn: Rollout, advantages, row_data: dict, budget: int
) -> tuple[torch.Tensor, dict, int]:
    """Loss and gradients of what `grpo_step` does, and how many packs there were."""
    batches = pack_rollout(drawn, advantages, budget, CONFIG)
    start, loss = 0, 0.0
    for batch in batches:
        rows = slice(start, start + len(batch.targets))
        batch.row_data.update({name: values[rows] for name, values in row_data.items()})
        loss = loss + grpo_batch_loss(policy, batch, BETA, CONFIG)[0]
        start = rows.stop
    return loss.detach(), gradients(policy, loss), len(batches)


def assert_equal(policy, drawn: Rollout, budget: int = WHOLE) -> int:
    advantages = torch.randn(
        len(drawn.prompts), drawn.num_generations, generator=torch.Generator().manual_seed(4)
    )
    expected, expected_gradients, row_data = repeated_and_padded(policy, drawn, advantages)
    loss, ours, count = shared(policy, drawn, advantages, row_data, budget)
    dtype = policy.model.dtype
    torch.testing.assert_close(loss, expected, rtol=LOSS[dtype], atol=0)
    assert_same_gradients(ours, expected_gradients, GRADIENT[dtype])
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    pictured = any(prompt.num_image_tokens for prompt in drawn.prompts)
    assert trained - ours.keys() == {name for name in trained if "visual" in name and not pictured}
    return count


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(torch.float64)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [3, 0, 1, 2]], ids=[*NAMES, "mixed"])
def test_loss_and_every_gradient(policy, chosen):
    assert assert_equal(policy, rollout(policy, chosen)) == 1


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize(
    "settings",
    [{"lora": True, "lora_rank": 4}, *({"family": family} for family in FAMILIES)],
    ids=str,
)
def test_groups_split_over_packs(settings, recompute):
    policy = tiny_policy(torch.float64, recompute=recompute, **settings)
    if settings.get("lora"):
        fill_adapters(policy, torch.float64)
    drawn = rollout(policy, [3, 0, 1, 2])
    budget = max(len(prompt.input_ids) for prompt in drawn.prompts) + 6
    assert assert_equal(policy, drawn, budget) > 4, "some group is in two packs"


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_widths_of_published_models(family):
    policy = wide_policy(torch.float32, family)
    assert assert_equal(policy, rollout(policy, [1], [(), (5, 1, 0)])) == 1


# --- kernels for variable lengths -----------------------------------------------------------------


def reference_varlen(query, key, value, cu_q, cu_k, max_q, max_k, causal: bool, scale: float):
    """Attend within each segment on its own, with causal masks aligned at the end.

    So flash-attn and torch document their functions.
    """
    assert (
        cu_q.dtype == cu_k.dtype == torch.int32
        and cu_q[-1] == len(query)
        and cu_k[-1] == len(key) == len(value)
    )
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(
                scores.shape[2] - scores.shape[1] + 1
            )
            scores = scores.masked_fill(future, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def fake_flash_attn() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, softmax_scale):
        return reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale)

    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def fake_varlen_attn(
    query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    return reference_varlen(query, key, value, cu_q, cu_k, max_q, max_k, causal, scale)


def fake_varlen_attn_without_gqa(
    query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size
):
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return fake_varlen_attn(
        query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size
    )


@pytest.fixture
def use_kernel(monkeypatch):
    """`use_kernel(name, function)`: packed attention takes this kernel, which is `function`."""

    def use(name: str, function=None):
        if name == "flash_attn":
            monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
        elif function is not None:
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        monkeypatch.setattr(attention, "attention_kernel", lambda device_type, dtype: name)
        attention._varlen.cache_clear()

    yield use
    attention._varlen.cache_clear()


@pytest.mark.parametrize(
    "kernel",
    [
        ("flash_attn",),
        ("torch_varlen", fake_varlen_attn),
        ("torch_varlen", fake_varlen_attn_without_gqa),
    ],
    ids=("flash_attn", "torch", "torch without enable_gqa"),
)
def test_variable_lengths_equal_sdpa(policy, kernel, use_kernel):
    drawn = rollout(policy, [3, 0, 1, 2])
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    n = sum(map(len, drawn.completions))
    row_data = {"ref_logp": torch.linspace(-7, -5, n), "old_logp": torch.linspace(-5, -7, n)}
    loss, expected, _ = shared(policy, drawn, advantages, row_data, WHOLE)
    use_kernel(*kernel)
    through_varlen, ours, _ = shared(policy, drawn, advantages, row_data, WHOLE)
    torch.testing.assert_close(through_varlen, loss, rtol=LOSS[torch.float64], atol=0)
    assert_same_gradients(ours, expected, GRADIENT[torch.float64])


@pytest.mark.parametrize("vision", [False, True])
def test_torchs_varlen_attn_takes_what_it_is_handed(vision, use_kernel):
    """On meta tensors, which is as far as it goes without a GPU."""
    use_kernel("torch_varlen")
    segments, _ = segments_of(SHAPES["groups of several lengths"])
    heads, kv_heads, total = 12, 12 if vision else 2, int(segments.cu_seqlens_q[-1])
    make = lambda h: torch.empty(1, h, total, 128, dtype=torch.bfloat16, device="meta")  # noqa: E731
    where = {"segments": segments.to("meta")}
    if vision:
        where = {"cu_seq_lens_q": segments.cu_seqlens_q.to("meta"), "max_length_q": segments.max_q}
    else:
        where["segments"].keys = Gather(
            segments.key_rows.to("meta"), total
        )  # `keys` would read a number off meta
    out, _ = attention.packed_attention(
        None, make(heads), make(kv_heads), make(kv_heads), None, scaling=0.1, **where
    )
    assert out.shape == (1, total, heads, 128) and out.dtype == torch.bfloat16
