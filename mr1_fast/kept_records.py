"""What a resumed run finds of its own records, looked at before it trains.

A damaged line is named, since whoever reads the records later would stumble over it. Records that
are missing only make the curves and tables poorer, so they are said and the run goes on.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from .config import TrainConfig
from .report.records import read_evaluation, read_steps

METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"
EVALUATION = "evaluation.json"
MOST_GAPS = 5
"""Gaps of a record that are named at most."""


class KeptRecords:
    """The records of a run's first `step` steps: where they end, and what is missing of them.

    Raises UserError, which names file and line, for one that is damaged.
    """

    def __init__(self, run: Path, step: int, config: TrainConfig):
        self.ends: dict[str, int] = {}
        """At which byte of each file what is kept ends."""
        self.missing: list[str] = []
        """What the records lack, as sentences."""
        steps, every = range(step), config.eval_every
        evaluated = range(every, step, every) if every and (run / EVALUATIONS).exists() else ()
        self._look(run / METRICS, step, steps)
        self._look(run / COMPLETIONS, step, steps if config.algo != "sft" else (), several=True)
        self._look(run / EVALUATIONS, step + 1, evaluated)  # one is made after its step
        if config.eval_samples and not read_evaluation(run / EVALUATION).get("before"):
            self.missing.append(
                f"{run / EVALUATION} has no accuracy before training, so that there will be "
                "nothing to compare the last one with."
            )

    def _look(
        self, path: Path, before: int, expected: Sequence[int], several: bool = False
    ) -> None:
        """Read a record once: where its lines `before` a step end, and which are missing."""
        self.ends[path.name] = 0

        def steps() -> Iterator[int]:
            for step, _, end in read_steps(path, several):
                if step < before:
                    self.ends[path.name] = end
                yield step

        found = steps()
        gaps = list(islice(_gaps(found, expected), MOST_GAPS + 1))
        for _ in found:  # the rest must be sound, too
            pass
        if gaps:
            named = ", ".join(gaps[:MOST_GAPS]) + ", …" * (len(gaps) > MOST_GAPS)
            self.missing.append(
                f"{path} has nothing of step {named}, as a whole run with these settings has: it "
                "goes on, and what is shown of it leaves them out."
            )


def _gaps(found: Iterator[int], expected: Sequence[int]) -> Iterator[str]:
    """Name the expected numbers that are not among those found, both rising: `4`, `7–9`."""
    number, gap = next(found, None), []
    for each in expected:
        while number is not None and number < each:
            number = next(found, None)
        if number != each:
            gap.append(each)
        elif gap:
            yield _range(gap)
            gap = []
    if gap:
        yield _range(gap)


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}–{last}"
