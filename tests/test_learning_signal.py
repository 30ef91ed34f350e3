"""A run without a signal says so once, with what to change; one with a signal says nothing."""

from mr1_fast.learning_signal import STEPS, LearningSignal

from .data.runs import run

FLAT = {"finished": 1.0, "zero_variance": 1.0, "reward_min": 1.0, "reward_max": 1.0}


def said(steps, total=None):
    """Everything that is said over the steps, with the step at which it is."""
    signal = LearningSignal(total or len(steps))
    return [(step, text) for step, metrics in enumerate(steps) for text in signal.look(metrics)]


def test_equal_rewards_are_named_once():
    [(step, text)] = said([FLAT] * 30)
    assert step == STEPS - 1
    assert "in no group of the last 10 steps" in text and "All were 1: " in text


def test_a_short_run_speaks_at_its_last_step():
    assert [step for step, _ in said([FLAT] * 3)] == [2]
    assert said([FLAT] * 3, total=40) == []


def test_one_group_with_a_signal_is_enough():
    with_signal = FLAT | {"zero_variance": 0.9, "reward_max": 2.0}
    assert said([*[FLAT] * 9, with_signal] * 5) == []
    assert [step for step, _ in said([with_signal, *[FLAT] * 20])] == [STEPS]


def test_rewards_that_differ_between_prompts_alone_have_their_own_advice():
    [(_, text)] = said([FLAT | {"reward_min": 0.0}] * 10)
    assert "raise --num-generations" in text and "All were" not in text


def test_cut_completions_are_named_whether_or_not_rewards_differ():
    cut = FLAT | {"finished": 0.02}
    texts = [text for _, text in said([cut] * 10)]
    assert len(texts) == 2 and "2% of those" in texts[0] and "--max-new-tokens" in texts[0]
    [(_, text)] = said([cut | {"zero_variance": 0.0, "reward_max": 2.0}] * 10)
    assert text.startswith("completions are cut")
    assert said([cut | {"zero_variance": 0.0, "finished": 0.5}] * 10) == []


def test_supervised_training_has_no_rewards_to_watch():
    assert said([{"loss": 1.0}] * 20) == []


def test_a_flat_run_says_so_on_the_screen(run_args, tmp_path, capsys):
    settings = dict(max_new_tokens=4, steps=3, eval_samples=0, extra_rewards="{}")
    run(run_args(tmp_path / "run", **settings))
    said = capsys.readouterr().out
    assert said.count("nothing is learnt: in no group of the last 3 steps") == 1
    assert said.count("completions are cut: ") == 1 and "--max-new-tokens" in said
