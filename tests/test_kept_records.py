"""Records of a run that goes on: what is wrong with one is told before training, or harmless."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.files import append_line, shorten
from mr1_fast.kept_records import COMPLETIONS, EVALUATION, EVALUATIONS, METRICS
from mr1_fast.log import RunLog
from mr1_fast.plan.out_of_memory import PACK_TOKENS, MemoryLimits
from mr1_fast.progress import Progress
from mr1_fast.report.records import end_before, read_lines, read_steps

FIRST = 4
"""After so many steps the run goes on; its records reach to step 6."""
FIGURES = {"accuracy": 0.5, "interval": [0.4, 0.6], "correct": 2, "count": 4}
RECORDS = (METRICS, COMPLETIONS, EVALUATIONS)


def line(**entries: object) -> bytes:
    return json.dumps(entries).encode() + b"\n"


WHOLE = {
    METRICS: [line(step=step, reward=0.5) for step in range(6)],
    COMPLETIONS: [
        line(step=step, key=key, completions=[]) for step in range(6) for key in ("a", "b")
    ],
    EVALUATIONS: [line(step=step, accuracy=0.25) for step in (0, 2, 4, 6)],
    EVALUATION: [json.dumps({"before": {"greedy": FIGURES}, "examples": []}).encode()],
    "loggers.json": [b'{"wandb": "abc", "steps": 4}'],
    "processes.json": [b'{"processes": 2, "sharding": "none"}'],
}


@pytest.fixture
def folder(tmp_path):
    """The records of a run that was killed in its sixth step."""
    for name, lines in WHOLE.items():
        (tmp_path / name).write_bytes(b"".join(lines))
    return tmp_path


def go_on(folder: Path) -> tuple[RunLog, list[str]]:
    """Look at the records as a resumed run does; returns what it says."""
    config = TrainConfig(output=str(folder), resume=str(folder), steps=9, eval_every=2)
    log, said = RunLog(config), []
    log.say = said.append
    log.check(FIRST)
    Progress.read(log.evaluations, FIRST)
    log.create(FIRST)
    log.start(FIRST)
    log.end_steps()
    return log, said


NO_LINES = {
    **{"bad byte": b'{"step": 2, "reward": "\xff"}\n', "bad line": b"{'step': 2}\n"},
    **{"blank": b"\n", "blanks": b"   \n", "list": b'[["step", 2]]\n', "empty list": b"[]\n"},
    **{"text": b'"step"\n', "null": b"null\n", "no step": b'{"accuracy": 0.5}\n'},
    **{"step a text": line(step="2"), "a float": line(step=2.0), "true": line(step=True)},
    **{"null step": line(step=None), "negative": line(step=-1), "NaN": b'{"step": NaN}\n'},
    **{"infinite": b'{"step": 1e999}\n', "5,000 digits": b'{"step": ' + b"2" * 5000 + b"}\n"},
    **{"deep": b'{"step": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"},
    **{"too high": line(step=99), "too low": line(step=0), "zeroed": b"\0" * 40 + b"\n"},
    **{"NULs within": b'{"step": 2, "x": "\0"}\n', "utf-16": '{"step": 2}\n'.encode("utf-16")},
    **{"two in one": b'{"step": 2}{"step": 3}\n', "huge": b'{"step": ' + b"9" * 200 + b"}\n"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_line_anywhere_is_named_or_nothing_is_lost(name, folder):
    """Each kind of line in the place of each, and between each two."""
    path, whole, told = folder / name, WHOLE[name], 0
    for kind, damaged in NO_LINES.items():
        for place in range(len(whole)):
            for replaced in (0, 1):
                lines = [*whole[:place], damaged, *whole[place + replaced :]]
                path.write_bytes(b"".join(lines))
                before = path.read_bytes()
                try:
                    _, said = go_on(folder)
                except UserError as error:
                    words = str(error)
                    assert words.startswith(f"{path} line ") and words.endswith("remove it."), kind
                    assert "\n" not in words and len(words) < 500
                    assert path.read_bytes() == before, "what is refused stays as it was"
                    told += 1
                    continue
                left = [(step, record) for step, record, _ in read_steps(path, name == COMPLETIONS)]
                limit = FIRST + (name == EVALUATIONS)
                assert all(step < limit for step, _ in left), kind
                kept = [json.loads(each) for each in whole]
                kept = {each["step"] for each in kept if each["step"] < limit}
                lost = (
                    kept - {step for step, _ in left} - ({0, 4} if name == EVALUATIONS else set())
                )
                assert not lost or any(str(path) in sentence for sentence in said), (kind, place)
    assert told > 150


SHAPES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "zeroed": lambda data: b"\0" * len(data),
    "zeroed end": lambda data: data[: len(data) // 2] + b"\0" * 9,
    "a list": lambda data: b"[]\n",
    "pairs": lambda data: b'[["before", 1]]\n',
    "a bad byte": lambda data: data.replace(b"0", b"\xff", 1).replace(b"a", b"\xff", 1),
    "deep": lambda data: b"[" * 100_000 + b"\n",
    "5,000 digits": lambda data: (
        b'{"before": ' + b"9" * 5000 + b', "steps": ' + b"9" * 5000 + b"}\n"
    ),
    "of another kind": lambda data: b'{"before": {"greedy": 1}, "steps": "x", "wandb": []}\n',
}
OTHER_THINGS = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "a circle": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_told_before_training_and_never_at_its_end(name, folder):
    path, whole = folder / name, b"".join(WHOLE[name])
    for kind in (*SHAPES, *OTHER_THINGS):
        path.unlink(missing_ok=True)
        if kind in SHAPES:
            path.write_bytes(SHAPES[kind](whole))
        else:
            OTHER_THINGS[kind](path)
        started, said = time.perf_counter(), []
        try:
            log, said = go_on(folder)
        except UserError as error:
            words = str(error)
            assert str(path) in words and "\n" not in words and words.endswith("."), kind
        else:
            names_it = any(str(path) in sentence for sentence in said)
            harmless = name == "processes.json"  # which is written anew
            if name in RECORDS and not names_it:  # what the cut has taken is done again
                steps = {json.loads(each)["step"] for each in WHOLE[name]}
                kept = {step for step, _, _ in read_steps(path, several=True)}
                harmless = kept >= {step for step in steps if step < FIRST}
            assert names_it or harmless or kind == "a bad byte", (kind, said)
            log.step(FIRST, {"loss": 0.5})
            assert list(read_lines(folder / METRICS))[-1]["step"] == FIRST
        assert time.perf_counter() - started < 5
        if path.is_dir():
            path.rmdir()


def test_the_way_out_that_is_named_works(folder):
    """A line is removed, and then the file: each time the run goes on and says what it lacks."""
    path = folder / METRICS
    path.write_bytes(b"".join([*WHOLE[METRICS][:2], b"\xff\n", *WHOLE[METRICS][3:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl line 3 is no JSON object: remove it\.$"):
        go_on(folder)
    path.write_bytes(b"".join([*WHOLE[METRICS][:2], *WHOLE[METRICS][3:]]))
    assert [each for each in go_on(folder)[1] if "of step 2, as" in each]
    path.unlink()
    (folder / EVALUATION).write_text("{")
    with pytest.raises(UserError, match=r"evaluation.json is no JSON object: remove it\.$"):
        go_on(folder)
    (folder / EVALUATION).unlink()
    said = go_on(folder)[1]
    assert any("nothing of step 0–3, as" in each for each in said)
    assert any("evaluation.json has no accuracy before training" in each for each in said)


def test_a_sound_run_goes_on_without_a_word(folder):
    assert go_on(folder)[1] == []
    kept = {name: (folder / name).read_bytes() for name in RECORDS}
    assert kept[METRICS] == b"".join(WHOLE[METRICS][:4])
    assert kept[COMPLETIONS] == b"".join(WHOLE[COMPLETIONS][:8])
    assert kept[EVALUATIONS] == b"".join(WHOLE[EVALUATIONS][:3])
    assert go_on(folder)[1] == [] and kept[METRICS] == (folder / METRICS).read_bytes()


def test_many_gaps_are_named_in_a_bounded_sentence(tmp_path):
    for step in range(0, 3000, 3):
        append_line(tmp_path / METRICS, {"step": step})
    config = TrainConfig(resume=str(tmp_path), output=str(tmp_path), algo="sft", eval_samples=0)
    (log := RunLog(config)).say = (said := []).append
    log.check(3000)
    [sentence] = said
    assert "nothing of step 1–2, 4–5, 7–8, 10–11, 13–14, …, as" in sentence


def test_a_long_record_is_read_once_in_little_memory_and_cut_in_place(tmp_path):
    path = tmp_path / COMPLETIONS
    with path.open("wb") as file:
        for step in range(400):
            file.write(line(step=step, text="x" * 50_000))
    whole, inode = path.read_bytes(), path.stat().st_ino
    tracemalloc.start()
    end = end_before(path, 300, several=True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20 < len(whole)
    shorten(path, end)
    assert path.read_bytes() == whole[:end] and path.stat().st_ino == inode
    assert [step for step, _, _ in read_steps(path)] == list(range(300))
    shorten(tmp_path / "nowhere", 0)
    with pytest.raises(UserError, match=r"cannot be written .*: make room there, then go on with"):
        shorten(tmp_path, 0)


@pytest.mark.parametrize(
    "kept", ["", "[]", "{", '{"tokens_per_microbatch": -4}', "\0", '{"a": 1e9}']
)
def test_amounts_of_a_restart_that_are_damaged_are_told(kept, tmp_path):
    (path := tmp_path / "memory.json").write_text(kept)
    limits = MemoryLimits((said := []).append, str, {PACK_TOKENS: 64}, kept=path)
    assert limits.amounts == {PACK_TOKENS: 64}
    assert said == [f"{path} is damaged, so that this run begins with the planned amounts."]
