"""What a run shows beside its progress bar."""

import json
import threading
from dataclasses import replace

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.errors import Stopped, UserError
from mr1_fast.log import RunLog
from mr1_fast.loggers import Background, Logger

GRPO = {"reward": 1.25, "accuracy": 0.5, "kl": 0.001, "beta": 0.07, "completion_length": 10.5}
SHOWN = "reward 1.25 · accuracy 0.5 · kl 0.001 · beta 0.07 · completion_length 10.5"


@pytest.mark.parametrize(
    "metrics, shown",
    [
        ({"loss": 0.5, **GRPO, "tflops_update": 0.2}, SHOWN),
        ({"loss": 0.5, **GRPO, "mfu_reference": 0.5, "mfu_update": 0.417}, f"{SHOWN} · mfu 42%"),
        ({"loss": 0.5}, "loss 0.5000"),
        ({"loss": 0.5, "mfu_update": 0.417}, "loss 0.5000 · mfu 42%"),
    ],
)
def test_the_progress_bar_shows_mfu_where_it_is_known(metrics, shown, tmp_path):
    log = RunLog(TrainConfig(output=str(tmp_path / "run"), steps=1))
    log.create()
    log.start(0)
    log.step(0, metrics)
    assert log.bar.postfix == shown
    log.close()


def test_an_evaluation_goes_to_its_file_and_to_the_loggers(tmp_path):
    log = RunLog(TrainConfig(output=str(tmp_path / "run"), steps=9))
    log.create()
    written = Written()
    log.loggers.append(Background("written", written, log.say))
    log.start(0)
    for step in (0, 3, 6):
        log.evaluation({"step": step, "accuracy": step / 10, "count": 4})
    log.close()
    assert written.values == [({"held_out_accuracy": step / 10}, step) for step in (0, 3, 6)]

    resumed = RunLog(TrainConfig(resume=log.folder, output=str(log.folder), steps=9))
    resumed.create()
    resumed.start(3)  # what was evaluated after step 3 is known, and step 6 is yet to come
    resumed.close()
    assert [json.loads(line)["step"] for line in log.evaluations.open()] == [0, 3]

    anew = RunLog(TrainConfig(output=str(log.folder), steps=9))
    anew.create()
    assert log.evaluations.read_text() == ""


def test_the_number_of_processes_is_that_of_the_last_start(tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"), steps=9)
    path = tmp_path / "run" / "processes.json"
    RunLog(config).create(0, processes={"processes": 2, "sharding": "none"})
    assert json.loads(path.read_text()) == {"processes": 2, "sharding": "none"}
    RunLog(config).create()  # nothing is in its way
    assert not path.exists()


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew_by_resume_auto(tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"), steps=9)
    (dead := RunLog(config)).create()
    dead.start(0)
    dead.step(0, {"loss": 1.0})
    dead.close()
    with pytest.raises(UserError, match="run is not empty"):
        RunLog(config)

    anew = RunLog(replace(config, resume="auto"))
    anew.create()
    anew.start(0)
    anew.close()
    assert not anew.resuming and (anew.folder / "metrics.jsonl").read_text() == ""
    (anew.folder / "final").mkdir()
    with pytest.raises(UserError, match="run is not empty"):
        RunLog(replace(config, resume="auto"))


@pytest.mark.parametrize("left", [".evaluation.json.0f3a.partial", ".seen-by-all-0f3a"])
def test_what_was_half_written_is_no_run(left, tmp_path):
    (tmp_path / left).touch()
    RunLog(TrainConfig(output=str(tmp_path)))
    (tmp_path / ".final.replaced").mkdir()  # which may be the only final/ there is
    with pytest.raises(UserError, match="not empty"):
        RunLog(TrainConfig(output=str(tmp_path)))


def test_a_stopped_run_is_told_how_to_go_on(tmp_path):
    log = RunLog(TrainConfig(output=str(tmp_path / "my run"), steps=9))
    assert log.way_on() == "nothing was saved yet, so start it again"
    (log.folder / "final").mkdir(parents=True)
    assert log.way_on() == f"{log.folder}/final is whole"
    (log.checkpoints / "step-000005").mkdir(parents=True)
    resume = f"`python -m mr1_fast.train --resume '{log.folder}'`"
    assert log.way_on() == f"go on with {resume}"  # final/ may be that of fewer steps
    log.final_stands = True
    assert log.way_on().startswith(f"{log.folder}/final is whole; {resume} makes")


@pytest.mark.parametrize("at_once", [False, True])
def test_only_a_second_signal_waits_for_no_logger(at_once, tmp_path):
    log, go_on = RunLog(TrainConfig(output=str(tmp_path / "run"), steps=9)), threading.Event()
    slow = Written()
    slow.open = lambda first_step: go_on.wait(60)
    with pytest.raises(Stopped), log:
        log.loggers.append(Background("slow", slow, log.say))
        log.loggers[0].open(0)
        if not at_once:
            threading.Timer(0.2, go_on.set).start()
        raise Stopped(2, "stopped", at_once)
    assert log.loggers[0]._thread.is_alive() == at_once
    go_on.set()


class Written(Logger):
    """A logger that keeps what it gets."""

    def __init__(self):
        self.values = []

    def open(self, first_step):
        pass

    def samples(self, samples, step):
        pass

    def log(self, metrics, step):
        self.values.append((metrics, step))

    def close(self):
        pass
