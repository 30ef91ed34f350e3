"""Rollout: sampling G completions of each prompt from the current policy."""
