"""Runs in unusual surroundings: clocks that jump, hard names, missing or read-only folders.

Each ends with the numbers of a run in usual ones, or with a sentence.
"""

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mr1_fast.evaluate.command import evaluate_model
from mr1_fast.evaluate.settings import parse as parse_evaluate
from tests.data.faults import Outcome, forked, needs_gcc, own_mounts, read_only
from tests.data.gang import prepared
from tests.data.runs import assert_same_run, run

pytestmark = needs_gcc

SETTINGS = dict(steps=2, save_every=1, eval_samples=2)
DAY, YEAR = 86_400, 366 * 86_400
NAMES = {
    "spaces and quotes": "a 'b' \"c\" $HOME `d` \\ #e %f",
    "a line break": "a\nb\tc",
    "other alphabets": "модель 模型 نموذج 🧮",
    "an escape sequence": "a\x1b[31mb\x07",
    "markup": "a<script>alert(1)&amp;b",
    "as for a YAML file": "- a: {b, [c]} !!d *e",
    "255 bytes": "n" * 255,
    "bytes that are not UTF-8": "a\udcff\udc80b",
}


def command(argv: list[str], folder: Path, around: Callable[[], object] = lambda: None) -> Outcome:
    """Train in a fork, after `around()`."""

    def operate() -> None:
        around()
        run(argv)

    return forked(operate, folder)


def sentence(outcome: Outcome) -> str:
    """What a command has said that could not do its work; a name in it may have line breaks."""
    assert outcome.status == 2 and "Traceback" not in outcome.said, outcome.said[-3000:]
    last = outcome.said.rpartition("error: ")[2].strip()
    assert last.endswith(".") and len(last) < 1010, last
    return last


# --- clocks -------------------------------------------------------------------------------------


def jump(after: int, real: int, monotonic: int = 0) -> Callable[[], None]:
    def jumped() -> None:
        ctypes.CDLL(None).faults_clock(*map(ctypes.c_long, (after, real, monotonic)))

    return jumped


def try_clocks(scratch: Path, argv: list[str], jumps: list[tuple[int, int, int]]) -> None:
    whole = scratch / "whole"
    outcome = command([*argv, f"--output={whole}"], whole)
    assert outcome.status == 0, outcome.said
    for number, each in enumerate(jumps):
        folder = scratch / f"jumped{number}"
        outcome = command([*argv, f"--output={folder}"], folder, jump(*each))
        assert outcome.status == 0 and "Traceback" not in outcome.said, outcome.said
        assert_same_run(folder, whole)


JUMPS = [
    (50, -DAY, 0),
    (50, YEAR, 0),
    (1, -40 * YEAR, 0),
    (50, 0, DAY),
    (500, -DAY, YEAR),
    (500, YEAR, 30 * DAY),
]
"""After how many looks at a clock that of the day and the monotonic one are off, in seconds."""


@pytest.mark.thorough
def test_a_run_whose_clocks_jump_further_computes_the_same(run_args, tmp_path):
    prepared(try_clocks, tmp_path, run_args("x", **SETTINGS)[1:], JUMPS)


def try_times_of_files(scratch: Path, argv: list[str]) -> list[int]:
    """Resume a run whose files have times of the future, and of the past."""
    whole, folder = scratch / "whole", scratch / "folder"
    argv = [*argv, "--resume=auto"]
    longer = [*argv, "--steps=3"]
    for steps in (argv, longer):
        assert command([*steps, f"--output={whole}"], whole).status == 0
    assert command([*argv, f"--output={folder}"], folder).status == 0
    final = (folder / "final" / "model.safetensors").read_bytes()

    # The clock was ahead while the shorter run ended, and the longer one was killed before its end.
    for path in [*(folder / "final").rglob("*"), folder / "evaluation.json"]:
        os.utime(path, times=(2_000_000_000, 2_000_000_000))
    shutil.copytree(folder, kept := scratch / "kept", symlinks=True)
    outcome = command([*longer, f"--output={folder}"], folder)
    assert outcome.status == 0, outcome.said
    shutil.rmtree(folder / "final")
    shutil.copytree(kept / "final", folder / "final")
    for name in ("evaluation.json", "finished.json"):
        shutil.copy2(kept / name, folder / name)
    assert (folder / "final" / "model.safetensors").read_bytes() == final
    outcome = command([*longer, f"--output={folder}"], folder)
    assert outcome.status == 0, outcome.said
    assert_same_run(folder, whole)
    return [outcome.status]


@pytest.mark.thorough
def test_a_run_is_not_thought_finished_for_the_times_of_its_files(run_args, tmp_path):
    prepared(try_times_of_files, tmp_path, run_args("x", **SETTINGS)[1:])


# --- names --------------------------------------------------------------------------------------


def try_names(scratch: Path, argv: list[str], model: Path, names: dict[str, str]) -> list[str]:
    whole, told, wrong = scratch / "whole", [], []
    outcome = command([*argv, f"--output={whole}", f"--model={model}"], whole)
    assert outcome.status == 0, outcome.said
    for what, name in names.items():
        place = scratch / name
        shutil.copytree(model, place / "model")
        output, data = place / name, place / "rows.jsonl"
        data.write_text('{"problem": "1+1", "solution": "<answer> 2 </answer>"}\n' * 4)
        try:
            here = [*argv, f"--output={output}", f"--model={place / 'model'}"]
            outcome = command(here, scratch)
            if outcome.status:
                told.append(f"{what}: {sentence(outcome)}")
                assert not output.exists() or not list(output.iterdir())
                continue
            assert_same_run(output, whole)
            outcome = command(["--resume", str(output), "--steps=3"], scratch)
            assert outcome.status == 0, outcome.said
            rows = [
                *without(here, "eval_samples"),
                f"--data={data}",
                f"--output={place / 'of rows'}",
                "--task=free",
                "--eval-samples=0",
            ]
            outcome = command(rows, scratch)
            assert outcome.status == 0, outcome.said
            told.append(f"{what}: trained")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[-1500:]}")
    assert not wrong, "\n".join(wrong)
    return told


def without(argv: list[str], name: str) -> list[str]:
    return [word for word in argv if not word.startswith(f"--{name}=")]


@pytest.mark.thorough
def test_a_run_in_folders_with_hard_names(run_args, tiny_folder, tmp_path):
    argv = without(run_args("x", **SETTINGS)[1:], "model")
    print("\n".join(prepared(try_names, tmp_path, argv, tiny_folder, NAMES)))


# --- folders ------------------------------------------------------------------------------------


def no_home() -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MR1_FAST_CACHE"):
        os.environ.pop(name, None)


def home_of_nobody() -> None:
    no_home()
    os.environ["HOME"] = "/nonexistent/home"


def no_temporary_folder() -> None:
    import tempfile

    tempfile.tempdir = None
    os.environ["TMPDIR"] = "/nonexistent/tmp"


AROUND = {
    "no HOME": no_home,
    "a HOME that is missing": home_of_nobody,
    "a TMPDIR that is missing": no_temporary_folder,
    "umask 077": lambda: os.umask(0o077),
}


def try_surroundings(scratch: Path, argv: list[str], chosen: list[str]) -> None:
    whole, wrong = scratch / "whole", []
    outcome = command([*argv, f"--output={whole}"], whole)
    assert outcome.status == 0, outcome.said
    for what in chosen:
        folder = scratch / what
        outcome = command([*argv, f"--output={folder}"], folder, AROUND[what])
        try:
            assert outcome.status == 0 and "Traceback" not in outcome.said, outcome.said
            assert_same_run(folder, whole)
            if what == "umask 077":
                assert not [path for path in folder.rglob("*") if path.stat().st_mode & 0o077]
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[-1500:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.thorough
def test_a_run_in_unusual_surroundings(run_args, tmp_path):
    prepared(try_surroundings, tmp_path, run_args("x", **SETTINGS)[1:], list(AROUND))


def try_read_only(scratch: Path, argv: list[str]) -> list[str]:
    """Every folder that a command writes to, made read-only; what is in it stays as it was."""
    if not own_mounts():
        return []
    run_folder, told, wrong = scratch / "run", [], []
    outcome = command([*argv, f"--output={run_folder}"], run_folder)
    assert outcome.status == 0, outcome.said
    (scratch / "empty").mkdir()
    (scratch / "cache").mkdir()
    model = str(run_folder / "final")

    def evaluated() -> None:
        flags = [f"--model={model}", "--samples=2", "--max-new-tokens=4", "--device=cpu"]
        evaluate_model(parse_evaluate([*flags, f"--output={scratch / 'empty' / 'e.json'}"]))

    def started() -> None:
        os.environ["MR1_FAST_CACHE"] = str(scratch / "cache")
        run([*without(argv, "model"), "--model=tiny", f"--output={scratch / 'other'}"])

    resume = ["--resume", str(run_folder), "--steps=4"]
    cases = {
        "a new output": ("empty", lambda: run([*argv, f"--output={scratch / 'empty' / 'r'}"])),
        "an empty output": ("empty", lambda: run([*argv, f"--output={scratch / 'empty'}"])),
        "a resumed run": ("run", lambda: run(resume)),
        "its checkpoints": ("run/checkpoints", lambda: run(resume)),
        "the output of evaluate": ("empty", evaluated),
        "the cache": ("cache", started),
    }
    for what, (folder, operate) in cases.items():
        before = {path: path.stat().st_mtime_ns for path in (scratch / folder).rglob("*")}
        with read_only(scratch / folder):
            outcome = forked(operate, scratch)
        try:
            told.append(f"{what}: {sentence(outcome)}")
        except AssertionError as error:
            wrong.append(f"{what}: status {outcome.status}: {str(error)[-1500:]}")
        assert {path: path.stat().st_mtime_ns for path in (scratch / folder).rglob("*")} == before
    assert not wrong, "\n".join(wrong)
    outcome = command(resume, run_folder)
    assert outcome.status == 0, outcome.said
    return told


@pytest.mark.thorough
def test_a_folder_that_is_read_only_is_named_in_a_sentence(run_args, tmp_path):
    told = prepared(try_read_only, tmp_path, run_args("x", **SETTINGS)[1:])
    if not told:
        pytest.skip("mounting needs root")
    print("\n".join(told))
