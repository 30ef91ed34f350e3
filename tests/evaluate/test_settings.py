"""The settings of an evaluation: what no evaluation could mean is refused."""

import pytest

from mr1_fast.errors import UserError
from mr1_fast.evaluate.settings import EvaluateConfig

WRONG = {
    "samples": ({"samples": 0}, "samples is 0, but must be at least 1"),
    "batch": ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
    "generations": ({"num_generations": 0}, "num_generations is 0, but must be at least 1"),
    "tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0, but must be 0 or"),
    "greedy": (
        {"num_generations": 4},
        "num_generations is above 1, but greedy samples are all alike: set --temperature",
    ),
    "k": ({"pass_at": [1, 2]}, r"pass_at is \[1, 2\], but each k must lie in 1 … num_generations"),
    "no k": ({"pass_at": []}, r"pass_at is \[\]"),
    "k of 0": ({"pass_at": [0]}, r"pass_at is \[0\]"),
    "top_p": ({"top_p": 0.0}, r"top_p is 0.0, but must lie in \(0, 1\]"),
}


@pytest.mark.parametrize("settings, message", WRONG.values(), ids=WRONG)
def test_what_no_evaluation_could_mean(settings, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**settings).check()
    EvaluateConfig(num_generations=4, temperature=1.0, pass_at=[1, 4]).check()
