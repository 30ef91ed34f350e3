"""A stream of batches against one call of the engine for each, on a GPU if there is one."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.rollout.schedule import Schedule
from mr1_fast.rollout.stream import Batch
from mr1_fast.types import Example

from ..data.models import mixed_examples, tiny_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(torch.float64 if DEVICE == "cpu" else torch.float32)
    policy.model.to(DEVICE)
    return policy


@pytest.fixture
def engine(policy):
    return engine_of(policy)


class Uneven(Engine):
    """An engine whose samples end after numbers of tokens that differ, by their first token."""

    def _ends(self, *arguments):
        return lambda sample, tokens: "stop" if len(tokens) > tokens[0] % 9 else None


def engine_of(policy, kind=Uneven) -> Engine:
    return kind(policy.model, policy.processor, policy.encode)


def batches() -> list[Batch]:
    """Make batches of one to three prompts; the third and the last have longer ones than before."""
    text, square, wide, pair = mixed_examples()
    parts = [[text, text], [text], [square, text, square], [], [square], [wide, pair], [text] * 3]
    return [Batch(examples, 10 + index) for index, examples in enumerate(parts)]


def assert_same(rollouts: list, expected: list) -> None:
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours.examples == theirs.examples and ours.num_generations == theirs.num_generations
        assert [ids.tolist() for ids in ours.completions] == [
            x.tolist() for x in theirs.completions
        ]
        assert (ours.texts, ours.reasons) == (theirs.texts, theirs.reasons)
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        for a, b in zip(ours.prompts, theirs.prompts, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)


def one_by_one(policy, group: int, sampling: Sampling) -> list:
    engine = engine_of(policy)
    return [engine.generate(each.examples, group, sampling, each.seed) for each in batches()]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"repetition_penalty": 1.3, "top_k": 50}], ids=str
)
@pytest.mark.parametrize("group", [1, 3])
def test_a_stream_gives_what_a_call_for_each_batch_gives(policy, group, settings):
    sampling = Sampling(8, **settings)
    expected = one_by_one(policy, group, sampling)
    assert len({len(ids) for each in expected for ids in each.completions}) > 1
    assert_same(list(engine_of(policy).stream(batches(), group, sampling)), expected)


def test_a_small_cache_and_packs_of_any_size_change_nothing(policy):
    sampling = Sampling(8)
    expected = one_by_one(policy, 3, sampling)
    longest = max(len(prompt.input_ids) for each in expected for prompt in each.prompts)
    for budget, pack in ((1 + longest + 8, 1), (1 + 2 * longest + 30, 100)):
        engine = engine_of(policy)
        assert_same(list(engine.stream(batches(), 3, sampling, budget, pack)), expected)
        assert engine._decoder.pool.layout.tokens <= budget


def test_nothing_to_sample(engine):
    for group, sampling in ((2, Sampling(0)), (0, Sampling(4))):
        rollouts = list(engine.stream(batches(), group, sampling))
        assert [each.reasons for each in rollouts] == [
            ["length"] * group * len(each.examples) for each in batches()
        ]
        assert engine._decoder is None, "no pool is made for nothing"
    assert list(engine.stream([])) == []
    with pytest.raises(UserError, match="num_generations is -1"):
        engine.stream(batches(), -1)


def test_samples_of_a_batch_run_beside_the_last_ones_of_the_batch_before(policy, monkeypatch):
    examples, beside = [mixed_examples()[0]] * 8, 0

    def next_step(schedule, original=Schedule.next_step):
        nonlocal beside
        step = original(schedule)
        prompts = (step.samples // 2).tolist()
        beside += len({prompt // 8 for prompt in prompts}) > 1
        assert [prompt for prompt, _ in itertools.groupby(prompts)] == sorted(set(prompts))
        return step

    monkeypatch.setattr(Schedule, "next_step", next_step)
    given = [Batch(examples, seed) for seed in range(4)]
    assert len(list(engine_of(policy).stream(given, 2, Sampling(8)))) == 4
    assert beside >= 3


def test_batches_are_taken_and_encoded_when_there_is_room(policy):
    engine, taken, encoded = engine_of(policy), [], []
    many = policy.encode.many

    def encode(examples):
        encoded.append(len(examples))
        return many(examples)

    def given():
        for seed in range(6):
            taken.append(seed)
            yield Batch(mixed_examples()[1:2], seed)

    engine.encode = SimpleNamespace(many=encode)
    stream = engine.stream(given(), 1, Sampling(8))
    assert not taken
    for done, rollout in enumerate(stream, 1):
        # One sample runs at a time, and the first pool is made with a look at the batch after.
        assert (len(taken), len(encoded)) == (max(2, done), done)
        assert rollout.prompts[0].pixel_values is None
    assert done == 6

    rollout = engine.generate(mixed_examples()[1:2], 1, Sampling(8))
    assert rollout.prompts[0].pixel_values is not None, "training encodes the prompts again"


def test_a_later_batch_that_is_larger_gets_a_larger_pool(policy, monkeypatch):
    text, _, _, pair = mixed_examples()
    rows = []

    def next_step(schedule, original=Schedule.next_step):
        step = original(schedule)
        rows.append(len(step.samples))
        return step

    monkeypatch.setattr(Schedule, "next_step", next_step)
    sizes = [[text], [text] * 8, [pair], [text] * 8]
    given = [Batch(examples, seed) for seed, examples in enumerate(sizes)]
    engine = engine_of(policy, Engine)
    assert len(list(engine.stream(given, 2, Sampling(8)))) == 4
    assert max(rows) == 16 and sum(count == 16 for count in rows) >= 2
    assert engine._decoder.pool.layout.sample_spans == 16, "a longer prompt keeps the rows"


# --- errors -------------------------------------------------------------------------------------


def test_a_prompt_that_fits_no_pool_is_an_error_at_its_turn(policy, engine):
    text, _, wide, _ = mixed_examples()
    room = len(policy.encode(text).input_ids) + 9
    stream = engine.stream(
        [Batch([text], 1), Batch([text], 2), Batch([wide])], 2, Sampling(8), room
    )
    found = [next(stream), next(stream)]
    with pytest.raises(UserError, match=rf"max_new_tokens = 8, .* room for {room}: shorten"):
        next(stream)
    expected = [engine.generate([text], 2, Sampling(8), seed) for seed in (1, 2)]
    assert_same(found, expected)


def test_a_prompt_that_cannot_be_encoded_is_an_error_at_its_turn(engine):
    text = mixed_examples()[0]
    damaged = Example("?", (Image.new("RGB", (1, 4000)),), "1", key="thin")
    given = [Batch([text, text], 1), Batch([text], 2), Batch([damaged]), Batch([text])]
    stream, found = engine.stream(given, 2, Sampling(8)), []
    with pytest.raises(UserError, match="thin"):
        found.extend(iter(lambda: next(stream), None))
    assert_same(found, [engine.generate(b.examples, 2, Sampling(8), b.seed) for b in given[:2]])


def test_an_error_while_batches_are_made_ends_the_stream(engine):
    def given():
        yield Batch(mixed_examples()[:1])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.stream(given(), 1, Sampling(8)))
    assert len(engine.generate(mixed_examples(), 1, Sampling(2)).completions) == 4


def test_a_users_error_while_batches_are_made_comes_at_its_turn(engine):
    def given():
        yield Batch(mixed_examples()[:1])
        raise UserError("row 7 is damaged")

    stream = engine.stream(given(), 1, Sampling(8))
    assert len(next(stream).completions) == 1
    with pytest.raises(UserError, match="row 7"):
        next(stream)


# --- between rollouts ---------------------------------------------------------------------------


def test_the_model_is_the_callers_between_rollouts_and_after_an_early_end():
    policy = tiny_policy()
    policy.model.to(DEVICE)
    engine, model, modes = engine_of(policy), policy.model, []
    model.lm_head.register_forward_hook(
        lambda *_: modes.append((model.training, torch.is_grad_enabled()))
    )
    model.train()
    stream = engine.stream(batches(), 2, Sampling(8))
    for _ in range(3):
        next(stream)
        assert model.training and torch.is_grad_enabled()
        assert next(model.parameters()).sum().requires_grad
    with pytest.raises(RuntimeError, match="another stream"):
        engine.generate(mixed_examples(), 1)
    stream.close()
    assert model.training and torch.is_grad_enabled()
    assert set(modes) == {(False, False)}
    after = engine.generate(mixed_examples(), 2, Sampling(8), seed=3)
    assert_same([after], [engine_of(policy).generate(mixed_examples(), 2, Sampling(8), seed=3)])


def test_an_abandoned_stream_lets_go_of_the_engine(policy):
    engine = engine_of(policy)
    stream = engine.stream(batches(), 2, Sampling(8))
    next(stream)
    held = sys.getrefcount(engine)
    del stream
    assert sys.getrefcount(engine) < held
    assert len(engine.generate(mixed_examples(), 1, Sampling(2)).completions) == 4
