"""How the values of a step's rows become one number each in metrics.jsonl."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from .distributed import SINGLE, World


@dataclass(frozen=True)
class Mean:
    """Values (N,) of a batch's rows, whose mean over all batches of a step is reported."""

    values: torch.Tensor


@dataclass(frozen=True)
class Largest:
    """Values (N,) of a batch's rows, of which the largest in all batches of a step is reported."""

    values: torch.Tensor


RowMetric = Mean | Largest


class RowMetrics:
    """Combines the row metrics of batches, each of which has some of a step's rows.

    >>> metrics = RowMetrics()
    >>> metrics.add({"kl": Mean(torch.tensor([1.0, 2.0])), "gap": Largest(torch.tensor([5.0]))})
    >>> metrics.add({"kl": Mean(torch.tensor([6.0])), "gap": Largest(torch.tensor([4.0]))})
    >>> metrics.result()
    {'kl': 3.0, 'gap': 5.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._rows: dict[str, int] = defaultdict(int)
        self._largest: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: dict[str, RowMetric]) -> None:
        """Add the row metrics of one more batch."""
        for name, metric in metrics.items():
            if isinstance(metric, Largest):
                self._largest[name].append(metric.values)
            else:
                self._sums[name] += metric.values.float().sum().item()
                self._rows[name] += len(metric.values)

    def result(self, world: World = SINGLE) -> dict[str, float]:
        """Return one number for each name of which a batch had a row; others are not known.

        The batches of all processes of a `world` count, some of which may have none.
        """
        rows, sums, largest = Counter(), Counter(), defaultdict(list)
        mine = {name: torch.cat(parts) for name, parts in self._largest.items()}
        mine = {name: values.max().item() for name, values in mine.items() if len(values)}
        for part in world.gather((self._rows, self._sums, mine)):
            rows.update(part[0])
            sums.update(part[1])
            for name, value in part[2].items():
                largest[name].append(value)
        means = {name: sums[name] / count for name, count in rows.items() if count}
        return {**means, **{name: torch.tensor(v).max().item() for name, v in largest.items()}}
