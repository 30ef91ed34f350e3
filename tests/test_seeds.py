import random

import torch

from mr1_fast.seeds import seed_step


def test_a_step_seeds_the_generators_of_torch_and_of_python():
    def drawn(seed, step):
        seed_step(seed, step)
        return random.random(), random.randrange(10**9), *torch.rand(3).tolist()

    first = drawn(0, 5)
    for other in (drawn(0, 6), drawn(1, 5)):
        assert not set(first) & set(other)
    assert drawn(0, 5) == first
