"""The sections of a run's page: speed and time left, the last step, and what was skipped."""

import numpy as np
import pytest

from mr1_fast.report.run_report import write_report
from mr1_fast.report.sections import accuracy_section, duration, speed_tiles

from .test_completions import completion, group, write_groups
from .test_run_report import HOSTILE, Page, grpo_step, make_run, sft_step

CONFIG = {"steps": 400, "prompts_per_step": 4, "num_generations": 8}
NO_EVALUATIONS = {"seconds": np.array([])}


def columns(steps, **changed):
    given = {"step": np.arange(float(steps)), "seconds_rollout": np.full(steps, 1.0)}
    return given | {"seconds_update": np.full(steps, 2.0)} | changed


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5300, "88 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_time_left_is_that_of_the_recent_steps_and_of_the_evaluations():
    slow = np.r_[np.full(50, 100.0), np.full(50, 2.0)]  # compiling and so on, at the beginning
    found = columns(100, seconds_update=slow)
    assert "<b>15 min" in speed_tiles(found, NO_EVALUATIONS, CONFIG, live=True)  # 300 · 3 s
    config = CONFIG | {"eval_every": 50}
    evaluations = {"seconds": np.array([60.0, 600.0, np.nan, 600.0])}
    assert "<b>75 min" in speed_tiles(found, evaluations, config, live=True)  # and 6 · 600 s
    assert "Time left" not in speed_tiles(found, NO_EVALUATIONS, CONFIG, live=False)


def test_speed_tokens_use_and_memory():
    more = {
        "completion_length": np.full(4, 150.0),
        "mfu_update": np.array([0.1, 0.42, 0.42, 0.42]),
        "peak_gib_update": np.array([21.25, 20, 20, 20]),
        "peak_gib_rollout": np.full(4, 18.0),
    }
    shown = speed_tiles(columns(4, **more), NO_EVALUATIONS, CONFIG, live=False)
    for value in ("<b>20 <small>steps/min", "3 s a step", "1,600 <small>tokens/s", "<b>42%"):
        assert value in shown
    assert "<b>21.2 <small>GiB" in shown and "in the update" in shown
    alone = speed_tiles(columns(4), NO_EVALUATIONS, {}, live=True)
    assert "steps/min" in alone and "MFU" not in alone and "Time left" not in alone
    assert speed_tiles({"step": np.array([])}, NO_EVALUATIONS, CONFIG, live=True) == ""


def test_last_step_shows_rewards_and_the_best_and_worst_completion(tmp_path):
    run = make_run(tmp_path)
    worst = completion(HOSTILE, reward=-0.25, accuracy=0.0, why="no answer", reason="length")
    best = completion("the best", reward=2.5, brief=0.5)
    write_groups(
        run,
        [
            group(0, completions=[completion("of step 0", reward=9.0)]),
            group(1, completions=[completion("between"), worst]),
            group(1, problem="Which?", completions=[best, completion("between")]),
        ],
    )
    page = Page(write_report(run))
    assert "Completions of step 1" in page.headings()
    assert "Rewards of the last step" in page.plots()
    assert "Highest reward, reward 2.5 · accuracy 1 · format 1 · brief 0.5 · ended by eos" in (
        page.text
    )
    assert "Lowest reward, reward -0.25 · accuracy 0 · format 1 · ended by length" in page.text
    assert "the best" in page.text and "Which?" in page.text and HOSTILE in page.text
    assert "of step 0" not in page.text and "between" not in page.text


def test_last_step_of_equal_rewards_and_of_none(tmp_path):
    run = make_run(tmp_path)
    write_groups(run, [group(0)])
    assert "All completions have the same reward" in Page(write_report(run)).text
    write_groups(run, [group(0, completions=[completion(accuracy=None)])])
    assert "✗" not in Page(write_report(run)).text, "neither right nor wrong"
    write_groups(run, [group(0, completions=[completion(reward=None)])])
    page = Page(write_report(run))
    assert "Completions" in page.headings() and "Search and filter" in page.text


def test_skipped_steps_are_listed(tmp_path):
    steps = [sft_step(step) | {"skipped": float(step in (3, 5))} for step in range(8)]
    page = Page(write_report(make_run(tmp_path / "a", steps, algo="sft")))
    assert "2 of 8 steps changed no weight" in page.text and " counted: 3, 5." in page.text
    steps = [sft_step(step) | {"skipped": 1.0} for step in range(30)]
    text = Page(write_report(make_run(tmp_path / "b", steps, algo="sft"))).text
    assert "30 of 30 steps changed no weight" in text and "18, 19 and others." in text
    assert (
        "skipped"
        not in Page(write_report(make_run(tmp_path / "c", [sft_step(0)], algo="sft"))).text
    )


def test_evaluations_and_extra_rewards_have_plots(tmp_path):
    run = make_run(
        tmp_path,
        [grpo_step(step, brief=0.1 * step) for step in range(4)],
        extra_rewards={"brief": 0.1},
    )
    line = '{"step": %d, "accuracy": 0.5, "interval": [0.4, 0.6], "seconds": 3}\n'
    (run / "evaluations.jsonl").write_text(line % 0 + line % 2 + '{"step": 4, "acc')
    page = Page(write_report(run))
    assert page.plots()[:4] == ["Held-out accuracy", "Reward", "Accuracy", "Reward brief"]
    assert len(page.curves()["Reward brief"]) == 1


def test_the_step_of_the_final_model_is_named():
    score = {"accuracy": 0.5, "interval": [0.2, 0.8], "correct": 4, "count": 8}
    evaluation = {"before": {"greedy": score}, "after": {"greedy": score}, "final_step": "<40>"}
    assert "The final model is that after step &lt;40&gt;." in accuracy_section(evaluation)
    del evaluation["after"]
    assert "Not yet evaluated after training." in accuracy_section(evaluation)
