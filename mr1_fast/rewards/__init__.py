"""Rewards, found by name; `reward` registers one of your own."""

from .registry import REWARDS, RewardFunction, load_plugin, require_rewards, reward, score

__all__ = ["REWARDS", "RewardFunction", "load_plugin", "require_rewards", "reward", "score"]
