"""The event loop of async rewards: kept, given up, and replaced in a forked child."""

import asyncio
import os
import threading
from concurrent.futures import CancelledError

import pytest

from mr1_fast.rewards.event_loop import THREADS, DaemonThreads, give_up_loop, wait_in_loop


async def running_loop():
    return asyncio.get_running_loop()


def test_a_loop_is_kept_until_it_is_given_up():
    first = wait_in_loop(running_loop())
    assert wait_in_loop(running_loop()) is first
    give_up_loop()
    assert wait_in_loop(running_loop()) is not first


def test_what_runs_in_a_loop_is_cancelled_when_it_is_given_up():
    waiting, cancelled = threading.Event(), threading.Event()

    async def wait():
        waiting.set()
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def await_it():
        with pytest.raises(CancelledError):
            wait_in_loop(wait())

    thread = threading.Thread(target=await_it)
    thread.start()
    assert waiting.wait(60)
    give_up_loop()
    assert cancelled.wait(60)
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_of_a_loop_that_is_given_up_ends():
    async def thread():
        return threading.current_thread()

    given_up = wait_in_loop(thread())
    give_up_loop()
    given_up.join(60)
    assert not given_up.is_alive()


def test_a_forked_child_has_a_loop_of_its_own():
    wait_in_loop(running_loop())
    child = os.fork()
    if child == 0:  # without the parent's thread, its loop would never answer
        done = threading.Event()
        threading.Thread(
            target=lambda: (wait_in_loop(running_loop()), done.set()), daemon=True
        ).start()
        os._exit(0 if done.wait(60) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_have_daemon_threads_and_a_limited_number_of_them():
    places, most, lock = 3, [0, 0], threading.Lock()
    threads = DaemonThreads(places)
    everyone = threading.Event()

    def call(number):
        assert threading.current_thread().daemon
        with lock:
            most[0] += 1
            most[1] = max(most)
            if most[0] == places:
                everyone.set()
        assert everyone.wait(60)
        with lock:
            most[0] -= 1
        return number

    futures = [threads.submit(call, number) for number in range(10)]
    assert [future.result(60) for future in futures] == list(range(10))
    assert most[1] == places < THREADS
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(60)
