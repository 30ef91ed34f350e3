"""What a run may use of its card, beside what others use."""

import pytest
import torch

from mr1_fast.plan.resident import CUDA_WORKSPACE, NCCL_BUFFERS
from mr1_fast.plan.run_memory import usable_memory

GIB = 2**30


@pytest.mark.parametrize(
    "free, fraction, usable",
    [
        (17.5, 1.0, 24 * GIB),  # nothing but this process with its context of 0.5 GiB
        (15.5, 1.0, 21.5 * GIB + CUDA_WORKSPACE),  # others hold 2 GiB
        (17.5, 0.5, 12 * GIB),  # a share of the card
    ],
)
def test_memory_that_others_hold_is_not_usable(monkeypatch, free, fraction, usable):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    assert usable_memory(torch.device("cuda")) == usable


def test_what_nccl_holds_is_this_process_s_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    usable = usable_memory(torch.device("cuda"), processes=2)
    assert usable == 21 * GIB + CUDA_WORKSPACE + NCCL_BUFFERS
