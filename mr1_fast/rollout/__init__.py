"""The rollout: sampling G completions of each prompt from the policy; read engine.py first."""
