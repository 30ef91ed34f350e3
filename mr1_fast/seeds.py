"""Seeds: everything random in a run derives from one number."""

import hashlib
import random

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, for example (seed, "rollout", step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_step(seed: int, step: int) -> None:
    """Seed torch's and Python's global generators for one step (dropout, if any, draws from them)."""
    torch.manual_seed(derive_seed(seed, "step", step))
    random.seed(derive_seed(seed, "step", step))
