"""Seeds: everything random in a run derives from one number and from what it is for."""

import hashlib
import random

import torch


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on all parts, for example `(seed, "rollout", step)`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed: int, step: int) -> None:
    """Seed the global generators of torch and Python for one step; dropout draws from them."""
    torch.manual_seed(derive_seed(seed, "step", step))
    random.seed(derive_seed(seed, "step", step))
