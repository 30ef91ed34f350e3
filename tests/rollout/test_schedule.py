"""Who runs in which row: simulated without a model, with a device that is up to a step behind."""

from collections import deque

import numpy as np
import pytest

from mr1_fast.errors import UserError
from mr1_fast.rollout.cache import Layout
from mr1_fast.rollout.schedule import Results, Schedule
from mr1_fast.rollout.table import Columns

EOS = 9


class Device:
    """Gives n as the n-th token of a sample, or EOS; sees only tables, and checks them."""

    def __init__(self, lengths: np.ndarray, layout: Layout):
        self.lengths, self.previous = lengths, np.zeros(0, dtype=np.int64)
        self.layout = layout

    def launch(self, table: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = Columns(*table.T)
        previous = self.previous[columns.source] if len(self.previous) else 0
        before = np.where(columns.token >= 0, columns.token, previous)
        own_len = columns.own_len
        late = before == EOS  # rows of samples that ended while this step was on its way
        assert (late | (before == own_len - 1)).all(), (
            "every row goes on from its sample's last token"
        )
        assert len(set(columns.own_start)) == len(table), "no two rows write to one span"
        assert (own_len <= self.layout.sample_tokens).all()
        self.previous = np.where(own_len + 1 >= self.lengths[samples], EOS, own_len)
        return self.previous.copy(), -self.previous.astype(np.float32)


def simulate(
    lengths: np.ndarray,
    prompts: list[int],
    group: int,
    layout: Layout,
    ahead: int,
    most: int = 8,
    batch: int = 10_000,
    prefill_tokens: int = 40,
):
    """Run batches of `batch` prompts to the end.

    Returns the results of all samples, the schedule, how many rows each step had, and how many
    prompts were encoded at once.
    """
    ends = lambda sample, tokens: "eos" if tokens[-1] == EOS else None  # noqa: E731
    schedule = Schedule(group, most, ends)
    schedule.lay_out(layout)
    device, pending, rows, encoded = Device(lengths, layout), deque(), [], []
    starts, results = deque(range(0, len(prompts), batch)), Results([], [], [], 0)
    for _ in range(10_000):
        if found := schedule.take():
            for name in ("completions", "logprobs", "reasons"):
                getattr(results, name).extend(getattr(found, name))
        elif starts and schedule.wants_prompts:
            first = starts.popleft()
            numbers = range(first, min(first + batch, len(prompts)))
            # The random number of token n of sample i is 100 · i + n.
            uniform = 100 * np.arange(first * group, numbers.stop * group)[:, None] + np.arange(
                most
            )
            positions = [1000 * i for i in numbers]
            assert schedule.add(prompts[first : numbers.stop], positions, uniform) == numbers
        elif chosen := schedule.next_prompts(prefill_tokens):
            assert len(chosen) == 1 or sum(each.length for each in chosen) <= prefill_tokens
            encoded.append(len(chosen))
            samples = [each.prompt * group + i for each in chosen for i in range(group)]
            tokens = np.where(lengths[samples] == 1, EOS, 0)
            schedule.begin(chosen, tokens, np.zeros(len(samples), np.float32))
        else:
            step = schedule.next_step()
            held = [each.span for each in schedule.groups.values() if each.span >= 0]
            assert len(set(held)) == len(held) <= layout.prompt_spans, (
                "a prompt that is read keeps its span"
            )
            assert list(step.samples) == sorted(step.samples), "a prompt's rows are side by side"
            columns = Columns(*step.table.T)
            assert (step.uniform == 100 * step.samples + columns.own_len).all()
            assert (columns.position == 1000 * (step.samples // group) + columns.own_len - 1).all()
            for sample, start in zip(step.samples, columns.prefix_start, strict=True):
                if each := schedule.groups.get(sample // group):
                    assert start == layout.prompt_start(each.span)
            if len(step.samples):
                pending.append((step, device.launch(step.table, step.samples)))
                rows.append(len(step.samples))
            elif not pending:
                return results, schedule, rows, encoded
            if len(pending) > ahead or not len(step.samples):
                step, found = pending.popleft()
                schedule.record(step, *found)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_every_sample_runs_to_its_end(seed, ahead):
    generator = np.random.default_rng(seed)
    group, count = int(generator.integers(1, 5)), int(generator.integers(1, 9))
    lengths = generator.integers(1, 12, size=group * count)  # beyond 8: the limit
    prompts = generator.integers(1, 30, size=count).tolist()
    layout = Layout(
        int(generator.integers(1, count + 1)), max(prompts), int(generator.integers(1, 7)), 8
    )
    batch = int(generator.integers(1, count + 1))
    results, schedule, rows, _ = simulate(lengths, prompts, group, layout, ahead, batch=batch)
    expected = np.minimum(lengths, 8)
    assert [len(ids) for ids in results.completions] == expected.tolist()
    assert results.reasons == ["eos" if n <= 8 else "length" for n in lengths]
    for sample, n in enumerate(expected):
        last = [EOS] if lengths[sample] <= 8 else [n - 1]
        tokens = [*range(n - 1), *last]
        assert results.completions[sample].tolist() == tokens
        assert results.logprobs[sample].tolist() == [0, *(-token for token in tokens[1:])]
    least = (expected - 1).sum()
    assert least <= sum(rows) <= least + ahead * len(lengths), (
        "no more than a row too many for each sample"
    )
    assert sorted(schedule.free_sample_spans) == list(range(layout.sample_spans))
    assert sorted(schedule.free_prompt_spans) == list(range(layout.prompt_spans))
    assert not schedule.groups and not schedule.batches, "nothing of a batch stays"


def test_a_free_place_is_taken_in_the_same_step():
    """One sample takes eight tokens; the others pass through the second of two places, gapless."""
    lengths = np.array([8, 3, 3, 3])
    *_, rows, _ = simulate(lengths, [5], 4, Layout(1, 5, 2, 8), ahead=0)
    assert rows == [2, 2, 2, 2, 2, 2, 1]


def test_a_batch_begins_beside_the_last_samples_of_the_one_before():
    """Each batch has one long sample; the next one's three samples run in the other two places."""
    lengths = np.array([8, 3, 3, 3, 8, 3, 3, 3])
    *_, rows, _ = simulate(lengths, [5] * 8, 1, Layout(3, 5, 3, 8), ahead=0, batch=4)
    assert rows == [3] * 8 + [2]


def test_prompts_are_encoded_when_an_eighth_of_the_places_is_free_and_then_for_all_of_them():
    lengths = np.array([8, 7, 6, 5, 4, 3, 2, *[8] * 25])
    layout = Layout(16, 5, 16, 8)
    *_, rows, encoded = simulate(lengths, [5] * 32, 1, layout, ahead=0, prefill_tokens=30)
    # Six at a time at first; then two for every two that end, one in a step.
    assert encoded[:6] == [6, 6, 4, 2, 2, 2]
    assert rows[:5] == [16, 15, 16, 15, 16]


def test_an_empty_batch_comes_out_at_its_turn():
    schedule = Schedule(2, 8, lambda sample, tokens: None)
    schedule.lay_out(Layout(1, 5, 2, 8))
    schedule.add([5], [5], np.zeros((2, 8), np.float32))
    assert schedule.add([], [], np.zeros((0, 8), np.float32)) == range(1, 1)
    assert schedule.take() is None
    schedule.begin(schedule.next_prompts(40), np.zeros(2, int), np.zeros(2, np.float32))
    for _ in range(7):
        step = schedule.next_step()
        schedule.record(step, np.zeros(2, int), np.zeros(2, np.float32))
    first, second = schedule.take(), schedule.take()
    assert (first.reasons, second.reasons) == (["length"] * 2, [])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, Layout(4, 30, 12, 10)),
        (1 + 4 * 30 + 12 * 10, Layout(4, 30, 12, 10)),
        (1 + 2 * 30 + 6 * 10, Layout(2, 30, 6, 10)),
        (1 + 30 + 10, Layout(1, 30, 1, 10)),
    ],
)
def test_as_many_samples_as_the_budget_allows(budget, expected):
    layout = Layout.fitting([10, 30, 20, 5], 3, 10, most_samples=64, budget=budget)
    assert layout == expected
    assert budget is None or layout.tokens <= budget


def test_more_prompts_are_held_where_others_follow():
    lengths, budget = [10, 30], 1 + 3 * 30 + 6 * 10
    fit = lambda group, more, budget=None: Layout.fitting(lengths, group, 10, 64, budget, more)  # noqa: E731
    assert fit(3, False) == Layout(2, 30, 6, 10)
    assert fit(3, True) == Layout(4, 30, 6, 10)
    assert fit(3, True, budget) == Layout(3, 30, 6, 10)
    assert fit(1, True) == Layout(2, 30, 2, 10)  # a group of one keeps nothing out


def test_too_small_a_budget_names_the_way_out():
    with pytest.raises(
        UserError, match=r"longest prompt has 30 tokens.*room for 40: .*--max-new-tokens"
    ):
        Layout.fitting([30], 3, 10, most_samples=64, budget=40)
