"""Who runs in which row: simulated without a model, with a device that is up to a step behind."""

from collections import deque

import numpy as np
import pytest

from mr1_fast.errors import UserError
from mr1_fast.rollout.cache import Layout
from mr1_fast.rollout.schedule import Schedule
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
    lengths: np.ndarray, prompts: list[int], group: int, layout: Layout, ahead: int, most: int = 8
):
    """Run to the end; returns the schedule, and how many rows were computed."""
    uniform = np.zeros((len(lengths), most), dtype=np.float32)
    ends = lambda sample, tokens: "eos" if tokens[-1] == EOS else None  # noqa: E731
    positions = [1000 * i for i in range(len(prompts))]
    schedule = Schedule(prompts, positions, group, layout, uniform, ends)
    device, pending, rows = Device(lengths, layout), deque(), 0
    for _ in range(10_000):
        if chosen := schedule.next_prompts(40):
            assert len(chosen) == 1 or sum(prompts[i] for i in chosen) <= 40
            samples = schedule.samples_of(chosen)
            schedule.begin(
                samples, np.where(lengths[samples] == 1, EOS, 0), np.zeros(len(samples), np.float32)
            )
            continue
        samples, _, table, _ = schedule.next_step()
        held = schedule.span_of_prompt[np.unique(samples // group)]
        assert len(set(held)) == len(held) <= layout.prompt_spans, (
            "a prompt that is read keeps its span"
        )
        if len(samples):
            pending.append((samples, device.launch(table, samples)))
            rows += len(samples)
        elif not pending:
            return schedule, rows
        if len(pending) > ahead or not len(samples):
            samples, results = pending.popleft()
            schedule.record(samples, *results)
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
    schedule, rows = simulate(lengths, prompts, group, layout, ahead)
    expected = np.minimum(lengths, 8)
    assert schedule.counts.tolist() == expected.tolist()
    assert schedule.reasons == ["eos" if n <= 8 else "length" for n in lengths]
    for sample, n in enumerate(expected):
        last = [EOS] if lengths[sample] <= 8 else [n - 1]
        assert schedule.tokens[sample, :n].tolist() == [*range(n - 1), *last]
    least = (expected - 1).sum()
    assert least <= rows <= least + ahead * len(lengths), (
        "no more than a row too many for each sample"
    )
    assert sorted(schedule.free_sample_spans) == list(range(layout.sample_spans))
    assert sorted(schedule.free_prompt_spans) == list(range(layout.prompt_spans))


def test_a_free_place_is_taken_in_the_same_step():
    """One sample takes eight tokens; the others pass through the second of two places, gapless."""
    lengths = np.array([8, 3, 3, 3])
    _, rows = simulate(lengths, [5], 4, Layout(1, 5, 2, 8), ahead=0)
    assert rows == 7 + 2 + 2 + 2


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


def test_too_small_a_budget_names_the_way_out():
    with pytest.raises(
        UserError, match=r"longest prompt has 30 tokens.*room for 40: .*--max-new-tokens"
    ):
        Layout.fitting([30], 3, 10, most_samples=64, budget=40)
