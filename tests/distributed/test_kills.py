"""A process is killed at a random point of a run, and another number of processes goes on."""

import os
import random
import time

import pytest
from safetensors.torch import load_file

from tests.data.gang import end, gang, start
from tests.data.runs import metrics, run

STEPS = 6


def whole_run(world, argv):
    run(argv)


def kill_one(argv, folder, whom, chance):
    """Kill a process of two at a random point of a run; returns how many steps it had logged."""
    members = start(2, whole_run, argv)
    try:
        log, wanted = folder / "metrics.jsonl", chance.randrange(1, STEPS - 1)
        deadline = time.monotonic() + 100
        while not log.exists() or log.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < deadline and members[whom][0].is_alive()
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 1) * (time.time() - log.stat().st_ctime + 0.3))
        members[whom][0].kill()
        members[1 - whom][0].join(timeout=1)  # it may go on until it needs the other one
    finally:
        end(members)
    assert not (folder / "final").exists()
    return log.read_bytes().count(b"\n")


MOVED = {"none": 1e-5, "optimizer": 1e-5, "full": 2e-5}
"""Largest differences of weights from one process, at a learning rate of 1e-3, over 6 steps.

Without a kill, full has one element of 900,000 that differs by 1.4e-5, since its gradient is mostly
rounding; all others are within 5e-6."""
SETTINGS = dict(steps=STEPS, save_every=2, prompts_per_step=3, num_generations=2)
SETTINGS |= dict(beta_shape="target-kl", eval_samples=0)


@pytest.fixture(scope="module")
def alone(run_args, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(run_args(folder, **SETTINGS))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "optimizer", "full"])
def test_a_killed_run_goes_on_with_another_number(kind, run_args, alone, tmp_path):
    """MR1_FAST_KILLS says at how many random points; each process is killed in turn."""
    chance, two = random.Random(0), tmp_path / "two"
    for point in range(int(os.environ.get("MR1_FAST_KILLS", "2"))):
        folder, whom, size = tmp_path / f"killed{point}", point % 2, (1, 3, 2)[point % 3]
        argv = run_args(folder, sharding=kind, **SETTINGS)
        logged = kill_one(argv, folder, whom, chance)
        left = [path.name for path in (folder / "checkpoints").glob("*")]
        # Before the first checkpoint there is nothing to resume, and `auto` begins again.
        gang(size, whole_run, [*argv, "--resume=auto"])
        if size == 2:  # as it was before it was killed
            if not two.exists():
                gang(2, whole_run, run_args(two, sharding=kind, **SETTINGS))
            assert metrics(folder) == metrics(two)
            model = "final/model.safetensors"
            assert (folder / model).read_bytes() == (two / model).read_bytes()
        found = assert_close(folder, alone, MOVED[kind])
        print(f"{kind}: process {whom} killed after {logged} steps, {left}; on {size}: {found}")
        assert not list((folder / "checkpoints").glob(".*"))


def assert_close(folder, expected, most):
    """Two runs are one up to rounding in fp32: the same samples, all that is measured of them.

    most: bound of a weight's difference. Returns the largest differences, in words.
    """
    name = "completions.jsonl"
    assert (folder / name).read_bytes() == (expected / name).read_bytes()
    worst = 0.0
    for mine, theirs in zip(metrics(folder), metrics(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            worst = max(worst, abs(mine[key] - value) / max(abs(value), 1.0))
    weights, its = (load_file(each / "final/model.safetensors") for each in (folder, expected))
    moved = max((weights[name] - its[name]).abs().max().item() for name in its)
    assert worst < 1e-5 and moved < most
    return f"metrics {worst:.1e}, weights {moved:.1e}"
