"""What a run shows beside its progress bar."""

import time

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.log import RunLog, Stopwatch

GRPO = {"reward": 1.25, "accuracy": 0.5, "kl": 0.001, "beta": 0.07, "completion_length": 10.5}
SHOWN = "reward 1.25 · accuracy 0.5 · kl 0.001 · beta 0.07 · completion_length 10.5"


@pytest.mark.parametrize(
    "metrics, shown",
    [
        ({"loss": 0.5, **GRPO, "tflops_update": 0.2}, SHOWN),
        ({"loss": 0.5, **GRPO, "mfu_reference": 0.5, "mfu_update": 0.417}, f"{SHOWN} · mfu 42%"),
        ({"loss": 0.5}, "loss 0.5000"),
        ({"loss": 0.5, "mfu_update": 0.417}, "loss 0.5000 · mfu 42%"),
    ],
)
def test_the_progress_bar_shows_mfu_where_it_is_known(metrics, shown, tmp_path):
    log = RunLog(TrainConfig(output=str(tmp_path / "run"), steps=1))
    log.create()
    log.start(0)
    log.step(0, metrics)
    assert log.bar.postfix == shown
    log.close()


def test_several_laps_of_a_stage_add_up():
    clock = Stopwatch()
    for stage in ("rollout", "reward", "rollout"):
        time.sleep(0.01)
        clock.lap(stage)
    assert clock.laps["seconds_rollout"] >= 0.02 and clock.laps["seconds_reward"] >= 0.01
