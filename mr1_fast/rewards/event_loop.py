"""The event loop in which async reward functions run: one thread, as long as the process lives.

The loop is kept from step to step since clients of a service, which a function often keeps in a
global variable, belong to the loop in which they were first used.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = 32
"""How many calls of `asyncio.to_thread` run at a time."""

_lock = threading.Lock()
_running: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None


def wait_in_loop(awaitable: Awaitable) -> Any:
    """Await something in the event loop; returns its result, or raises its exception."""
    return asyncio.run_coroutine_threadsafe(_wait_for(awaitable), _event_loop()).result()


def give_up_loop() -> None:
    """Cancel all that runs in the event loop; the next function runs in another.

    A function that blocks the loop cannot be cancelled, and would block those that come after it.
    """
    global _running
    with _lock:
        if _running is not None:
            loop, _ = _running
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
        _running = None


async def _cancel_all() -> None:
    """Cancel all other tasks of the loop, and stop it when they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    asyncio.get_running_loop().stop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _wait_for(awaitable: Awaitable) -> Any:
    return await awaitable


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop; its thread is started at the first call, and anew in a forked child."""
    global _running
    with _lock:
        if _running is None or not _running[1].is_alive():
            loop = asyncio.new_event_loop()
            loop.set_default_executor(DaemonThreads(THREADS))
            thread = threading.Thread(target=_run, args=(loop,), daemon=True, name="async rewards")
            thread.start()
            _running = loop, thread
        return _running[0]


class DaemonThreads(ThreadPoolExecutor):
    """Runs each call in a thread of its own, at most `max_workers` at a time.

    ThreadPoolExecutor's own threads are joined when the process exits, so that a call which hangs
    would keep it for ever; these are not.
    """

    def __init__(self, max_workers: int):
        super().__init__(max_workers)
        self.places = threading.Semaphore(max_workers)

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Start a thread for the call; returns the future of its result."""
        future: Future = Future()

        def work() -> None:
            with self.places:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="async reward's thread").start()
        return future
