"""Fuzzing of what reads hostile input: the judge, data, images, settings, records and prompts.

    python -m tests.fuzz.fuzz_readers --seconds 60
    python -m tests.fuzz.fuzz_readers --seconds 300 judge image

It needs `pip install atheris`, which the package and its tests do not. Each target has a process
of its own, in which libFuzzer makes inputs by the coverage of the instrumented code. An input must
end in a result or in a UserError of one line and at most 500 characters. The last line is one JSON
document: for each target the executions, the inputs that ended otherwise with up to five of them,
the slowest input in seconds, and how the process ended (0, or libFuzzer's status for an input of
more than 20 s, of more than 2 GiB, or one that ends the process). The script's status is 1 unless
all is well. Such inputs stay in --keep, from where a target is given one again:

    python -m tests.fuzz.fuzz_readers --again FILE judge
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LONGEST = 500
"""The most characters of a message."""
SECONDS, MEGABYTES = 20, 2048
"""The time and memory that an input may take."""
INSTRUMENTED = ("mr1_fast.rewards", "mr1_fast.tasks", "mr1_fast.report.records")
INSTRUMENTED += (
    "mr1_fast.setting_values",
    "mr1_fast.settings_file",
    "mr1_fast.command_line",
    "mr1_fast.model.prompt",
    "PIL",
)


def main() -> int:
    """Fuzz the targets that are named, or all of them, one after the other."""
    from .targets import TARGETS  # it imports what is fuzzed only when a target is made

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", help=f"some of: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="how long each target is fuzzed")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder of bad inputs")
    parser.add_argument("--again", type=Path, help="a file to give to the target that is named")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(unknown)}")
    if args.again:
        TARGETS[args.targets[0]].make()(args.again.read_bytes())
        return 0
    if args.in_process:
        fuzz(args.targets[0], args.keep, args.seconds)
    counts = {name: run(name, args) for name in args.targets or TARGETS}
    print(json.dumps(counts))
    return any(each["exceptions"] or each["status"] for each in counts.values())


def run(name: str, args: argparse.Namespace) -> dict:
    """Fuzz a target in a process of its own, and return its counts."""
    args.keep.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.fuzz_readers", name, "--in-process"]
    command += ["--seconds", str(args.seconds), "--keep", str(args.keep.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MR1_FAST_CACHE": folder, "TMPDIR": folder}
        log = args.keep / f"{name}.log"
        with log.open("wb") as output:
            status = subprocess.run(
                command, stdout=output, stderr=output, env=environment, check=False
            ).returncode
    counts = Counts(args.keep / f"{name}.json").read() | {"status": status}
    print(f"{name}: {counts}", file=sys.stderr)
    return counts


class Counts:
    """What is counted of a target, in a file: libFuzzer may end the process at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.executions = self.exceptions = 0
        self.slowest = 0.0
        self.shown: dict[str, str] = {}
        self.written = 0.0

    def read(self) -> dict:
        """Return what the file says."""
        if self.path.is_file():
            return json.loads(self.path.read_text())
        return {"executions": 0, "exceptions": 0, "slowest": 0.0, "shown": {}}

    def write(self) -> None:
        """Write the file, as a whole."""
        names = ("executions", "exceptions", "slowest", "shown")
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({name: getattr(self, name) for name in names}))
        os.replace(partial, self.path)
        self.written = time.monotonic()


def fuzz(name: str, keep: Path, seconds: int) -> None:
    """Fuzz a target in this process, which libFuzzer ends."""
    import atheris

    from .targets import TARGETS

    target = TARGETS[name]
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        call = target.make()
    counts = Counts(keep / f"{name}.json")
    counts.write()
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup(
        [
            *(sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-timeout={SECONDS}"),
            *(f"-rss_limit_mb={MEGABYTES}", f"-max_len={target.longest}", "-print_final_stats=1"),
            *("-close_fd_mask=0", f"-artifact_prefix={keep}/{name}-", "-verbosity=0"),
        ],
        lambda content: counted(call, content, counts),
    )
    atheris.Fuzz()


def counted(call: Callable[[bytes], None], content: bytes, counts: Counts) -> None:
    """Give a target one input, and count how that ended."""
    from mr1_fast.errors import UserError

    start = time.monotonic()
    fault = None
    try:
        call(content)
    except UserError as error:
        if len(str(error)) > LONGEST or "\n" in str(error):
            fault = f"a message of {len(str(error))} characters: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
    seconds = time.monotonic() - start
    counts.executions += 1
    counts.exceptions += fault is not None
    if fault and len(counts.shown) < 5 and fault[:40] not in str(counts.shown):
        kept = counts.path.with_name(f"{counts.path.stem}-{counts.executions}")
        kept.write_bytes(content)
        counts.shown[kept.name] = fault[:300]
    is_slower = seconds > counts.slowest
    counts.slowest = round(max(seconds, counts.slowest), 3)
    if is_slower or fault or time.monotonic() - counts.written > 1:
        counts.write()


if __name__ == "__main__":
    sys.exit(main())
