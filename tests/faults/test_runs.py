"""Whole runs that are killed, stopped, or have no room, and what they have computed in the end."""

import errno
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.data.faults import (
    MAKES,
    WRITES,
    Fault,
    Outcome,
    forked,
    needs_gcc,
    own_mounts,
    small_disk,
)
from tests.data.gang import prepared
from tests.data.runs import assert_same_run, run

pytestmark = needs_gcc

FAULTS = {
    "kill": Fault(how="signal", value=signal.SIGKILL),
    "kill in a write": Fault(how="half, then signal", value=signal.SIGKILL),
    "SIGTERM": Fault(how="signal", value=signal.SIGTERM),
    "full disk": Fault(how="fail", value=errno.ENOSPC, kinds=WRITES | MAKES, lasting=True),
    "EIO": Fault(how="fail", value=errno.EIO, kinds=WRITES | MAKES),
}
SETTINGS = dict(steps=4, save_every=1, eval_samples=2, eval_every=2, keep_best=True)
"""A run that saves all that a run can save, as often as it can."""


def command(argv: list[str], folder: Path, fault: Fault = Fault()) -> Outcome:  # noqa: B008
    """Do what `python -m mr1_fast.train` does, in a fork."""
    return forked(lambda: run(argv), folder, fault)


def one_sentence(outcome: Outcome) -> str:
    """The last line of a run that has ended too early, which must be no traceback."""
    assert "Traceback" not in outcome.said, outcome.said
    last = outcome.said.replace("\r", "\n").strip().splitlines()[-1]
    ends = (".", "`", "again", "evaluation, card and upload")
    assert len(last) < 1010 and last.endswith(ends), outcome.said
    return last


def try_run(scratch: Path, argv: list[str], what: str, points: int) -> list[str]:
    """Let a run fail at evenly spaced calls, and go on; the numbers are those of a whole one."""
    whole, folder, fault = scratch / "whole", scratch / "folder", FAULTS[what]
    outcome = command([*argv, f"--output={whole}"], whole)
    assert outcome.status == 0, outcome.said
    calls = [call for call in outcome.calls if call.kind & fault.kinds]
    told, wrong = [], []
    for number in range(points):
        at = 1 + (2 * number + 1) * len(calls) // (2 * points)
        where = f"{what} at call {at} of {len(calls)}, {calls[at - 1].name} {calls[at - 1].path}"
        shutil.rmtree(folder, ignore_errors=True)
        again = [*argv, f"--output={folder}", "--resume=auto"]
        chosen = Fault(at, fault.how, fault.value, fault.kinds, fault.lasting)
        try:
            outcome = command(again, folder, chosen)
            if fault.value == signal.SIGKILL:
                assert outcome.status == -signal.SIGKILL
            elif outcome.status:
                assert outcome.status == (143 if fault.value == signal.SIGTERM else 2)
                one_sentence(outcome)
            # A file that is not needed, as the report, may be left out with a sentence.
            told.append(f"{where}: status {outcome.status}")
            last = command(again, folder)
            assert last.status == 0, last.said
            assert_same_run(folder, whole)
            left = [path for path in folder.rglob(".*") if path.name not in (".lock",)]
            assert not left, left
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {str(error)[:1500]}")
    assert not wrong, f"{len(wrong)} of {points}\n" + "\n".join(wrong)
    return told


def test_a_run_goes_on_after_a_kill_at_some_call(run_args, tmp_path):
    argv = run_args("x", **SETTINGS)[1:]
    print("\n".join(prepared(try_run, tmp_path, argv, "kill", 1)))


@pytest.mark.thorough
@pytest.mark.parametrize("what", FAULTS)
def test_a_run_goes_on_after_a_fault_at_many_calls(what, run_args, tmp_path):
    argv = run_args("x", **SETTINGS)[1:]
    print("\n".join(prepared(try_run, tmp_path, argv, what, 25)))


def try_small_disk(scratch: Path, argv: list[str], size: str) -> str:
    if not own_mounts():
        return ""
    whole, folder = scratch / "whole", scratch / "disk"
    outcome = command([*argv, f"--output={whole}"], whole)
    assert outcome.status == 0, outcome.said
    small_disk(folder, size)
    argv = [*argv, f"--output={folder / 'run'}", "--resume=auto"]
    outcome = command(argv, folder)
    assert outcome.status == 2, outcome.said
    sentence = one_sentence(outcome)
    assert re.search(r"No space|is full", sentence), sentence
    left = sorted(path.name for path in (folder / "run" / "checkpoints").glob("*"))
    small_disk(folder, "200m", again=True)
    outcome = command(argv, folder)
    assert outcome.status == 0, outcome.said
    assert_same_run(folder / "run", whole)
    return f"{size}: {sentence} {left}"


@pytest.mark.thorough
@pytest.mark.parametrize("size", ["8m", "26m"])
def test_a_run_on_a_small_disk_goes_on_once_there_is_room(size, run_args, tmp_path):
    """The first size has no room for a checkpoint, the other one for two of them."""
    argv = run_args("x", steps=4, save_every=1, eval_samples=2)[1:]
    told = prepared(try_small_disk, tmp_path, argv, size)
    if not told:
        pytest.skip("mounting needs root")
    print(told)
