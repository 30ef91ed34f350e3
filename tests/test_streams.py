"""No command dies of its own output: closed pipes, full devices, ASCII, descriptors not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .data.runs import metrics

SCRIPT = """
from mr1_fast import streams
from mr1_fast.errors import exit_on_user_error, require_output

streams.prepare()
from tqdm import tqdm

def main():
    with open("written", "w") as file:  # must not take the place of a closed descriptor
        for step in tqdm(range(3000), mininterval=0):
            print(f"Schönheit β {step} \\ud800", flush=True)
            tqdm.write("Größe ≥ 3")
        tqdm.write("error: Größe", file=sys.stderr)
        file.write("all")
    if "require" in sys.argv:
        require_output()

exit_on_user_error(main)
"""
HOW = {
    "a pipe that closes": "| head -1",
    "both in one that closes": "2>&1 | head -1",
    "closed at the start": ">&- 2>&- <&-",
    "stderr closed": "2>&-",
    "a full device": "> /dev/full 2> /dev/full",
}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{SCRIPT}")
    return path


def shell(script, how, *arguments, **environment):
    command = f"{sys.executable} {script} {' '.join(arguments)} {how}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=script.parent,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_work_goes_on_without_its_output(how, script):
    done = shell(script, how)
    assert (done.returncode, (script.parent / "written").read_text()) == (0, "all"), done
    assert b"Error" not in done.stderr and b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding, script):
    done = shell(script, "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.decode(encoding).splitlines()[:2]
    umlaut, beta = {"ascii": ("\\xf6", "\\u03b2"), "latin-1": ("ö", "\\u03b2")}.get(
        encoding, ("ö", "β")
    )
    assert first == f"Sch{umlaut}nheit {beta} 0 \\ud800" and second.startswith("Gr")


@pytest.mark.parametrize("how, status", [("> /dev/full", 2), ("| head -1", 0), (">&-", 0)])
def test_a_command_that_is_called_for_its_output_says_if_it_is_lost(how, status, script):
    done = shell(script, how, "require")
    assert done.returncode == status
    said = b"error: standard output cannot be written (No space left on device): send it somewhere"
    assert (said in done.stderr) == (status == 2)


def test_a_run_goes_on_when_its_reader_has_left(run_args, tmp_path):
    """As under `| head -1`, with a terminal that knows ASCII alone."""
    settings = dict(steps=2, eval_samples=2, num_generations=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "mr1_fast.train", *run_args(tmp_path / "run", **settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL),
    )
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode("ascii")
    assert process.wait() == 0 and "Traceback" not in errors, errors
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run" / "final").exists()
