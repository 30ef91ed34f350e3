"""The stages of a step, measured by one process and put together of several."""

import time

from mr1_fast.stopwatch import Stopwatch
from tests.data.gang import gang


def test_several_laps_of_a_stage_add_up():
    clock = Stopwatch()
    for stage in ("rollout", "reward", "rollout"):
        time.sleep(0.01)
        clock.lap(stage)
    clock.waited()
    assert clock.laps["seconds_rollout"] >= 0.02 and clock.laps["seconds_reward"] >= 0.01
    assert clock.of_all() == clock.laps and "seconds_wait" not in clock.laps


def one_is_slow(world):
    clock = Stopwatch(world)
    time.sleep(0.2 * (world.rank == 1))
    clock.lap("rollout")
    world.barrier()
    clock.waited()
    clock.laps["peak_gib_rollout"] = 3.0 - world.rank
    return clock.laps, clock.of_all()


def test_a_step_has_the_slowest_seconds_and_the_largest_peak_of_all_processes():
    (first, whole), (second, again) = gang(2, one_is_slow)
    assert whole == again and second["seconds_rollout"] >= 0.2 > first["seconds_rollout"]
    assert whole["seconds_rollout"] == second["seconds_rollout"]
    assert whole["peak_gib_rollout"] == 3.0
    waits = [laps["seconds_wait"] for laps in (first, second)]
    assert whole["seconds_wait"] == sum(waits) / 2 and waits[0] > 0.1 > waits[1]
