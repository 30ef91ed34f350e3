"""Rewards: functions of a completion and its example, found by name (docs/rewards.md).

A reward of your own is one decorator away, in a file that `--plugin` names:

    from mr1_fast.rewards import reward

    @reward("brief")
    def brief(completion, example):
        return float(len(completion) < 400)
"""

from .accuracy import CompletionJudge, accuracy_reward, judge_completion
from .answers import Verdict, judge
from .format import format_reward
from .functions import RewardFunction
from .registry import REWARDS, load_plugin, require_rewards, reward
from .scoring import Scores, score

__all__ = [
    "REWARDS",
    "CompletionJudge",
    "RewardFunction",
    "Scores",
    "Verdict",
    "accuracy_reward",
    "format_reward",
    "judge",
    "judge_completion",
    "load_plugin",
    "require_rewards",
    "reward",
    "score",
]
