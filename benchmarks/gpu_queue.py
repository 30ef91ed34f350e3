"""Run what needs a GPU within some seconds: checks, sweeps, then benchmarks without a result here.

    python benchmarks/gpu_queue.py [SECONDS] [NAME ...] [--dry-run] [--tiny]

gpu.sh says how to use it, gpu_items.py what it runs. An item is skipped if it has a result for this
GPU with the present digest of its sources (names on the command line run in any case), or if its
expected seconds do not fit into the time left. One that fails or overruns does not end the queue.
This file imports the standard library alone: the first item starts at once.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpu_items import BACKGROUND, ITEMS, Item
from sources import ROOT, TABLE, digest

SECONDS = 540
"""Default time: what ten minutes leave when the machine has started."""
PATIENCE = 1.5
"""How many times its expected seconds an item may take."""
RESERVE = 3
"""Seconds at the end in which results are written."""
GRACE = 3
"""Seconds between the request to end and the end of an item that overruns."""
LAST_LINES = 60
"""Lines of output that are kept of an item that prints no document."""
TINY_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}


class GPU(NamedTuple):
    """The GPU whose results these are."""

    name: str
    """As the folder of its results has it."""
    architecture: str | None
    """As the table of launch settings has it."""

    @classmethod
    def find(cls) -> "GPU":
        """Ask the driver, else torch, for the first GPU. SystemExit if there is none."""
        with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
            query = "nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"
            line = subprocess.check_output(query, text=True).splitlines()[0]
            name, capability = line.split(", ")
            return cls(name.lower().replace(" ", "-"), "sm_" + capability.replace(".", ""))
        code = (
            "import torch; from mr1_fast.kernels.tuned import architecture; "
            "print(torch.cuda.get_device_name(), architecture(torch.device('cuda')), sep='\\n')"
        )
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit("there is no GPU here; --tiny tries the queue on a CPU")
        name, architecture = found.stdout.splitlines()
        return cls(name.lower().replace(" ", "-"), architecture)


class Outcome(NamedTuple):
    """What became of an item."""

    name: str
    what: str
    """done, failed …, stopped …, or skipped …"""
    expected: int
    seconds: float | None = None


def start(command: Sequence[str], log: BinaryIO, environment: dict[str, str]) -> subprocess.Popen:
    """Start a command in a process group of its own, its output appended to `log`."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip


def end(process: subprocess.Popen, grace: float = GRACE) -> None:
    """End a process and all that it has started: by a request first, then by force."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)


class Queue:
    """Items in order, a clock, and two folders.

    `results` has a JSON document for each item that has ended, for good. `out` is what a user
    brings back: the log, the summary, the table of launch settings, and the new results in one
    archive, all written again after each item.
    """

    def __init__(
        self,
        items: Sequence[Item],
        background: Sequence[Item],
        seconds: float,
        gpu: GPU,
        results: Path,
        out: Path,
        *,
        chosen: Sequence[str] = (),
        tiny: bool = False,
        begin: Callable[..., subprocess.Popen] = start,
        root: Path = ROOT,
        table: Path = TABLE,
    ):
        self.items, self.background, self.gpu = items, background, gpu
        self.root, self.table = root, table
        self.results, self.out, self.chosen = results, out, chosen
        self.tiny, self.begin = tiny, begin
        self.started = time.monotonic()
        self.stop = self.started + seconds
        self.outcomes: list[Outcome] = []
        self.running: dict[str, subprocess.Popen] = {}
        self.new: list[Path] = []

    def left(self) -> float:
        """Seconds that items may still take."""
        return self.stop - time.monotonic() - RESERVE

    def reason_to_skip(self, item: Item, left: float) -> str | None:
        """Why an item does not run, with `left` seconds; None if it does."""
        if self.chosen and item.name not in self.chosen:
            return "not chosen"
        if self.tiny and item.tiny is None:
            return "needs a GPU"
        if item.needs and not self.tiny and shutil.which(item.needs) is None:
            return f"needs {item.needs}"
        if not self.chosen and self.has_result(item):
            return "has a result"
        if item.seconds > left:
            return f"expected {item.seconds} s, {max(0, left):.0f} s are left"
        return None

    def has_result(self, item: Item) -> bool:
        """Whether there is a result of the present sources, of a command that did not fail."""
        try:
            document = json.loads((self.results / f"{item.name}.json").read_text())
        except (OSError, ValueError):
            return False
        present = item.sources and digest(item.sources, self.gpu.architecture, table=self.table)
        return bool(present) and document.get("sources") == present and not document.get("exit")

    def command(self, item: Item) -> list[str]:
        """The words of the item's command."""
        words = [*item.program, *(item.tiny if self.tiny else item.arguments)]
        words = [sys.executable if word == "python" else word for word in words]
        return [word.replace("{results}", str(self.results)) for word in words]

    def environment(self) -> dict[str, str]:
        """The environment of items; the package is the one beside this folder."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | (
            TINY_ENVIRONMENT if self.tiny else {}
        )

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> bool:
        """Run what fits, and keep what has ended if this is killed; return whether none failed."""
        for folder in (self.results, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.out / "log.txt").unlink()
        try:
            self.start_background()
            for item in self.items:
                reason = self.reason_to_skip(item, self.left())
                outcome = Outcome(item.name, f"skipped: {reason}", item.seconds)
                if reason is None:
                    outcome = self.run_item(item)
                self.outcomes.append(outcome)
                if reason != "not chosen":
                    print(f"{outcome.name}: {outcome.what}", flush=True)
                if reason is None:
                    self.export()
        finally:
            self.end_background()
            self.export()
        return not any(outcome.what.startswith(("failed", "stopped")) for outcome in self.outcomes)

    def start_background(self) -> None:
        """Start what runs beside the items that are still to run, if one of them waits for it."""
        waited = {
            name
            for item in self.items
            if self.reason_to_skip(item, self.left()) is None
            for name in item.after
        }
        for item in self.background:
            if item.name in waited and not (self.tiny and item.tiny is None):
                if item.needs and shutil.which(item.needs) is None:
                    continue
                with (self.out / f"{item.name}.txt").open("wb") as log:
                    process = self.begin(self.command(item), log, self.environment())
                self.running[item.name] = process

    def end_background(self) -> None:
        """End what still runs, and note what became of the background: a failure must show."""
        for item in self.background:
            if process := self.running.get(item.name):
                what = "ended with the queue"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(0)
                    what = f"failed: exit {status}, see {item.name}.txt" if status else "done"
                self.outcomes.append(Outcome(item.name, what, item.seconds))
        for process in self.running.values():
            end(process)

    def run_item(self, item: Item) -> Outcome:
        """Run an item, and keep its document."""
        for name in item.after:
            if process := self.running.get(name):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, min(60.0, self.left() - item.seconds)))
        began, limit = time.monotonic(), self.left()
        if not self.tiny:  # a CPU takes its own time
            limit = min(limit, PATIENCE * item.seconds)
        command = self.command(item)
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n=== {item.name}: {' '.join(command)}\n".encode())
            log.flush()
            offset = log.tell()
            sources = item.sources and digest(item.sources, self.gpu.architecture, table=self.table)
            process = self.running[item.name] = self.begin(command, log, self.environment())
            try:
                status = process.wait(limit)
                what = f"failed: exit {status}" if status else "done"
            except subprocess.TimeoutExpired:
                status, what = None, f"stopped after {limit:.0f} s"
            end(process)
            del self.running[item.name]
        with (self.out / "log.txt").open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        taken = time.monotonic() - began
        if status is not None:
            self.keep(item, lines, status, sources)
        return Outcome(item.name, f"{what}, {taken:.0f} s", item.seconds, taken)

    def keep(self, item: Item, lines: list[str], status: int, sources: str | None) -> None:
        """Write the document that the item printed, or one of its last lines."""
        document = {"benchmark": item.name, "sources": sources, "output": lines[-LAST_LINES:]}
        for line in reversed(lines):
            if line.startswith('{"benchmark"'):
                with contextlib.suppress(ValueError):
                    document = json.loads(line)
                    break
        else:
            if not lines:
                return
        if status:
            document["exit"] = status
        write(self.results / f"{item.name}.json", json.dumps(document) + "\n")
        self.new.append(self.results / f"{item.name}.json")

    # --- output -----------------------------------------------------------------------------------

    def export(self) -> None:
        """Write the summary, the table and the archive."""
        rows = [outcome._asdict() for outcome in self.outcomes]
        seconds = round(time.monotonic() - self.started)
        summary = {"gpu": self.gpu._asdict(), "seconds": seconds, "items": rows}
        write(self.out / "summary.json", json.dumps(summary, indent=1))
        write(self.out / "summary.txt", self.summary())
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(self.table, self.out / "tuned.json")
        partial = self.out / ".results.tar.gz"
        with tarfile.open(partial, "w:gz") as archive:
            beside = [*self.results.glob("*.png"), *self.results.glob("experiment_*")]
            for path in [*self.new, *beside, self.table]:
                if path.is_relative_to(self.root) and path.exists():
                    archive.add(path, path.relative_to(self.root))
        partial.replace(self.out / "results.tar.gz")

    def summary(self) -> str:
        """One line for each item: what became of it, and seconds taken of those expected."""
        lines = [f"{self.gpu.name}, {time.monotonic() - self.started:.0f} s"]
        for outcome in self.outcomes:
            if outcome.what != "skipped: not chosen":
                lines.append(f"{outcome.name:20} expected {outcome.expected:4} s  {outcome.what}")
        return "\n".join(lines) + "\n"

    def plan(self) -> str:
        """What would run, by expected seconds."""
        left, lines = self.left(), []
        total = 0
        for item in self.items:
            reason = self.reason_to_skip(item, left - total)
            if reason != "not chosen":
                lines.append(f"{item.name:20} {f'skipped: {reason}' if reason else item.seconds}")
            total += 0 if reason else item.seconds
        return "\n".join([*lines, f"{'in all':20} {total} of {self.stop - self.started:.0f} s"])


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="SECONDS or NAME", help=f"default {SECONDS}")
    parser.add_argument("--dry-run", action="store_true", help="name what would run, and end")
    parser.add_argument("--tiny", action="store_true", help="try every item on a CPU, tiny")
    arguments = parser.parse_args()
    seconds = [float(word) for word in arguments.words if word.replace(".", "").isdigit()]
    chosen = [word for word in arguments.words if not word.replace(".", "").isdigit()]
    unknown = set(chosen) - {item.name for item in ITEMS}
    if unknown:
        names = ", ".join(item.name for item in ITEMS)
        parser.error(f"{', '.join(sorted(unknown))}: expected names among {names}")
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    gpu = GPU("tiny", None) if arguments.tiny else GPU.find()
    results = out / "results" if arguments.tiny else ROOT / "benchmarks" / "results" / gpu.name
    limit = seconds[0] if seconds else SECONDS
    options = {"chosen": chosen, "tiny": arguments.tiny}
    if arguments.tiny:
        from forked import start as begin

        options["begin"] = begin
    queue = Queue(ITEMS, BACKGROUND, limit, gpu, results, out, **options)
    if arguments.dry_run:
        print(queue.plan())
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        right = queue.run()
    finally:
        print("\n" + queue.summary(), flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
