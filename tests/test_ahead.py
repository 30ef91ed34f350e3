"""Data read in a thread: the same as reading within the step gives, in the same order."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mr1_fast.ahead import Ahead
from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.preparing import prepare
from mr1_fast.seeds import seed_step
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import DrawnExamples, load_examples
from mr1_fast.train import grpo_step, sft_step

from .data.models import tiny_policy
from .data.runs import run, stage_run


class Recording(DrawnExamples):
    """Drawn examples that note which are read, each by its number, and in which thread."""

    def __init__(self):
        super().__init__(get_task("counting"), "train", 0)
        self.read = []

    def take(self, step, count):
        assert count == 1
        self.read.append((step, threading.current_thread().name))
        return super().take(step, count)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data ahead")]


def recorded_encoding(run, monkeypatch):
    """A list that gets every example that the run's policy encodes."""
    encoded, encode = [], run.policy.encode

    def encode_and_note(example):
        encoded.append(example)
        return encode(example)

    encode_and_note.many = encode.many
    monkeypatch.setattr(run.policy, "encode", encode_and_note)
    return encoded


def rows_with_images(folder, count):
    """Rows of data with an image file each."""
    folder.mkdir()
    rows = []
    for index, example in enumerate(load_examples("counting", "drawn", "train", 0).all(count)):
        example.images[0].save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "problem": example.problem, "solution": example.solution}
        rows.append({**row, "thinking": example.thinking})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def small():
    """A stage's run of three steps, whose source records what is read."""
    return stage_run(tiny_policy(), TrainConfig(steps=3, prompts_per_step=2), source=Recording())


@pytest.mark.parametrize("algo, step_of", [("grpo-d", grpo_step), ("sft", sft_step)])
def test_a_run_has_the_numbers_of_one_that_reads_within_its_steps(
    algo, step_of, run_args, tmp_path
):
    data = rows_with_images(tmp_path / "rows", 8)
    settings = dict(algo=algo, data=str(data), eval_samples=0, save_every=0)
    run(run_args(tmp_path / "within", **settings))  # on a CPU
    text = (tmp_path / "within" / "metrics.jsonl").read_text(encoding="utf-8")
    within = [json.loads(line) for line in text.splitlines()]
    assert len(within) == 3 and all(record["seconds_data"] > 0 for record in within)

    prepared = prepare(parse_train_config(run_args(tmp_path / "ahead", **settings)))
    prepared.log.create()
    with Ahead(prepared, thread=True) as ahead:
        for record in within:
            step = record["step"]
            data = ahead.take(step)
            seed_step(prepared.config.seed, step)
            metrics = step_of(prepared, data.examples, step, data.prompts)
            same = [name for name in metrics if not name.startswith(("seconds", "peak", "tflops"))]
            assert {name: metrics[name] for name in same} == {name: record[name] for name in same}


def test_every_step_is_read_once_and_one_ahead(small, monkeypatch):
    encoded = recorded_encoding(small, monkeypatch)
    with Ahead(small, thread=True) as ahead:
        for step in range(3):
            data = ahead.take(step)
            ahead._thread.submit(lambda: None).result()  # all that it had to do is done
            assert len(encoded) == len(small.source.read) == min(2 * (step + 2), 6)
            expected = DrawnExamples(get_task("counting"), "train", 0).take(step, 2)
            assert [example.key for example in data.examples] == [e.key for e in expected]
            for prompt, other in zip(data.prompts, small.policy.encode.many(expected), strict=True):
                assert torch.equal(prompt.input_ids, other.input_ids)
                assert torch.equal(prompt.pixel_values, other.pixel_values)
    assert [number for number, _ in small.source.read] == list(range(6))
    # The first step's are read where they are needed.
    assert [name for _, name in small.source.read[2:]] == ["data ahead_0"] * 4
    assert not reading_threads()


def test_a_model_on_a_cpu_shares_it_with_no_thread(small, monkeypatch):
    encoded = recorded_encoding(small, monkeypatch)
    with Ahead(small) as ahead:
        for step in range(3):
            assert len(ahead.take(step).prompts) == 2
            assert len(encoded) == len(small.source.read) == 2 * (step + 1)
    assert {name for _, name in small.source.read} == {threading.current_thread().name}


def test_an_error_is_raised_at_its_step_in_the_same_words(tmp_path):
    source = load_examples("counting", str(rows_with_images(tmp_path / "rows", 6)), "train", 0)
    broken = source.take(2, 2)[1].key
    (tmp_path / "rows" / broken).write_bytes(b"no image")
    with pytest.raises(UserError) as here:
        source.take(2, 2)

    config = TrainConfig(steps=4, prompts_per_step=2)
    failing = stage_run(tiny_policy(), config, source=source)
    with Ahead(failing, thread=True) as ahead:
        assert [len(ahead.take(step).prompts) for step in (0, 1)] == [2, 2]
        with pytest.raises(UserError) as there:
            ahead.take(2)
    assert str(there.value) == str(here.value) and broken in str(here.value)


def test_a_run_that_ends_early_leaves_no_thread(small):
    with pytest.raises(KeyboardInterrupt), Ahead(small, thread=True) as ahead:
        ahead.take(0)
        assert reading_threads()
        raise KeyboardInterrupt
    assert not reading_threads()


def test_a_run_that_ends_reads_the_item_that_it_has_begun_and_no_other(small):
    begun = threading.Event()

    def wait_and_take(entry, count, take=small.source.take):
        if entry == 2:  # the first one of the thread
            begun.set()
            assert ahead._ended.wait(60)
        return take(entry, count)

    small.source.take = wait_and_take
    with Ahead(small, thread=True) as ahead:
        ahead.take(0)
        assert begun.wait(60)
    assert [number for number, _ in small.source.read] == [0, 1, 2]


def test_threads_may_encode_at_once():
    encode = tiny_policy().encode
    examples = load_examples("counting", "drawn", "train", 0).all(24)
    expected = encode.many(examples)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(encode.many, [examples] * 8):
            for prompt, other in zip(found, expected, strict=True):
                assert torch.equal(prompt.input_ids, other.input_ids)
                assert torch.equal(prompt.position_ids, other.position_ids)
