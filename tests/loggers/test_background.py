"""Loggers that raise, hang or are missing: the run goes on, and says so once."""

import sys
import threading

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.log import RunLog
from mr1_fast.loggers import LOGGERS, Background, Logger, LoggerRun, close_all
from mr1_fast.loggers.logger import installed


class Recorder(Logger):
    """Keeps what it gets, after `permission` to go on; raises at step `bad`."""

    PACKAGE = "json"

    def __init__(self, run, bad=None, waits=False, rewrites=False):
        super().__init__(run)
        self.REWRITES = rewrites
        self.bad, self.got, self.permission = bad, [], threading.Event()
        if not waits:
            self.permission.set()

    def open(self, first_step):
        self.got.append(("open", first_step))

    def log(self, metrics, step):
        self.permission.wait()
        if step == self.bad:
            raise ConnectionError(f"no\nroute {'x' * 1000}")
        self.got.append((step, metrics["loss"]))

    def samples(self, samples, step):
        self.got.append((step, samples))

    def close(self):
        self.got.append("close")


class Leaver(Recorder):
    """Calls sys.exit at step `bad`."""

    def log(self, metrics, step):
        if step == self.bad:
            sys.exit(0)
        super().log(metrics, step)


def started(tmp_path, known_steps=0, records=8, kind=Recorder, **behaviour):
    said = []
    logger = kind(LoggerRun(tmp_path), **behaviour)
    background = Background("X", logger, said.append, known_steps, records)
    background.open(known_steps)
    return logger, background, said


def log(background, *steps):
    for step in steps:
        background.log({"loss": step / 2}, step)


def test_everything_arrives_in_order(tmp_path):
    logger, background, said = started(tmp_path)
    log(background, 0)
    background.samples([], 1)
    log(background, 1)
    background.close()
    assert logger.got == [("open", 0), (0, 0.0), (1, []), (1, 0.5), "close"] and not said


def test_a_resumed_run_logs_again_only_what_is_replaced(tmp_path):
    for rewrites, steps in ((False, [3]), (True, [2, 3])):
        logger, background, _ = started(tmp_path, known_steps=3, rewrites=rewrites)
        for step in (2, 3):
            background.log({"loss": 0.0}, step)
            background.samples([], step)
        background.close()
        assert logger.got[1:-1] == [(step, x) for step in steps for x in (0.0, [])]


def evaluations_of_a_resumed_run(tmp_path, monkeypatch, rewrites):
    """What a logger gets of evaluations at steps 2 and 4, of which a resumed run repeats one."""

    class Kept(Recorder):
        def __init__(self, run):
            super().__init__(run, rewrites=rewrites)
            self.got = got

        def log(self, metrics, step):
            self.got.append((step, *metrics))

    got = []
    monkeypatch.setitem(LOGGERS, "tensorboard", Kept)
    for first, resume in ((0, None), (2, str(tmp_path / "run"))):
        config = TrainConfig(output=str(tmp_path / "run"), loggers=["tensorboard"], resume=resume)
        log = RunLog(config)
        log.create(first)
        log.start(first)
        for step in range(first, 4):
            log.step(step, {"loss": 1.0})
            if step % 2:
                log.evaluation({"step": step + 1, "accuracy": 0.5})
        log.close()
    return [entry for entry in got if entry[-1] != "loss" and entry != "close"]


def test_evaluations_of_a_resumed_run(tmp_path, monkeypatch):
    name = "held_out_accuracy"
    once = [("open", 0), (2, name), (4, name), ("open", 2)]
    assert evaluations_of_a_resumed_run(tmp_path / "a", monkeypatch, False) == once
    again = [*once, (2, name), (4, name)]
    assert evaluations_of_a_resumed_run(tmp_path / "b", monkeypatch, True) == again


@pytest.mark.parametrize("kind, reason", [(Recorder, "Connection"), (Leaver, "SystemExit")])
def test_a_logger_that_raises_is_off_and_said_once(kind, reason, tmp_path):
    logger, background, said = started(tmp_path, bad=1, kind=kind)
    log(background, 0, 1)
    background._queue.put(None)  # the thread has seen step 1 once it ends
    background._thread.join()
    log(background, 2, 3)
    background.close()
    assert logger.got == [("open", 0), (0, 0.0)]
    (sentence,) = said
    assert sentence.startswith(f"logger X failed and is off for the rest of this run ({reason}")
    assert "\n" not in sentence and len(sentence) < 500


def test_a_logger_that_hangs_drops_records_and_holds_nothing_up(tmp_path):
    logger, background, said = started(tmp_path, records=4, waits=True)
    log(background, *range(20))
    (sentence,) = said
    assert "slower than the run" in sentence
    close_all([background, background], seconds=0.1)
    assert [s for s in said if "did not end in time" in s] and background._thread.daemon
    logger.permission.set()
    background.close()
    steps = [step for step, _ in logger.got[1:-1]]
    assert steps == list(range(len(steps))) and len(steps) < 20  # the oldest ones are kept


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_logger_is_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"loggers has {name}, which is not installed: pip install"):
        RunLog(TrainConfig(output=str(tmp_path / "run"), loggers=[name]))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "comet_runs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed("torch") and not installed("comet_runs")


def test_a_damaged_file_of_identifiers_begins_anew(tmp_path):
    first = LoggerRun(tmp_path)
    first.remember("wandb", "abc")
    assert LoggerRun(tmp_path).recall("wandb") is None  # another run in the same folder
    again = LoggerRun(tmp_path, resumed=True)
    assert again.recall("wandb") == "abc"
    # A process that was killed earlier may have come further than the last one.
    assert [again.known("steps", 5), LoggerRun(tmp_path, resumed=True).known("steps", 3)] == [5, 5]
    for text in ("{", "[1]", "7"):
        (tmp_path / "loggers.json").write_text(text)
        assert LoggerRun(tmp_path, resumed=True).recall("wandb") is None
