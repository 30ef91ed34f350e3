"""Start the queue's commands as forks of a process that has imported everything, on a CPU alone.

gpu_queue.py --tiny tries every script; imports would take most of its time. Sweeps run in Triton's
interpreter, which is chosen when Triton is imported, so here it is chosen for all; the benchmarks
then use the kernels for CPUs.
"""

import contextlib
import gc
import importlib
import os
import runpy
import subprocess
import sys
import time
import traceback
from functools import lru_cache
from typing import BinaryIO

PACKAGES = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "triton",
    "matplotlib.pyplot",
    "transformers.generation",
    "trl.trainer.grpo_trainer",
    "liger_kernel.chunked_loss",
    "mr1_fast.train",
)
"""What is imported before the first fork; those that are not installed are left out."""


class Forked:
    """A forked command, with what the queue needs of subprocess.Popen."""

    def __init__(self, command: list[str], log: BinaryIO, environment: dict[str, str]):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.environ.update(environment)
            code = run(command[1:])
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit status, or −n of signal n."""
        stop = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > stop:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            else:
                time.sleep(0.01)
        return self.returncode


def run(words: list[str]) -> int:
    """Run `script …` or `-m module …` as Python would; return its exit status."""
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the fork's own, until its end)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    # The first call after a fork replaces torch's thread pool. Two threads that make it at once,
    # as transformers' when it loads a model, can find none ("Invalid thread pool!").
    import torch

    torch.set_num_threads(1)
    if not words[0].endswith("sweep.py"):
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def start(command: list[str], log: BinaryIO, environment: dict[str, str]) -> Forked:
    """Start a command of this Python, as gpu_queue.start does."""
    os.environ |= {**environment, "TRITON_INTERPRET": "1"}
    prepare()
    return Forked(command, log, environment)


@lru_cache
def prepare() -> None:
    """Import what the commands need, once."""
    sys.path.insert(0, os.environ["PYTHONPATH"].split(os.pathsep)[0])
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    from mr1_fast.model.tiny import tiny_model, tiny_processor

    torch.set_num_threads(1)  # a fork has none of the threads that exist here
    tiny_model(tiny_processor())  # transformers imports a model's modules when they are used
    gc.freeze()  # measure.release collects garbage: not among all that was imported
