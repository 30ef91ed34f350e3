"""A training step on one process and on several: seconds by stage, efficiency, bytes sent.

    python benchmarks/bench_distributed.py [--processes 2] [--kinds none optimizer full]
        [--model small] [--rounds 5] [any flag of python -m mr1_fast.train]

Strong scaling: every case takes the same steps with the same prompts, 8 of 4 completions unless
flags say otherwise, so that N processes at an efficiency of 100% take 1/N of the time of one:
efficiency = t₁ / (N · t_N), of a stage as of the step. A stage takes as long as in its slowest
process; waiting for others counts where it happens. The CPU seconds of all processes together
count no waiting, neither for one another nor for whatever else runs on the machine.

Weights are random, so that nearly every completion has all its tokens. On CPUs each process has one
thread and they talk over gloo; on GPUs each has one of its own, over NCCL. Cases take turns, step
by step, and those that are not at work sleep; times are medians. Bytes are the most that a process
sends, counted by the system on the process's own TCP sockets, which NCCL does not use within a
machine; beside them is the memory plan's formula. A kind that does not work is left out with one
line. Prints a Markdown table; the last line is one JSON document.
"""

import os
import socket
import stat
import statistics
import struct
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
from bench_memory import make_model
from measure import excused, finish, make_parser, pick_device, print_table

from mr1_fast.ahead import Ahead
from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.model.known import find_model_config
from mr1_fast.preparing import prepare
from mr1_fast.seeds import seed_step
from mr1_fast.train import grpo_step

STAGES = ("rollout", "reward", "reference", "update")
PACK = 10**6
"""Tokens of a pack: so many that each process has one."""
SIZES = ["--prompts-per-step", "8", "--num-generations", "4", "--max-new-tokens", "32"]
QUICK = ["--prompts-per-step", "2", "--num-generations", "2", "--max-new-tokens", "4"]
SECONDS = 600.0
"""A case that answers nothing for so long has failed."""


class Case(NamedTuple):
    """Processes that train together, and what is sharded between them."""

    processes: int
    kind: str

    @property
    def name(self) -> str:
        """What the tables call it; a failure of one process ends the run (measure.excused)."""
        return "ours" if self.processes == 1 else f"{self.processes} processes, {self.kind}"


# --- one process of a case ------------------------------------------------------------------------


def member(rank: int, case: Case, port: int, config: TrainConfig, pipe: Connection) -> None:
    """Take the steps whose numbers come through the pipe, and answer what each of them took."""
    torch.set_num_threads(1)
    if case.processes > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)},
            **{"LOCAL_WORLD_SIZE": str(case.processes)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        run = prepare(config)
        if case.processes > 1 and run.sharding.kind != case.kind:
            raise NotImplementedError(f"this version has no --sharding {case.kind}")
        run.log.create()
        with Ahead(run, thread=False) as ahead:
            pipe.send("ready")
            while (step := pipe.recv()) is not None:
                pipe.send(one_step(run, ahead, step))
    except Exception as error:
        pipe.send(error)


def one_step(run, ahead: Ahead, step: int) -> dict[str, float]:
    """Take a step; returns its seconds, those of its stages, and the bytes that it has sent."""
    data = ahead.take(step)
    seed_step(run.config.seed, step)
    run.world.barrier()
    sent, start, cpu = sent_bytes(), time.perf_counter(), time.process_time()
    metrics = grpo_step(run, data.examples, step, data.prompts)
    run.world.barrier()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "sent": sent_bytes() - sent,
        "completion_length": metrics["completion_length"],
        **{stage: metrics[f"seconds_{stage}"] for stage in STAGES},
    }


def sent_bytes() -> int:
    """Bytes that this process has sent over its TCP sockets so far (`tcpi_bytes_sent`, Linux)."""
    total = 0
    for entry in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing is gone
            if not stat.S_ISSOCK(os.fstat(entry).st_mode):
                continue
            with socket.socket(fileno=os.dup(entry)) as each:
                information = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                total += struct.unpack_from("Q", information, 200)[0]
    return total


# --- all cases ------------------------------------------------------------------------------------


class Gang:
    """The processes of a case, which wait until they are told to take a step; a context manager."""

    def __init__(self, case: Case, config: TrainConfig):
        # Forked from a server that has imported the package once, and has not touched a GPU.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mr1_fast.train"])
        self.pipes, self.processes, port = [], [], free_port()
        for rank in range(case.processes):
            mine, its = context.Pipe()
            arguments = (rank, case, port, config, its)
            self.processes.append(context.Process(target=member, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(mine)

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *_) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5.0)
            process.kill()
            process.join()

    def answers(self) -> list:
        """What each process answers. Raises what one of them has raised."""
        found = {}
        while len(found) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in found], SECONDS)
            if not ready:
                raise TimeoutError(f"no answer within {SECONDS:.0f} s")
            for pipe in ready:
                found[pipe] = pipe.recv()
                if isinstance(found[pipe], Exception):
                    raise found[pipe]
        return [found[pipe] for pipe in self.pipes]

    def step(self, number: int) -> dict[str, float]:
        """Take a step; returns the largest figure of any process, of CPU seconds the sum of all."""
        for pipe in self.pipes:
            pipe.send(number)
        found = self.answers()
        largest = {name: max(each[name] for each in found) for name in found[0]}
        return {**largest, "cpu_seconds": sum(each["cpu_seconds"] for each in found)}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure(cases: list[Case], configs: dict[Case, TrainConfig], rounds: int) -> tuple[dict, dict]:
    """Return the steps of each case that works, and why others do not; the first step is not timed.

    The weights change alike in all of them, so their steps do the same work.
    """
    gangs, steps, skipped = {}, {}, {}
    with ExitStack() as stack:
        for case in cases:
            with excused(case.name, skipped):
                gang = stack.enter_context(Gang(case, configs[case]))
                gang.answers()
                gang.step(0)
                gangs[case], steps[case] = gang, []
        for number in range(1, rounds + 1):
            for case, gang in gangs.items():
                if case.name not in skipped:
                    with excused(case.name, skipped):
                        steps[case].append(gang.step(number))
    return {case: taken for case, taken in steps.items() if case.name not in skipped}, skipped


def rows_of(steps: dict[Case, list[dict]], formula: dict[Case, int | None]) -> list[dict]:
    """A row for each case: medians, and efficiencies against the first one, of one process."""
    rows = []
    for case, taken in steps.items():
        median = {name: statistics.median(step[name] for step in taken) for name in taken[0]}
        row = {"processes": case.processes, "kind": case.kind, **median}
        alone = rows[0] if rows else row
        row["efficiency"] = {
            name: alone[name] / (case.processes * row[name]) for name in ("seconds", *STAGES)
        }
        row["efficiency"]["cpu_seconds"] = alone["cpu_seconds"] / row["cpu_seconds"]
        rows.append({**row, "sent_by_formula": formula[case]})
    return rows


def print_rows(title: str, rows: list[dict]) -> None:
    """Print a table of seconds with the efficiency in brackets, and of MiB sent."""
    table = []
    for row in rows:
        times = [
            f"{row[name]:.2f} ({row['efficiency'][name]:.0%})"
            for name in ("seconds", *STAGES, "cpu_seconds")
        ]
        sizes = [row["sent"], row["sent_by_formula"]]
        sent = [None if size is None else f"{size / 2**20:,.1f}" for size in sizes]
        table.append([row["processes"], row["kind"], *times, *sent])
    columns = ["processes", "sharding", "step, s", *STAGES, "CPU of all", "MiB sent", "by formula"]
    print_table(title, columns, table)


def planned_bytes(case: Case, config: TrainConfig) -> int | None:
    """Bytes that a process sends in a step by the plan's formula; None where it has none."""
    if case.processes == 1:
        return 0
    try:
        from mr1_fast.plan.planned_run import planned_run
        from mr1_fast.plan.wires import step_wires

        run = planned_run(config, find_model_config(config.model), case.processes)
        return step_wires(run, packs=1).total
    except (ImportError, TypeError, AttributeError):
        return None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    kinds = ["none", "optimizer", "full"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--model", default="small", help="a built-in or published model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny, to try the script out")
    arguments, flags = parser.parse_known_args()
    device = pick_device(arguments.device)
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.model, arguments.rounds = "tiny", 1
    several = [Case(n, kind) for n in arguments.processes for kind in arguments.kinds]
    cases = [Case(1, "none"), *several]
    with tempfile.TemporaryDirectory() as scratch:
        model, configs = Path(scratch) / "model", {}
        make_model(arguments.model, model, "cpu")
        own = ["--model", str(model), "--device", device, "--tokens-per-microbatch", str(PACK)]
        own += ["--task", "counting", "--eval-samples", "0", "--save-every", "0"]
        own += ["--steps", str(arguments.rounds + 1), *(QUICK if arguments.quick else SIZES)]
        own += ["--dtype", "float32"] if device == "cpu" else []
        for number, case in enumerate(cases):
            its = ["--sharding", case.kind, "--output", f"{scratch}/run-{number}"]
            configs[case] = parse_train_config([*own, *its, *flags])
        formula = {case: planned_bytes(case, config) for case, config in configs.items()}
        steps, skipped = measure(cases, configs, arguments.rounds)
    rows = rows_of(steps, formula)
    config = configs[cases[0]]
    what = f"{config.prompts_per_step} × {config.num_generations} completions"
    length = f"{rows[0]['completion_length']:.0f} tokens"
    title = f"A step of {arguments.model}, {what} of {length}, seconds (efficiency), on {device}"
    print_rows(title, rows)
    settings = {"model": arguments.model, "rounds": arguments.rounds, "flags": flags}
    settings |= {"quick": arguments.quick, "scaling": "strong"}
    finish("distributed", device, settings=settings, rows=rows, skipped=skipped)


if __name__ == "__main__":
    main()
