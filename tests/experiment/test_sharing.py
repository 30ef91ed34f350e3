"""Cells of an experiment that processes share, however they were started."""

import errno
import json
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest

from mr1_fast import locks
from mr1_fast.errors import Stopped
from mr1_fast.experiment import results, run_cell, scales, sharing, studies
from mr1_fast.experiment.__main__ import main
from mr1_fast.experiment.command import make_experiment
from mr1_fast.experiment.scales import SCALES
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.experiment.sharing import in_order, run_cells
from mr1_fast.experiment.studies import GRPO, SFT_SOLUTION, Study
from mr1_fast.locks import if_free

from ..data.gang import server

KILLER = """
import os
import signal
from contextlib import suppress
from pathlib import Path

from mr1_fast.rewards import reward


@reward("deadly")
def deadly(completion, example):
    if example.key and len(list(Path(os.environ["OUTPUT"]).rglob("checkpoints/*"))):
        with suppress(FileNotFoundError):
            Path(__file__).with_name("killer").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return sum(map(str.isalpha, completion)) / (1 + len(completion))
"""
SHORT = dict(steps=3, prompts_per_step=2, num_generations=3, max_new_tokens=6, save_every=1)


def ran_by(monkeypatch, output, work=lambda cell: None):
    """The cells that `run_cells` runs, which are finished at once, after `work` on each."""
    ran = []

    def finish(experiment, cell):
        ran.append(cell)
        work(cell)
        cell.folder(output).mkdir(parents=True, exist_ok=True)
        (cell.folder(output) / "cell.json").touch()

    monkeypatch.setattr(sharing, "run_cell", finish)
    return ran


def an_experiment(output, **settings):
    output.mkdir(exist_ok=True)
    (output / "experiment.json").touch()
    return make_experiment(ExperimentConfig(output=str(output), **settings))


def test_the_next_seeds_start_is_made_before_it_is_needed(tmp_path):
    experiment = an_experiment(tmp_path, seeds=[4, 7, 5])
    found = [(cell.seed, cell.trained is None) for cell in in_order(experiment)]
    trained = len(found) // 3 - 1
    expected = [(4, True), (7, True), *[(4, False)] * trained, (5, True)]
    assert found == [*expected, *[(7, False)] * trained, *[(5, False)] * trained]
    assert sorted(map(str, in_order(experiment))) == sorted(map(str, experiment.cells()))


def test_what_another_process_runs_or_prepares_is_left_to_it(monkeypatch, tmp_path):
    experiment = an_experiment(tmp_path, seeds=[0, 1])
    first, *others = in_order(experiment)
    mine = [cell for cell in others if cell.seed == 1]
    left = [first.folder(tmp_path), tmp_path / "starts/seed0"]
    told = []

    def free_at_the_end(cell):
        if len(ran) == len(mine):
            for lock in theirs:
                lock.__exit__(None, None, None)

    ran = ran_by(monkeypatch, tmp_path, free_at_the_end)
    theirs = [if_free(path, "") for path in left]
    assert all(lock.__enter__() for lock in theirs)
    assert experiment.waits_for_start(0) and not experiment.waits_for_start(1)
    run_cells(experiment, 0, told.extend)
    assert ran[: len(mine)] == mine and {cell.seed for cell in ran[len(mine) :]} == {0}
    assert len(told) == len(ran) == len(experiment.cells())


def test_finished_cells_are_told_before_another_is_run(monkeypatch, tmp_path):
    experiment, told = an_experiment(tmp_path, seeds=[0]), []
    first, *others = in_order(experiment)
    first.folder(tmp_path).mkdir(parents=True)
    (first.folder(tmp_path) / "cell.json").touch()
    known = []
    ran = ran_by(monkeypatch, tmp_path, lambda cell: known.append(list(told)))
    run_cells(experiment, 0, told.extend)
    assert known[0] == [first] and ran == others and told == [first, *others]


def test_only_failures_of_this_call_are_final(monkeypatch, tmp_path):
    experiment = an_experiment(tmp_path, seeds=[0])
    began = 10**18
    for cell, moment in zip(experiment.cells(), (began - 1, began), strict=False):
        cell.folder(tmp_path).mkdir(parents=True)
        (cell.folder(tmp_path) / "failed.json").touch()
        os.utime(cell.folder(tmp_path) / "failed.json", ns=(moment, moment))
    ran, told = ran_by(monkeypatch, tmp_path), []
    run_cells(experiment, began, told.extend)
    again, final, *new = experiment.cells()
    assert again in ran and final not in ran and len(ran) == 1 + len(new)
    assert len(told) == len(experiment.cells())


def test_a_failure_that_is_taken_back_while_it_is_read_is_none(monkeypatch, tmp_path):
    """Another call, which has begun since, removes failed.json as it begins the cell again."""
    experiment = an_experiment(tmp_path, seeds=[0])
    cell = experiment.cells()[0]
    failed = cell.folder(tmp_path) / "failed.json"
    failed.parent.mkdir(parents=True)
    failed.write_text('{"error": "the reward broke"}')
    assert experiment.result(cell).error == "the reward broke"
    read = results.read_json_object

    def read_late(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr(results, "read_json_object", read_late)
    assert experiment.result(cell).state == "missing"


def test_without_locks_processes_of_torchrun_have_every_nth_cell(monkeypatch, tmp_path):
    def has_none(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    experiment = an_experiment(tmp_path, seeds=[0])
    monkeypatch.setattr(locks.fcntl, "flock", has_none)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ran = ran_by(monkeypatch, tmp_path)
    for cell in in_order(experiment)[::2]:  # those of the other process
        cell.folder(tmp_path).mkdir(parents=True)
        (cell.folder(tmp_path) / "cell.json").touch()
    run_cells(experiment, 0, lambda ended: None)
    assert ran == in_order(experiment)[1::2]


def test_a_stop_that_comes_out_as_another_error_is_no_failure_of_the_cell(monkeypatch, tmp_path):
    def stop(*_):
        try:
            raise Stopped(signal.SIGTERM)
        finally:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(run_cell, "_train_and_test", stop)
    experiment = an_experiment(tmp_path, seeds=[0])
    with pytest.raises(Stopped):
        run_cells(experiment, 0, lambda ended: None)
    assert not list(tmp_path.rglob("failed.json"))


def use_short(model, plugin):
    settings = {"plugin": str(plugin), "extra_rewards": {"deadly": 1.0}, "learning_rate": 1e-3}
    tiny = SCALES["tiny"]
    scales.SCALES["short"] = replace(
        tiny,
        model=str(model),
        settings={**tiny.settings, **SHORT, **settings, "device": "cpu"},
        seeds=(0,),
        curve_every=2,
        curve_items=3,
    )
    method = Study("method", "Method", (GRPO, SFT_SOLUTION), ("counting",))
    studies.STUDIES["method"] = method


def call(sender, output, model, plugin):
    """Run the command in a process of its own, and send what it prints."""
    os.environ["OUTPUT"] = str(output)
    use_short(model, plugin)
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(StringIO()):
        main(["--preset", "short", "--output", str(output), "--test-items", "5"])
    sender.send(said.getvalue())
    sender.close()
    os._exit(0)


def call_by_hand(count, *arguments):
    """Start the command so many times; returns exit statuses, and what those that end print."""
    started = []
    for _ in range(count):
        receiver, sender = server().Pipe(duplex=False)
        process = server().Process(target=call, args=(sender, *arguments), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    statuses, said = [], []
    for process, receiver in started:
        try:
            said.append(receiver.recv())
        except EOFError:
            said.append("")
        process.join()
        statuses.append(process.exitcode)
    return statuses, said


@pytest.mark.slow
def test_calls_by_hand_share_a_folder_and_a_killed_ones_cell_is_taken_over(
    tiny_folder, monkeypatch, tmp_path
):
    plugin, output = tmp_path / "plugin.py", tmp_path / "out"
    plugin.write_text(KILLER)
    (tmp_path / "killer").touch()
    statuses, said = call_by_hand(2, output, tiny_folder, plugin)
    assert sorted(statuses) == [-signal.SIGKILL, 0] and not (tmp_path / "killer").exists()
    lines = said[statuses.index(0)].splitlines()
    assert [line[:5] for line in lines[:3]] == ["[1/3]", "[2/3]", "[3/3]"] and len(lines) == 4
    assert not any("FAILED" in line for line in lines) and not list(output.rglob("checkpoints"))
    assert json.loads((output / "experiment.json").read_text())["seeds"] == [0]

    # The cell that was taken over is what it is when it is run alone, without an interruption.
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.setenv("OUTPUT", str(alone))
    monkeypatch.setitem(scales.SCALES, "short", None)
    monkeypatch.setitem(studies.STUDIES, "method", None)
    use_short(tiny_folder, plugin)
    config = ExperimentConfig(preset="short", output=str(alone), test_items=5)
    experiment = make_experiment(config)
    cell = experiment.cells()[1]
    run_cell.run_cell(experiment, cell)
    assert not experiment.result(cell).error
    for name in ("run/final/model.safetensors", "curve.jsonl", "counting-sampled.json"):
        assert (cell.folder(alone) / name).read_bytes() == (cell.folder(output) / name).read_bytes()
