"""The penalty of overlong completions: DAPO's equation 13, with exact numbers."""

import pytest

from mr1_fast.rewards.overlong import overlong_rewards


def test_the_penalty_falls_over_the_last_tokens():
    lengths = [0, 16_383, 16_384, 17_408, 18_432, 20_479, 20_480]  # the paper's 20,480 and 4,096
    found = overlong_rewards(lengths, max_new_tokens=20_480, share=0.2)
    assert found == pytest.approx([0, 0, 0, -0.25, -0.5, -4095 / 4096, -1], abs=1e-12)


def test_a_share_of_1_begins_at_the_first_token():
    assert overlong_rewards([0, 1, 4], max_new_tokens=4, share=1.0) == [0.0, -0.25, -1.0]


def test_a_margin_of_less_than_a_token_counts_at_the_limit_alone():
    assert overlong_rewards([5, 6], max_new_tokens=6, share=0.1) == [0.0, -1.0]
