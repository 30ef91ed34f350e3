"""The engine against transformers' generate and the training forward, on a GPU if there is one."""

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mr1_fast.config import ModelConfig, TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.model.families import FAMILIES, auto_class, banned_tokens, base_model, text_model
from mr1_fast.model.load import make_policy
from mr1_fast.model.tiny import family_config, family_processor
from mr1_fast.packing import pack
from mr1_fast.rollout.cache import token_bytes
from mr1_fast.rollout.decoder import DecoderLayer
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.graphs import GRAPH_ROWS
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.stages import add_logprobs, grpo_batch_loss, pack_rollout

from ..data.models import (
    examples_for,
    fill_adapters,
    mixed_examples,
    plain_inputs,
    quantise,
    tiny_policy,
    wide_policy,
)
from ..data.runs import stage_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROWS = 256 if DEVICE == "cuda" else 64
"""Largest graph that is tried: on a CPU there are none, and the time goes by rows."""


def engine_of(policy) -> Engine:
    """Make an engine on the tests' device."""
    policy.model.to(DEVICE)
    return Engine(policy.model, policy.processor, policy.encode)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(torch.float64 if DEVICE == "cpu" else torch.float32)


@pytest.fixture(scope="module")
def engine(policy):
    return engine_of(policy)


def own_generate(policy, example, **settings) -> list[int]:
    """Continue an example by transformers' generate."""
    inputs = {name: value.to(DEVICE) for name, value in plain_inputs(policy, example).items()}
    model = base_model(policy.model)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if banned := list(banned_tokens(model.config)):
        settings["suppress_tokens"] = banned
    else:
        del inputs["mm_token_type_ids"]  # which a model of text alone does not know
    eos = policy.processor.tokenizer.eos_token_id
    output = model.generate(**inputs, do_sample=False, eos_token_id=eos, **settings)
    if banned:
        model.model.rope_deltas = None
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def policy_of(family: str, dtype: torch.dtype = torch.float32, **settings):
    """Make a tiny policy of a family; the norms of heads, where it has them, are uneven."""
    policy = tiny_policy(dtype, family=family, **settings)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 4.0)
    return policy


def lists(rollout) -> list[list[int]]:
    return [ids.tolist() for ids in rollout.completions]


def training_logprobs(policy, rollout, temperature: float = 1.0) -> torch.Tensor:
    indices = list(range(len(rollout.completions)))
    batch = pack(rollout.prompts, rollout.completions, indices)
    with torch.no_grad():
        return policy.logprobs(batch.to(DEVICE), temperature)[0].cpu()


# --- equal to transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_over_mixed_prompts(family):
    policy = policy_of(family, torch.float64 if DEVICE == "cpu" else torch.float32)
    examples = examples_for(policy)
    rollout = engine_of(policy).generate(examples, 1, Sampling(12, temperature=0.0))
    expected = [own_generate(policy, example, max_new_tokens=12) for example in examples]
    assert lists(rollout) == expected


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_without_the_norms_of_heads_greedy_differs_from_generate(family, monkeypatch):
    policy, read = policy_of(family), DecoderLayer.of
    assert all(read(layer).head_norms for layer in text_model(policy.model).layers)
    monkeypatch.setattr(DecoderLayer, "of", lambda layer: replace(read(layer), head_norms=None))
    examples = examples_for(policy)
    rollout = engine_of(policy).generate(examples, 1, Sampling(12, temperature=0.0))
    expected = [own_generate(policy, example, max_new_tokens=12) for example in examples]
    assert lists(rollout) != expected


def test_heads_may_be_wider_than_the_hidden_states():
    """Qwen3 4B has 32 heads of 128 channels, and hidden states of 2,560."""
    processor = family_processor(FAMILIES["qwen3"])
    config = family_config(processor, FAMILIES["qwen3"])
    config.head_dim *= 2
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).double()
    policy = make_policy(model, processor, ModelConfig(device="cpu", recompute="none"))
    engine, examples = engine_of(policy), examples_for(policy)
    rollout = engine.generate(examples, 2, Sampling(6, temperature=0.0))
    expected = [own_generate(policy, example, max_new_tokens=6) for example in examples]
    assert lists(rollout) == [ids for ids in expected for _ in range(2)]
    pool = engine._decoder.pool
    text = text_model(model)
    assert text.layers[0].self_attn.o_proj.in_features == 2 * config.hidden_size
    assert token_bytes(text) * pool.layout.tokens == pool.keys.nbytes + pool.values.nbytes


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_greedy_equals_generate_at_the_2bs_widths(family):
    policy = wide_policy(torch.float32, family)
    engine = engine_of(policy)
    rollout = engine.generate(mixed_examples()[2:], 2, Sampling(6, temperature=0.0))
    expected = [own_generate(policy, example, max_new_tokens=6) for example in mixed_examples()[2:]]
    assert lists(rollout) == [ids for ids in expected for _ in range(2)]
    logp = training_logprobs(policy, rollout)
    torch.testing.assert_close(torch.cat(rollout.logprobs), logp.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "count", sorted({n for rows in GRAPH_ROWS if rows <= MOST_ROWS for n in (rows, rows + 1)})
)
def test_any_number_of_samples_in_flight_gives_the_same(policy, engine, count):
    example = mixed_examples()[1]
    rollout = engine.generate([example], count, Sampling(5, temperature=0.0))
    assert lists(rollout) == [own_generate(policy, example, max_new_tokens=5)] * count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "lora", "nf4", "nf4 and lora"])
def test_groups_of_any_size_equal_generate(kind, family):
    policy = policy_of(family, lora="lora" in kind)
    if "lora" in kind:
        fill_adapters(policy, torch.float32)
    if "nf4" in kind:
        pytest.importorskip("bitsandbytes")
        quantise(policy, torch.float32)
    engine, greedy, examples = engine_of(policy), Sampling(8, temperature=0.0), examples_for(policy)
    expected = [own_generate(policy, example, max_new_tokens=8) for example in examples]
    # On both sides of a block of rows that read a prefix together; then with samples that wait
    budgets = {1: None, 2: None, 7: None, 8: None, 9: None, 16: None, 5: 200}
    for group, cache_tokens in budgets.items():
        rollout = engine.generate(examples, group, greedy, cache_tokens=cache_tokens)
        assert lists(rollout) == [ids for ids in expected for _ in range(group)], group
    logp = training_logprobs(policy, rollout)
    torch.testing.assert_close(torch.cat(rollout.logprobs), logp.float(), atol=1e-4, rtol=0)


def test_a_repetition_penalty_equals_generates(policy, engine):
    settings = dict(max_new_tokens=10, repetition_penalty=1.3)
    rollout = engine.generate(mixed_examples(), 2, Sampling(**settings, temperature=0.0))
    expected = [own_generate(policy, example, **settings) for example in mixed_examples()]
    assert lists(rollout) == [ids for ids in expected for _ in range(2)]
    assert lists(rollout) != lists(
        engine.generate(mixed_examples(), 2, Sampling(10, temperature=0.0))
    )


# --- equal to training --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"family": "qwen2_vl", "lora": True}, *({"family": each} for each in FAMILIES)],
    ids=str,
)
@pytest.mark.parametrize(
    "filters", [{}, dict(top_p=0.7, top_k=40, min_p=0.01, repetition_penalty=1.2)], ids=str
)
def test_logprobs_are_those_of_training(settings, filters):
    policy = policy_of(**settings)
    if "lora" in settings:
        fill_adapters(policy, torch.float32)
    rollout = engine_of(policy).generate(
        examples_for(policy), 3, Sampling(9, temperature=0.8, **filters), seed=1
    )
    expected = training_logprobs(policy, rollout, 0.8)
    torch.testing.assert_close(torch.cat(rollout.logprobs), expected, atol=1e-4, rtol=0)
    assert len({tuple(ids) for ids in lists(rollout)}) > 9, "samples of a group must differ"


@pytest.mark.parametrize("four_bit", [False, True], ids=["", "4bit"])
def test_sixteen_and_four_bits_are_close_to_training(four_bit):
    policy = tiny_policy(torch.bfloat16)
    if four_bit:
        pytest.importorskip("bitsandbytes")
        quantise(policy, torch.bfloat16)
    rollout = engine_of(policy).generate(mixed_examples(), 4, Sampling(12), seed=1)
    gap = (torch.cat(rollout.logprobs) - training_logprobs(policy, rollout)).abs()
    assert gap.mean() < 0.03 and gap.max() < 0.3


def test_greedy_logprobs_are_at_temperature_1(policy, engine):
    rollout = engine.generate(mixed_examples(), 1, Sampling(6, temperature=0.0))
    torch.testing.assert_close(
        torch.cat(rollout.logprobs), training_logprobs(policy, rollout).float(), atol=1e-4, rtol=0
    )


def test_prompts_are_encoded_as_the_policy_computes_its_layers():
    for fused, expected in ((True, []), (False, [1, 1])):
        policy, calls = tiny_policy(torch.float64, fused_layers=fused), []
        engine = Engine(policy.model, policy.processor, policy.encode, policy.layers)
        layer = policy.model.model.language_model.layers[0]
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        drawn = engine.generate(mixed_examples(), 2, Sampling(8), prefill_tokens=100)
        assert bool(calls) == (not fused) and calls[:2] == expected
        if fused:
            first = lists(drawn)
    assert lists(drawn) == first


def test_new_weights_count_at_once_and_nothing_stays_on_the_model():
    policy = tiny_policy(recompute="all")
    engine = engine_of(policy)
    policy.model.train()
    before = engine.generate(mixed_examples(), 2, Sampling(8))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    after = engine.generate(mixed_examples(), 2, Sampling(8))
    assert lists(after) != lists(before)
    assert lists(after) == lists(engine_of(policy).generate(mixed_examples(), 2, Sampling(8)))
    assert policy.model.training
    assert policy.model.model.rope_deltas is None


def test_new_adapters_count_at_once_and_so_does_turning_them_off():
    policy = tiny_policy(torch.float32, lora=True)
    fill_adapters(policy, torch.float32)
    engine, greedy = engine_of(policy), Sampling(8, temperature=0.0)

    def sampled() -> list[list[int]]:
        return lists(engine.generate(mixed_examples(), 2, greedy))

    first = sampled()
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    second = sampled()
    with policy.model.disable_adapter():
        third = sampled()
    assert len({str(tokens) for tokens in (first, second, third)}) == 3
    assert second == lists(engine_of(policy).generate(mixed_examples(), 2, greedy)) == sampled()
    policy.model.merge_adapter()
    assert sampled() == second
    policy.model.unmerge_adapter()


# --- who runs when ------------------------------------------------------------------------------


def test_a_small_cache_makes_samples_wait_and_changes_none(engine):
    engine.release()
    whole = engine.generate(mixed_examples(), 5, Sampling(10), seed=3)
    longest = max(len(prompt.input_ids) for prompt in whole.prompts)
    for budget in (1 + longest + 10, 1 + longest + 30, 1 + 3 * longest + 70):
        small = engine.generate(
            mixed_examples(), 5, Sampling(10), seed=3, cache_tokens=budget, prefill_tokens=64
        )
        assert engine._decoder.pool.keys.shape[1] <= budget
        assert lists(small) == lists(whole) and small.reasons == whole.reasons
    with pytest.raises(
        UserError, match=rf"has {longest} tokens .* max_new_tokens = 10, .* room for {longest + 10}"
    ):
        engine.generate(mixed_examples(), 5, Sampling(10), cache_tokens=longest + 10)


def test_a_seed_repeats_the_samples_and_another_does_not(engine):
    runs = [
        lists(engine.generate(mixed_examples(), 2, Sampling(8), seed=seed)) for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_sample_does_not_depend_on_what_runs_beside_it(engine):
    together = lists(engine.generate(mixed_examples(), 3, Sampling(8), seed=2))
    alone = lists(engine.generate(mixed_examples()[:1], 3, Sampling(8), seed=2))
    assert together[:3] == alone


# --- ends ---------------------------------------------------------------------------------------


def test_completions_end_at_eos_at_a_stop_text_or_at_the_limit():
    policy = tiny_policy()
    tokenizer = policy.processor.tokenizer
    head, eos = base_model(policy.model).lm_head, tokenizer.eos_token_id
    stop = tokenizer.convert_tokens_to_ids("</answer>")
    with torch.no_grad():  # an untrained model hardly ever ends by itself
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[eos] = head.weight[stop] = head.weight.mean(0) * 3
    rollout = engine_of(policy).generate(mixed_examples(), 16, Sampling(20, stop=["</answer>"]))
    assert set(rollout.reasons) == {"eos", "stop", "length"}
    assert rollout.finished == [reason != "length" for reason in rollout.reasons]
    for ids, text, reason in zip(lists(rollout), rollout.texts, rollout.reasons, strict=True):
        assert eos not in ids[:-1] and stop not in ids[:-1]
        assert reason == {eos: "eos", stop: "stop"}.get(ids[-1], "length")
        assert len(ids) == 20 or reason != "length"
        assert text.endswith("</answer>") == (reason == "stop")


def test_every_id_that_the_model_ends_with_ends_a_completion():
    policy = tiny_policy()
    engine = engine_of(policy)
    other = policy.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    plain = lists(engine.generate(mixed_examples(), 4, Sampling(12), seed=1))
    chosen = plain[0][3]
    policy.model.generation_config.eos_token_id = [other, chosen]
    cut = engine.generate(mixed_examples(), 4, Sampling(12), seed=1)
    assert lists(cut) == [ids[: ids.index(chosen) + 1] if chosen in ids else ids for ids in plain]
    assert cut.reasons == ["eos" if chosen in ids else "length" for ids in plain]


def test_a_model_need_not_say_what_ends_a_completion():
    policy = tiny_policy()
    engine = engine_of(policy)
    eos = policy.processor.tokenizer.eos_token_id
    for config in (GenerationConfig(), None):
        policy.model.generation_config = config
        ends = engine._ends(Sampling())
        assert ends(0, np.array([eos])) == "eos" and ends(0, np.array([eos - 1])) is None


def test_a_stop_text_may_span_tokens_and_end_within_one(engine, policy):
    plain = engine.generate(mixed_examples(), 1, Sampling(12, temperature=0.0))
    tokenizer = policy.processor.tokenizer
    for ids, text in zip(lists(plain), plain.texts, strict=True):
        stop = text[2 : len(text) // 2]
        assert stop
        first = next(n for n in range(1, 13) if stop in tokenizer.decode(ids[:n]))
        ends = Engine._ends(engine, Sampling(stop=[stop]))
        reasons = [ends(0, torch.tensor(ids[:n]).numpy()) for n in range(1, first + 1)]
        assert reasons == [None] * (first - 1) + ["stop"]


def test_placeholders_are_never_sampled_and_nothing_comes_from_the_generation_config():
    policy = tiny_policy()
    config = policy.model.config
    banned = {config.image_token_id, config.video_token_id}
    with torch.no_grad():  # make the placeholders by far the likeliest tokens
        head = base_model(policy.model).lm_head
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[list(banned)] *= 100
    engine = engine_of(policy)
    rollout = engine.generate(mixed_examples(), 20, Sampling(4))
    assert not banned & {token for ids in lists(rollout) for token in ids}
    policy.model.generation_config.update(
        top_k=1, temperature=0.01, repetition_penalty=5.0, do_sample=False
    )
    assert lists(engine.generate(mixed_examples(), 20, Sampling(4))) == lists(rollout)


def test_nothing_to_do(engine):
    assert lists(engine.generate([], 3)) == []
    rollout = engine.generate(mixed_examples(), 2, Sampling(0))
    assert lists(rollout) == [[]] * 8
    assert rollout.texts == [""] * 8 and rollout.reasons == ["length"] * 8
    assert lists(engine.generate(mixed_examples(), 0)) == []
    assert [len(ids) for ids in lists(engine.generate(mixed_examples(), 2, Sampling(1)))] == [1] * 8


@pytest.mark.parametrize("layer", [0, 2])
def test_nan_logits_end_the_rollout_with_the_way_out(layer):
    policy = tiny_policy()
    with torch.no_grad():
        text_model(policy.model).layers[layer].mlp.up_proj.weight[3] = math.nan
    with pytest.raises(UserError, match=r"logits are NaN after 0 tokens .* earlier checkpoint"):
        engine_of(policy).generate(mixed_examples(), 2, Sampling(4))


def test_nan_on_the_way_ends_the_rollout_too():
    policy = tiny_policy()
    engine, head = engine_of(policy), base_model(policy.model).lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # not the embedding's
    ids = lists(engine.generate(mixed_examples()[:1], 1, Sampling(8), seed=1))[0]
    prompt = policy.encode(mixed_examples()[0]).input_ids.tolist()
    chosen = next(n for n in range(1, 7) if ids[n] not in (*ids[:n], *prompt))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[ids[chosen]] = math.nan
    with pytest.raises(UserError, match=f"logits are NaN after {chosen + 1} tokens"):
        engine.generate(mixed_examples()[:1], 1, Sampling(8), seed=1)


BAD = {
    "temperature": math.inf,
    "top_p": 0.0,
    "top_k": -1,
    "min_p": 1.0,
    "repetition_penalty": 0.0,
    "stop": [""],
}


@pytest.mark.parametrize("name", [*BAD, "max_new_tokens"])
def test_settings_that_mean_nothing(engine, name):
    with pytest.raises(UserError, match="num_generations is -1"):
        engine.generate([], -1)
    with pytest.raises(UserError, match=f"^{name} is .*, but must"):
        engine.generate([], 1, Sampling(**{name: BAD.get(name, -1)}))


def test_an_engines_memory_is_free_when_it_is_gone(policy):
    """Memory that waits for the garbage collector would lie beside the update's, so it must not."""
    gc.disable()
    try:
        engine = engine_of(policy)
        engine.generate(mixed_examples(), 2, Sampling(4))
        pool = weakref.ref(engine._decoder.pool)
        del engine
        assert pool() is None
    finally:
        gc.enable()


# --- in training --------------------------------------------------------------------------------


def test_training_uses_the_rollouts_logprobs_and_weighs_what_they_are_off_by():
    policy = tiny_policy()
    rollout = engine_of(policy).generate(mixed_examples(), 2, Sampling(6), seed=1)
    off = torch.linspace(-1, 1, sum(map(len, rollout.completions)))
    lengths = [len(ids) for ids in rollout.completions]
    rollout.logprobs = [a + b for a, b in zip(rollout.logprobs, off.split(lengths), strict=True)]
    config = TrainConfig(updates_per_batch=2)
    batches = pack_rollout(rollout, torch.ones(4, 2), 10_000, config)
    (batch,) = batches
    add_logprobs(stage_run(policy, config, 10_000), batches)
    assert torch.equal(batch.row_data["old_logp"], torch.cat(rollout.logprobs))
    assert "is_weights" not in batch.row_data
    _, metrics = grpo_batch_loss(policy, batch.to(DEVICE), 0.0, config)
    for name in ("rollout_gap_mean", "rollout_gap_max"):
        torch.testing.assert_close(metrics[name].values.cpu(), off.abs(), atol=1e-4, rtol=0)

    # The clip of a ratio per sequence is narrower than what the rollout is off by.
    own = torch.cat(rollout.logprobs) - off
    add_logprobs(stage_run(policy, replace(config, ratio="sequence"), 10_000), batches)
    torch.testing.assert_close(batch.row_data["old_logp"].cpu(), own, atol=1e-4, rtol=0)
    assert "is_weights" not in batch.row_data

    add_logprobs(stage_run(policy, replace(config, importance_cap=1.5), 10_000), batches)
    torch.testing.assert_close(
        batch.row_data["is_weights"].cpu(), (-off).exp().clamp(max=1.5), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        batch.row_data["old_logp"].cpu(), torch.cat(rollout.logprobs) - off, atol=1e-4, rtol=0
    )
    weighed, _ = grpo_batch_loss(policy, batch.to(DEVICE), 0.0, config)
    lengths = torch.tensor(lengths)
    means = (-off).exp().clamp(max=1.5) / lengths.repeat_interleave(lengths)
    expected = -means.sum() / len(lengths)
    torch.testing.assert_close(weighed.detach().cpu(), expected, atol=1e-4, rtol=0)
