"""A prompt packed once for its group: loss and every gradient equal those of transformers' own repeated, padded rows.

The reference side shares nothing with ours: one row per completion with its prompt and its images again, padded,
through the model's own forward and attention; eager log-softmax; the equations in `policy_loss_ref`.
"""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.kernels.grpo.reference import policy_loss_ref
from mr1_fast.model import attention
from mr1_fast.packing import pack
from mr1_fast.segments import Gather, Segments
from mr1_fast.train import grpo_batch_loss, pack_rollout
from mr1_fast.types import Prompt, Rollout

from ..data.models import (
    assert_same_gradients,
    fill_adapters,
    gradients,
    mixed_examples,
    own_attention,
    own_logprobs,
    tiny_policy,
    wide_policy,
)

GROUPS = [(3, 1, 5, 0), (1, 4, 0, 2), (6, 1, 2, 3), (0, 5, 4, 1)]
"""Lengths of the completions of each of `mixed_examples`: empty ones and ones of one token among them."""
NAMES = ("text", "square", "wide", "two images")
BETA = 0.3
CONFIG = TrainConfig(temperature=0.7, clip_low=0.2, clip_high=0.3)
WHOLE = 10**6
LOSS = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How far losses may be apart, relatively; in fp32, of sums of terms of both signs."""
GRADIENT = {torch.float64: 3e-7, torch.float32: 2e-5}
"""The same of a gradient's largest entry. A model in fp64 has this much because Qwen2-VL's RMSNorm rounds to fp32."""


def rollout(policy, chosen: list[int], groups=GROUPS) -> Rollout:
    """Random completions of the chosen examples."""
    examples = [mixed_examples()[i] for i in chosen]
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
            logp, advantages.flatten().repeat_interleave(lengths).to(logp.dtype), weights.to(logp.dtype), beta=BETA,
            old_logp=old.to(logp.dtype), ref_logp=ref.to(logp.dtype), clip_low=CONFIG.clip_low,
            clip_high=CONFIG.clip_high,
        )  # fmt: skip
        assert 0 < clipped.sum() < len(clipped), "the clip acts on some tokens and not on others"
        loss = per_token.sum()
        return loss.detach(), gradients(policy, loss), {"old_logp": old, "ref_logp": ref}


def shared(
    policy, drawn: Rollout, advantages, row_data: dict, budget: int
) -> tuple[torch.Tensor, dict, int]:
    """Loss and gradients of what `grpo_step` does, and how many packs there were."""
    batches = pack_rollout(drawn, advantages, budget)
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
    trained = {
        name for name, parameter in policy.model.named_parameters() if parameter.requires_grad
    }
    pictured = any(prompt.num_image_tokens for prompt in drawn.prompts)
    assert trained - ours.keys() == {name for name in trained if "visual" in name and not pictured}
    return count


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(torch.float64)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [3, 0, 1, 2]], ids=[*NAMES, "mixed"])
def test_loss_and_every_gradient(policy, chosen):
    assert assert_equal(policy, rollout(policy, chosen)) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"lora": True, "lora_rank": 4}, {"family": "qwen2_5_vl"}], ids=str
)
def test_groups_split_over_packs(settings, checkpointing):
    policy = tiny_policy(torch.float64, gradient_checkpointing=checkpointing, **settings)
    if settings.get("lora"):
        fill_adapters(policy, torch.float64)
    assert assert_equal(policy, rollout(policy, [3, 0, 1, 2]), budget=80) > 4, (
        "some group is in two packs"
    )


def test_at_the_widths_of_the_2b():
    policy = wide_policy(torch.float32)
    assert assert_equal(policy, rollout(policy, [1], [(), (5, 1, 0)])) == 1


# --- the pieces ---------------------------------------------------------------------------------------------------


def test_gather_is_index_select_with_its_gradient():
    rows, x = (
        torch.tensor([4, 0, 4, 4, 2]),
        torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True),
    )
    gather = Gather(rows, 6)
    assert torch.equal(gather(x), x[rows])
    torch.autograd.gradcheck(gather, (x,))
    incoming = torch.randn(5, 3, 2, dtype=torch.float64)
    expected = torch.autograd.grad(x[rows], x, incoming)
    torch.testing.assert_close(torch.autograd.grad(gather(x), x, incoming), expected)


def test_gather_sums_bf16_gradients_in_fp32():
    """A prompt's keys are taken by each of its completions; 64 bf16 additions one after the other lose bits.

    torch's index_select does as well on a CPU, but adds by atomics in bf16 on a GPU.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.arange(20)] * 64)
    incoming = torch.randn(len(rows), 2, 32, generator=generator).bfloat16()
    exact = incoming.double().view(64, 20, 2, 32).sum(0)

    def error(take) -> torch.Tensor:
        x = torch.zeros(20, 2, 32, dtype=torch.bfloat16, requires_grad=True)
        return (torch.autograd.grad(take(x), x, incoming)[0].double() - exact).abs()

    ours, theirs = error(Gather(rows, 20)), error(lambda x: x.index_select(0, rows))
    assert (ours <= 2**-8 * exact.abs()).all(), "one rounding to bf16, of the sum"
    assert ours.max() <= theirs.max()


def segments_of(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[Segments, torch.Tensor]:
    """Segments of groups of (prompt length, completion lengths), and who sees whom, (T, T) bool, by naming tokens."""
    prompts = [
        Prompt(torch.zeros(n, dtype=torch.int64), torch.zeros(3, n, dtype=torch.int64), n)
        for n, _ in groups
    ]
    completions = [torch.zeros(n, dtype=torch.int64) for _, lengths in groups for n in lengths]
    segments = pack(prompts, completions, list(range(len(completions)))).segments
    names = []  # (group, completion or −1 for the prompt, position)
    for group, (length, lengths) in enumerate(groups):
        names += [(group, -1, i) for i in range(length)]
        names += [(group, c, length + i) for c, n in enumerate(lengths) for i in range(n - 1)]
    sees = [[q[0] == k[0] and k[1] in (-1, q[1]) and k[2] <= q[2] for k in names] for q in names]
    return segments, torch.tensor(sees)


SHAPES = {
    "groups of several lengths": [(3, (4, 1, 3)), (1, (2, 0, 6)), (5, (3, 3, 3))],
    "prompts alone": [(3, (1, 0, 1)), (4, (1, 1, 0))],
    "one of each": [(2, (5,))],
}


@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES)
def test_rectangles_show_what_a_dense_mask_shows(groups):
    segments, expected = segments_of(groups)
    slots = []  # of each padded query: the packed token that it holds, and the tokens that it sees
    for rectangle in segments.padded.rectangles:
        count, length_q, length_k = rectangle.shape
        visible = rectangle.visible
        if visible is None:
            visible = (
                torch.ones(length_q, length_k, dtype=torch.bool).tril().expand(count, 1, -1, -1)
            )
        queries, keys = (
            rectangle.queries.rows.view(count, length_q),
            rectangle.keys.rows.view(count, length_k),
        )
        slots += [
            (queries[s, q].item(), keys[s][visible[s, 0, q]].tolist())
            for s in range(count)
            for q in range(length_q)
        ]
        added = rectangle.mask(torch.float64)
        assert added is None or (
            torch.equal(added == 0, visible) and torch.equal(added == -torch.inf, ~visible)
        )
    for token, slot in enumerate(segments.padded.unpad.rows.tolist()):
        holds, sees = slots[slot]
        assert holds == token
        assert sorted(sees) == expected[token].nonzero().flatten().tolist(), f"token {token}"
    assert token + 1 == len(expected)


@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES)
def test_segments_aligned_at_the_end_show_what_a_dense_mask_shows(groups):
    """What a variable-length function makes of cu_seqlens and gathered keys, token by token."""
    segments, expected = segments_of(groups)
    bounds_q, bounds_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    assert bounds_q[-1] == len(expected) and bounds_k[-1] == len(segments.key_rows)
    for a, (start, stop) in enumerate(pairwise(bounds_q)):
        keys = segments.key_rows[bounds_k[a] : bounds_k[a + 1]].tolist()
        for token in range(start, stop):
            sees = keys[: len(keys) - (stop - token - 1)]
            assert sorted(sees) == expected[token].nonzero().flatten().tolist(), f"token {token}"
    assert (
        segments.max_q == segments.cu_seqlens_q.diff().max()
        and segments.max_k == segments.cu_seqlens_k.diff().max()
    )


# --- variable-length back ends ------------------------------------------------------------------------------------


def reference_varlen(query, key, value, cu_q, cu_k, max_q, max_k, causal: bool, scale: float):
    """Attention of each segment on its own, causal masks aligned at the end, as flash-attn and torch document it."""
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
def use_backend(monkeypatch):
    """`use_backend(name, function)`: packed attention takes this back end, whose package's function is `function`."""

    def use(name: str, function=None):
        if name == "flash_attn":
            monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
        elif function is not None:
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        monkeypatch.setattr(attention, "backend", lambda device, dtype: name)
        attention._varlen.cache_clear()

    yield use
    attention._varlen.cache_clear()


@pytest.mark.parametrize(
    "backend",
    [
        ("flash_attn",),
        ("torch_varlen", fake_varlen_attn),
        ("torch_varlen", fake_varlen_attn_without_gqa),
    ],
    ids=("flash_attn", "torch", "torch without enable_gqa"),
)
def test_variable_lengths_equal_sdpa(policy, backend, use_backend):
    drawn = rollout(policy, [3, 0, 1, 2])
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    n = sum(map(len, drawn.completions))
    row_data = {"ref_logp": torch.linspace(-7, -5, n), "old_logp": torch.linspace(-5, -7, n)}
    loss, expected, _ = shared(policy, drawn, advantages, row_data, WHOLE)
    use_backend(*backend)
    through_varlen, ours, _ = shared(policy, drawn, advantages, row_data, WHOLE)
    torch.testing.assert_close(through_varlen, loss, rtol=LOSS[torch.float64], atol=0)
    assert_same_gradients(ours, expected, GRADIENT[torch.float64])


@pytest.mark.parametrize("vision", [False, True])
def test_torchs_varlen_attn_takes_what_it_is_handed(vision, use_backend):
    """On meta tensors, which is as far as it goes without a GPU."""
    use_backend("torch_varlen")
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
