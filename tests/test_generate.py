import math

import pytest
import torch

from mr1_fast.model.forward import base_model
from mr1_fast.packing import pack
from mr1_fast.rollout.generate import Sampling, _sample, generate, roll_out

from .models import mixed_examples, plain_inputs, tiny_policy


def decode(policy, examples, generations=1, generator=None, **sampling):
    prompts = [policy.encode(example) for example in examples]
    eos = policy.processor.tokenizer.eos_token_id
    return generate(policy.model, prompts, generations, Sampling(**sampling), eos, generator)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_greedy_equals_transformers_generate_over_mixed_prompts(family):
    policy = tiny_policy(torch.float64, family=family)
    ours = decode(policy, mixed_examples(), max_new_tokens=12, temperature=0.0)
    for example, tokens in zip(mixed_examples(), ours, strict=True):
        inputs = plain_inputs(policy, example)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        config = policy.model.config
        output = policy.model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=policy.processor.tokenizer.eos_token_id,
            suppress_tokens=[config.image_token_id, config.video_token_id],
        )
        assert tokens.tolist() == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_samples_of_a_group_share_their_prompt_only():
    policy = tiny_policy()
    completions = decode(policy, mixed_examples(), 6, torch.Generator().manual_seed(0), max_new_tokens=8)
    assert len(completions) == 24
    assert len({tuple(c.tolist()) for c in completions}) > 20, "samples of a group must differ"


def test_a_seed_repeats_the_samples_and_another_does_not():
    policy = tiny_policy()
    runs = [
        decode(policy, mixed_examples(), 2, torch.Generator().manual_seed(seed), max_new_tokens=8) for seed in (5, 5, 6)
    ]
    same = [torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True)]
    other = [torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True)]
    assert all(same)
    assert not all(other)


def test_placeholders_are_never_sampled():
    policy = tiny_policy()
    config = policy.model.config
    banned = {config.image_token_id, config.video_token_id}
    with torch.no_grad():  # make the placeholders by far the likeliest tokens
        head = base_model(policy.model).lm_head
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[list(banned)] *= 100
    completions = decode(policy, mixed_examples(), 20, torch.Generator().manual_seed(0), max_new_tokens=4)
    assert not banned & {token for completion in completions for token in completion.tolist()}


def test_nothing_is_inherited_from_the_models_generation_config():
    policy = tiny_policy()
    expected = decode(policy, mixed_examples(), 4, torch.Generator().manual_seed(0), max_new_tokens=6)
    policy.model.generation_config.update(top_k=1, temperature=0.01, repetition_penalty=5.0, do_sample=False)
    actual = decode(policy, mixed_examples(), 4, torch.Generator().manual_seed(0), max_new_tokens=6)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_completions_end_with_eos_or_at_the_limit():
    policy = tiny_policy()
    eos = policy.processor.tokenizer.eos_token_id
    examples = mixed_examples()
    prompts = [policy.encode(example) for example in examples]
    head = base_model(policy.model).lm_head
    with torch.no_grad():  # an untrained model hardly ever ends by itself
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[eos] = head.weight.mean(0) * 3
    rollout = roll_out(
        policy.model, policy.processor, examples, prompts, 16, Sampling(20), torch.Generator().manual_seed(0)
    )
    assert any(rollout.finished)
    for tokens, finished in zip(rollout.completions, rollout.finished, strict=True):
        assert (tokens[:-1] != eos).all()
        assert finished == (tokens[-1] == eos).item()
        assert finished or len(tokens) == 20


def test_no_prompts_and_no_new_tokens():
    policy = tiny_policy()
    assert decode(policy, [], max_new_tokens=4) == []
    assert [len(c) for c in decode(policy, mixed_examples(), 2, max_new_tokens=0)] == [0] * 8


def test_leaves_the_model_as_it_was():
    policy = tiny_policy(gradient_checkpointing=True)
    policy.model.train()
    decode(policy, mixed_examples(), max_new_tokens=3)
    assert policy.model.training
    assert policy.model.model.rope_deltas is None


def test_sampled_tokens_follow_the_policy_that_the_loss_sees():
    """The log-prob of greedy tokens under the training forward is the row's maximum."""
    policy = tiny_policy(torch.float64)
    examples = mixed_examples()
    completions = decode(policy, examples, max_new_tokens=6, temperature=0.0)
    prompts = [policy.encode(example) for example in examples]
    batch = pack(prompts, completions, [0, 1, 2, 3])
    from mr1_fast.model.forward import lm_head_weight, packed_hidden

    logits = packed_hidden(policy.model, batch) @ lm_head_weight(policy.model).T
    config = policy.model.config
    logits[:, [config.image_token_id, config.video_token_id]] = -math.inf
    assert torch.equal(logits.argmax(-1), batch.targets)


def test_temperature_and_top_p_draw_from_the_right_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    draws = _sample(logits, Sampling(1, temperature=0.5), generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(draws, torch.softmax(logits[0] / 0.5, -1), atol=0.012, rtol=0)
    # 0.644 + 0.237 < 0.9 < 0.644 + 0.237 + 0.087: the third token crosses top_p and stays, the fourth goes
    draws = _sample(logits, Sampling(1, top_p=0.9), generator).bincount(minlength=4) / 20_000
    kept = torch.softmax(logits[0, :3], -1)
    assert draws[3] == 0
    torch.testing.assert_close(draws[:3], kept, atol=0.012, rtol=0)


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_prompts_in_parts_give_the_same_greedy_rollout(at_once):
    policy = tiny_policy(torch.float64)
    prompts = [policy.encode(example) for example in mixed_examples()]
    arguments = (policy.model, policy.processor, mixed_examples(), prompts, 2, Sampling(6, temperature=0.0))
    whole, parts = roll_out(*arguments), roll_out(*arguments, prompts_at_once=at_once)
    assert parts.texts == whole.texts and len(parts.texts) == 8


def test_rows_that_go_on_alone_are_what_they_were():
    """Greedy rows that end at different steps: what is left after others ended equals each prompt by itself."""
    policy = tiny_policy(torch.float64)
    eos = policy.processor.tokenizer.eos_token_id
    free = decode(policy, mixed_examples(), max_new_tokens=12, temperature=0.0)
    ends = free[0][2].item()  # some rows have this token, some have not: it takes the part of EOS
    prompts = [policy.encode(example) for example in mixed_examples()]
    sampling = Sampling(12, temperature=0.0)
    together = generate(policy.model, prompts, 3, sampling, ends)
    alone = [generate(policy.model, [prompt], 1, sampling, ends)[0] for prompt in prompts]
    assert len({len(ids) for ids in alone}) > 1 and ends != eos
    assert all(torch.equal(ids, alone[row // 3]) for row, ids in enumerate(together))


def test_a_token_of_probability_0_is_not_drawn_where_sums_fall(monkeypatch):
    """As on CUDA, whose sums are not monotone: here the sum rises at an impossible token."""
    logits = torch.tensor([[0.0, -math.inf, 0.0]]).repeat(200, 1)
    uneven = torch.tensor([[0.4, 0.5, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: uneven.expand_as(self).contiguous())
    drawn = _sample(logits, Sampling(1), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 2}
