"""The packed forward pass equals transformers' own, sequence by sequence, with all gradients."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2VLConfig

from mr1_fast.loss import linear_token_logprobs
from mr1_fast.model import forward
from mr1_fast.model.families import FAMILIES, text_model, text_positions
from mr1_fast.model.forward import lm_head_weight, packed_hidden, text_angles
from mr1_fast.model.reference import Reference
from mr1_fast.packing import pack, packs

from ..data.models import (
    assert_same_gradients,
    examples_for,
    fill_adapters,
    gradients,
    mixed_examples,
    own_attention,
    own_logprobs,
    plain_inputs,
    tiny_policy,
)

LENGTHS = (3, 1, 5, 0, 4, 2, 6, 3)  # two completions of each of four prompts, one of them empty


def completions(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 300, (length,), generator=generator) for length in LENGTHS]


def packed_logprobs(policy, budget: int = 10**6) -> torch.Tensor:
    prompts = [policy.encode(example) for example in examples_for(policy)]
    batches = packs(prompts, completions(len(policy.processor.tokenizer)), budget)
    return torch.cat([policy.logprobs(batch, temperature=0.7)[0] for batch in batches])


def plain_logprobs(policy) -> torch.Tensor:
    """Compute each sequence alone, by the model's own forward pass."""
    examples = [examples_for(policy)[index // 2] for index in range(len(LENGTHS))]
    pairs = zip(examples, completions(len(policy.processor.tokenizer)), strict=True)
    return torch.cat(
        [own_logprobs(policy, [example], [ids], 0.7) for example, ids in pairs if len(ids)]
    )


def weighted(logp: torch.Tensor) -> torch.Tensor:
    """Return a sum in which no two tokens have the same weight."""
    return (logp * torch.linspace(-1, 1, len(logp), dtype=logp.dtype)).sum()


@pytest.mark.parametrize(
    "settings",
    [
        *({"family": family} for family in FAMILIES),
        {"recompute": "all"},
        {"lora": True, "lora_rank": 4},
        {"lora": True, "lora_rank": 4, "recompute": "all"},
        {"family": "qwen3_vl", "lora": True, "lora_rank": 4, "recompute": "all"},
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()),
)
def test_packed_equals_the_models_own_forward(settings):
    policy = tiny_policy(torch.float64, **settings)
    if settings.get("lora"):
        fill_adapters(policy, torch.float64)
    with own_attention(policy):
        expected = plain_logprobs(policy)
        expected_gradients = gradients(policy, weighted(expected))
    logp = packed_logprobs(policy)
    torch.testing.assert_close(logp, expected, rtol=1e-9, atol=1e-9)
    # Norms round to fp32: two in a layer, and two more where queries and keys have their own.
    has_more = hasattr(text_model(policy.model).layers[0].self_attn, "q_norm")
    allowed = 6e-7 if has_more else 3e-7
    assert_same_gradients(gradients(policy, weighted(logp)), expected_gradients, allowed)


def test_many_packs_equal_one():
    policy = tiny_policy(torch.float64)
    one, many = packed_logprobs(policy), packed_logprobs(policy, budget=100)
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)
    expected = gradients(policy, weighted(one))
    for name, gradient in gradients(policy, weighted(many)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)


def test_deepstack_features_matter(monkeypatch):
    """So the equality with transformers' forward would be lost without them."""
    policy = tiny_policy(family="qwen3_vl")
    with_them = packed_logprobs(policy)
    monkeypatch.setattr(forward, "add_deepstack", lambda carry, *_: carry)
    assert (packed_logprobs(policy) - with_them).abs().max() > 0.1


def test_qwen3_vl_turns_pairs_of_channels_by_interleaved_axes():
    """Pair k turns with time, height, width, time, …; in Qwen2-VL each axis has a section."""
    text = text_model(tiny_policy(family="qwen3_vl").model)
    sections = text.config.rope_parameters["mrope_section"]
    assert sections == [6, 5, 5]
    positions = torch.tensor([[3, 7], [50, 20], [400, 90]])
    frequencies = 10_000.0 ** -(torch.arange(16) / 16)
    turned = positions[:, :, None] * frequencies  # (3, T, pairs)
    interleaved = torch.stack([turned[k % 3 if k < 15 else 0, :, k] for k in range(16)], dim=1)
    in_sections = torch.cat([part[axis] for axis, part in enumerate(turned.split(sections, 2))], 1)
    angles = text_angles(text, torch.ones(2, 128), positions)
    for found, function in zip(angles, (torch.cos, torch.sin), strict=True):
        torch.testing.assert_close(found, function(interleaved).repeat(1, 2))
        assert (found - function(in_sections).repeat(1, 2)).abs().max() > 0.1


def test_stale_rope_deltas_do_not_reach_the_packed_forward():
    policy = tiny_policy()
    before = packed_logprobs(policy)
    policy.model.model.rope_deltas = torch.tensor([[-1000], [500]])
    assert torch.equal(packed_logprobs(policy), before)


def test_only_completion_rows_reach_the_head():
    policy = tiny_policy()
    prompts = [policy.encode(example) for example in mixed_examples()]
    batch = pack(prompts, completions(0), list(range(8)))
    assert packed_hidden(policy.model, batch).shape == (
        sum(LENGTHS),
        lm_head_weight(policy.model).shape[1],
    )


def test_all_completions_empty_gives_no_rows_and_a_backward():
    policy = tiny_policy()
    prompts = [policy.encode(mixed_examples()[1])]
    batch = pack(prompts, [torch.zeros(0, dtype=torch.int64)] * 2, [0, 1])
    logp, entropy = policy.logprobs(batch, 1.0)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_stays_where_the_policy_started(lora):
    policy = tiny_policy(lora=lora, lora_rank=4)
    start = packed_logprobs(policy)
    reference = Reference(policy)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and (not lora or "lora_B" in name):
                parameter.add_(0.05)
    prompts = [policy.encode(example) for example in mixed_examples()]
    batch = pack(prompts, completions(0), list(range(8)))
    torch.testing.assert_close(reference.logprobs([batch], 0.7)[0], start, rtol=1e-5, atol=1e-5)
    assert (policy.logprobs(batch, 0.7)[0] - start).abs().max() > 1e-2


def test_chunked_head_equals_the_whole_one():
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 37, (50,))

    def run(chunk_bytes: int) -> list[torch.Tensor]:
        logp, entropy = linear_token_logprobs(hidden, weight, targets, 0.8, chunk_bytes=chunk_bytes)
        return [logp, entropy, *torch.autograd.grad((logp + 0.1 * entropy).sum(), (hidden, weight))]

    for chunked, expected in zip(run(7 * 37 * 8), run(2**30), strict=True):
        torch.testing.assert_close(chunked, expected)


@pytest.mark.parametrize("chosen", [[0], [0, 0], [3, 0, 1, 2], [2, 2]])
def test_examples_encoded_together_are_each_by_itself(chosen):
    policy = tiny_policy()
    examples = [mixed_examples()[index] for index in chosen]
    for prompt, example in zip(policy.encode.many(examples), examples, strict=True):
        alone, inputs = policy.encode(example), plain_inputs(policy, example)
        for name, value in vars(alone).items():
            assert (
                torch.equal(getattr(prompt, name), value)
                if isinstance(value, torch.Tensor)
                else (getattr(prompt, name) == value)
            ), name
        assert torch.equal(prompt.input_ids, inputs["input_ids"][0])
        if example.images:
            assert torch.equal(prompt.pixel_values, inputs["pixel_values"])
            grid, kinds = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
            places, _ = policy.model.model.get_rope_index(
                inputs["input_ids"], kinds, image_grid_thw=grid
            )
            assert torch.equal(prompt.position_ids, places[:, 0])


# --- fused operators ------------------------------------------------------------------------------


def test_without_fused_operators_layers_are_transformers_own():
    """The numbers are those of the language model's own forward, bit for bit."""
    policy = tiny_policy(fused_layers=False)
    prompts = [policy.encode(mixed_examples()[0])]
    batch = pack(prompts, completions(0)[:2], [0, 1])
    text = policy.model.model.language_model
    own = text(
        inputs_embeds=text.embed_tokens(batch.input_ids)[None],
        position_ids=batch.position_ids.unsqueeze(1),
        attention_mask={"full_attention": None},
        use_cache=False,
        segments=batch.segments,
    )
    assert torch.equal(policy.hidden(batch), own.last_hidden_state[0][batch.loss_rows])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_no_less_exact_than_transformers(family, dtype):
    """Loss and every gradient, against the same weights in fp64."""

    def measured(dtype: torch.dtype, fused: bool):
        policy = tiny_policy(dtype, family, fused_layers=fused)
        if dtype == torch.float64:
            policy.model.load_state_dict(rounded)
        logp = packed_logprobs(policy)
        return logp.double().detach(), gradients(policy, weighted(logp.double()))

    rounded = tiny_policy(dtype, family).model.state_dict()
    exact, exact_gradients = measured(torch.float64, fused=False)
    ours, our_gradients = measured(dtype, fused=True)
    eager, eager_gradients = measured(dtype, fused=False)
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-12
    assert our_gradients.keys() == exact_gradients.keys()
    for name, right in exact_gradients.items():
        error, allowed = (
            (each[name].double() - right).norm() for each in (our_gradients, eager_gradients)
        )
        assert error <= 2 * allowed + 1e-7 * right.norm(), name


def test_the_axes_of_positions_are_told_by_the_decoders_class():
    """A config.json may say qwen2 of the decoder of a Qwen2-VL."""
    named = {"model_type": "qwen2", "hidden_size": 64}
    of_images, of_text = Qwen2VLConfig(text_config=named).text_config, Qwen2Config()
    assert of_images.model_type == of_text.model_type == "qwen2"
    for config, shape in ((of_images, (3, 1, 5)), (of_text, (1, 5))):
        text = SimpleNamespace(config=config)
        assert text_positions(text, torch.zeros(3, 5)).shape == shape
