"""A process is ended at each call that a save makes, by a kill or a signal to stop."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from mr1_fast.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from mr1_fast.distributed.sharding import Sharding
from tests.data.faults import Fault, Outcome, forked, needs_gcc
from tests.data.gang import prepared

pytestmark = needs_gcc

START = "0123456789abcdef"


class Training:
    """Weights and an optimizer, whose state after any number of steps is known."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.sharding = Sharding(self.model)

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, folder: Path, steps: int) -> None:
        save_checkpoint(folder, steps, self.sharding, self.optimizer, START)

    def content(self) -> dict[str, bytes]:
        state = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {f"{number}.{name}": value for name, value in values.items()}
        return {name: value.numpy().tobytes() for name, value in state.items()}


def saved_until(folder: Path, last: int) -> tuple[Training, dict[int, dict[str, bytes]]]:
    """Train and save after each step; returns the training, and its state after each."""
    training, states = Training(), {}
    for number in range(1, last + 1):
        training.step(number)
        training.save(folder, number)
        states[number] = training.content()
    return training, states


def loaded(folder: Path) -> tuple[int, dict[str, bytes]]:
    training = Training()
    for number in (1, 2):  # so that there are states to read into
        training.step(number)
    step = load_checkpoint(folder, training.sharding, training.optimizer, START)
    return step, training.content()


def kill_checkpoints(scratch: Path, how: str, number: int, every: int) -> list[int]:
    import time
    t=time.time()
    template = scratch / "template"
    training, states = saved_until(template, 2)
    for number_ in (3, 4, 5):
        pass
    def fresh():
        folder = scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        return folder

    def operate(folder):
        def f():
            for step in (3, 4):
                training.step(step)
                training.save(folder, step)
        return f
    folder = fresh()
    out = forked(operate(folder), folder)
    print(out.status, out.said, len(out.calls))
    for c in out.calls: print(c)
    print(time.time()-t)
    t=time.time()
    for n in range(1, 51):
        folder = fresh()
        out = forked(operate(folder), folder, Fault(n, how, number))
        loaded(folder)
    print("50 in", time.time()-t, out.status, out.said)

def test_x(tmp_path):
    prepared(kill_checkpoints, tmp_path, "signal", 9, 1)
    prepared(kill_checkpoints, tmp_path, "signal", 15, 1)
    assert 0
