"""Processes that run functions of tests together, as torchrun's do, over gloo on the CPU.

    results = gang(2, work, argument)     # work(world, argument) of each, in the order of ranks

`work` is a function at the top of a test file; it gets the World of its process first. Processes
are forked from a server that has imported torch and the package, which takes it seconds once, so
that each call starts within about a second. An exception in one of them is raised here, with the
number of its process; what takes longer than `seconds` is ended.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from .faults import preloaded

PRELOADED = ["tests.data.preloaded"]


def gang(size: int, work: Callable, *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """Return what work(world, *arguments) returns in each of `size` processes."""
    members = start(size, work, *arguments)
    try:
        return _results([receiver for _, receiver in members], seconds)
    finally:
        end(members)


def start(size: int, work: Callable, *arguments: Any) -> list[tuple[BaseProcess, Connection]]:
    """Start `size` processes that run work(world, *arguments); each with where its result comes."""
    context, port = server(), free_port()
    members = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_member, args=(rank, size, port, sender, work, arguments), daemon=True
        )
        with preloaded():  # the server is started with the first process
            process.start()
        sender.close()
        members.append((process, receiver))
    return members


def prepared(work: Callable, *arguments: Any, seconds: float = 600) -> Any:
    """Return work(*arguments) of one process, by which faults.py can make calls fail."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = server().Process(target=_answer, args=(sender, work, arguments), daemon=True)
    with preloaded():
        process.start()
    sender.close()
    try:
        assert receiver.poll(seconds), "not done in time"
        kind, value = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise AssertionError("the process died") from None
    finally:
        process.kill()
        process.join()
    if kind == "error":
        raise AssertionError(value)
    return value


def _answer(sender, work: Callable, arguments: tuple) -> None:
    try:
        answer = "result", work(*arguments)
    except BaseException:
        answer = "error", traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    os._exit(0)


def server() -> BaseContext:
    """Return what starts processes as forks of the one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def end(members: list[tuple[BaseProcess, Connection]]) -> None:
    """Kill the processes that are still there."""
    for process, _ in members:
        process.kill()
        process.join()


def _results(receivers: list, seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [each for rank, each in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout=seconds)
        assert ready, f"processes {set(range(len(receivers))) - set(results)} did not end in time"
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise AssertionError(f"process {rank} died") from None
            if kind == "error":
                raise AssertionError(f"process {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _member(rank: int, size: int, port: int, sender, work: Callable, arguments: tuple) -> None:
    import torch

    from mr1_fast.distributed.launch import join_world

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
        **{"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    _answer(sender, lambda: work(join_world("cpu"), *arguments), ())


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_one_of(rank: int, size: int = 2, **more: Any) -> dict[str, str]:
    """Return what torchrun tells process `rank` of `size` on one machine, by its environment."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(value) for name, value in {**names, **more}.items()}
