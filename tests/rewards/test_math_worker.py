"""The process in which math-verify reads model output: what it imports, refuses and outlives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mr1_fast.rewards.math_worker import Channel

from ..data.processes import is_running, only_child
from ..data.scripts import run_script

FOLDER = Path(__file__).parents[2] / "mr1_fast" / "rewards"
"""The worker runs as a file, without the package around it."""


def test_the_worker_imports_no_torch_and_its_hook_stops_commands(tmp_path):
    script = f"""
sys.path.insert(0, {str(FOLDER)!r})
import math_worker
math_worker._warm_up()
print([name for name in ("torch", "transformers") if name in sys.modules])
sys.addaudithook(math_worker._refuse)
import os
for act in (lambda: os.system("touch {tmp_path}/a"), lambda: open("{tmp_path}/b", "w"), os.fork):
    try:
        print(act())
    except PermissionError:
        print("refused")
"""
    done = run_script(tmp_path / "hook.py", script)
    assert done.stdout.split() == ["[]", "refused", "refused", "refused"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hook.py"]


@pytest.mark.parametrize(("peak_kib", "forks"), [("math_worker.PEAK_KIB", 1), (0, 7)])
def test_a_child_is_replaced_once_it_has_grown_and_not_for_what_it_says(peak_kib, forks):
    requests = [
        ["$(a last b$", None, 20],
        ["$(last$", None, 20],
        ["3", "3", 20],
        ["3", "4", 20],
        ["4", None, 20],
    ]
    script = f"""
import os
import math_worker
math_worker.PEAK_KIB = {peak_kib}
forks, stdout = [], os.dup(1)
os.register_at_fork(after_in_parent=lambda: forks.append(1))
math_worker.main()
os.write(stdout, str(len(forks)).encode())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=FOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        replies = [worker.stdout.readline()]
        for request in [*requests, ["", None, 20]]:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            replies.append(worker.stdout.readline())
        worker.stdin.close()
        replies.append(worker.stdout.read())
    assert "".join(replies).split("\n") == [
        '"ready"',
        '"(a last b"',
        '"(last"',
        "true",
        "false",
        '"4"',
        "null",
        str(forks),
    ]


@pytest.fixture
def worker():
    """A worker that has answered, as a process and the channel to it."""
    command = [sys.executable, "-P", str(FOLDER / "math_worker.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        channel = Channel(process.stdin.fileno(), process.stdout.fileno())
        assert channel.read_line(time.monotonic() + 60) == b'"ready"\n'
        # The child has been forked and has asked to die with the zygote.
        assert channel.ask(b'["4", "4", 20]\n', 60) == b"true\n"
        yield process, channel
        process.kill()


def has_ended(pid: int) -> None:
    """Assert that a process ends by itself, though a busy machine may take some seconds for it."""
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_worker_whose_trainer_is_gone_ends_at_once_in_the_middle_of_an_answer(worker, is_stopped):
    """Also if its child has been stopped, which no timer ends."""
    process, _ = worker
    child = only_child(process.pid)
    if is_stopped:
        os.kill(child, signal.SIGSTOP)
    hangs = "\\boxed{" + "(" * 4000 + "}"
    process.stdin.write(json.dumps([hangs, None, 60]).encode() + b"\n")
    process.stdin.flush()
    time.sleep(0.2)
    process.stdin.close()
    process.wait(timeout=30)
    has_ended(child)


def test_a_child_stopped_before_it_asks_to_die_with_its_zygote_is_not_left_behind():
    script = """
import os
import signal
import math_worker
math_worker._die_with = lambda parent: os.kill(os.getpid(), signal.SIGSTOP)
math_worker.main()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=FOLDER) as process:
        child = only_child(process.pid, seconds=60)
        process.stdin.write(b'["4", "4", 20]\n')
        process.stdin.flush()
        time.sleep(0.2)
        process.stdin.close()
        process.wait(timeout=30)
        has_ended(child)


def test_a_child_dies_with_its_zygote(worker):
    process, _ = worker
    child = only_child(process.pid)
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait()
    has_ended(child)


@pytest.mark.parametrize("length", [1, 100_000], ids=["short", "longer than a pipe"])
def test_a_stopped_child_costs_one_answer_and_is_replaced(worker, length):
    process, channel = worker
    child = only_child(process.pid)
    os.kill(child, signal.SIGSTOP)
    text = "<answer> 3 </answer>" + " " * length
    in_vain, in_time = (json.dumps([text, "3", seconds]).encode() + b"\n" for seconds in (0.1, 60))
    assert channel.ask(in_vain, 60) == b"null\n"
    assert not is_running(child)
    assert channel.ask(in_time, 60) == b"true\n"
