"""Watches whether a run of GRPO has anything to learn from, and says so once where it has not.

Without a difference of rewards within a group every advantage is 0, and a run could go on for hours
without a change of the weights.
"""

from dataclasses import dataclass, field

STEPS = 10
"""How many steps in a row must lack a signal before a run says so."""
FEW_FINISHED = 0.1
"""Share of completions below which next to none ends within the limit on its length."""


@dataclass
class LearningSignal:
    """What the last steps of a run have shown, and what has been said of it.

    >>> signal = LearningSignal(total_steps=1)
    >>> flat = {"finished": 1.0, "zero_variance": 1.0, "reward_min": 0.0, "reward_max": 0.0}
    >>> [text.split(":")[0] for text in signal.look(flat)]
    ['nothing is learnt']
    >>> signal.look(flat)
    []
    """

    total_steps: int
    """Steps that the run still has to do; one of fewer than STEPS speaks at its last one."""
    recent: list[dict[str, float]] = field(default_factory=list)
    """The metrics of the last steps, up to the number that is looked at."""
    said: set[str] = field(default_factory=set)
    """Which of the faults have been named."""

    def look(self, metrics: dict[str, float]) -> list[str]:
        """Return the sentences to say after a step with these metrics; each is said once.

        `metrics` are those of a step in metrics.jsonl. A step of supervised training has no rewards
        and nothing to say.
        """
        if "zero_variance" not in metrics:
            return []
        window = min(STEPS, self.total_steps)
        self.recent = [*self.recent, metrics][-window:]
        if len(self.recent) < window:
            return []
        sentences = {"length": self._length_fault(), "rewards": self._reward_fault()}
        new = {name: text for name, text in sentences.items() if text and name not in self.said}
        self.said |= new.keys()
        return list(new.values())

    def _length_fault(self) -> str:
        """Say that next to no completion ends by itself; empty where enough do."""
        finished = sum(step["finished"] for step in self.recent) / len(self.recent)
        if finished >= FEW_FINISHED:
            return ""
        return (
            f"completions are cut: {finished:.0%} of those of the last {len(self.recent)} steps "
            "ended by themselves. Raise --max-new-tokens, or end them at a text with --stop."
        )

    def _reward_fault(self) -> str:
        """Say that no group has a signal; empty where one has."""
        if any(step["zero_variance"] < 1 for step in self.recent):
            return ""
        start = (
            f"nothing is learnt: in no group of the last {len(self.recent)} steps did the rewards "
            "differ. "
        )
        lowest = min(step["reward_min"] for step in self.recent)
        highest = max(step["reward_max"] for step in self.recent)
        if lowest < highest:
            return start + (
                "They differ from prompt to prompt alone: raise --num-generations or "
                "--temperature, or add a reward that tells completions apart."
            )
        return start + (
            f"All were {highest:g}: completions.jsonl has the reason of each. If all are right, "
            "take harder data; if none is, begin with --algo sft or easier data, or change the "
            "rewards."
        )
