"""Whole runs in the process of the tests, and runs without data or log for a single stage."""

from mr1_fast import train
from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.model.policy import Policy
from mr1_fast.plan.out_of_memory import SAMPLED, TOKENS, Room
from mr1_fast.run import Run


def run(argv: list[str]) -> None:
    """Do what `python -m mr1_fast.train` does; raises UserError where that exits."""
    train.main(parse_train_config(argv))


def stage_run(policy: Policy, config: TrainConfig, tokens: int = 10**6, said=None, **parts) -> Run:
    """A Run whose stages may compute on `tokens` tokens at once; `said` collects what it prints."""
    say = [].append if said is None else said.append
    limits = Room(say, lambda: "Change X.", {TOKENS: tokens, SAMPLED: tokens})
    return Run(config=config, policy=policy, limits=limits, **parts)
