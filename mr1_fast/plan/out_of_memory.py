"""What happens when memory runs out: the same work once more with half the amount, then advice."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import UserError

Result = TypeVar("Result")

PACK_TOKENS = "tokens_per_microbatch"
"""Name of the amount of tokens in one forward and backward pass, as the setting is called."""
ROLLOUT_CACHE = "tokens in the rollout's KV cache"
"""Name of the amount of tokens whose keys and values the rollout holds at once."""
EVALUATION_CACHE = "tokens in the evaluation's KV cache"
"""Name of the amount of tokens whose keys and values an evaluation holds at once."""


class MemoryLimits:
    """Amounts of work that fit into memory, by name.

    An amount that does not fit is halved for the rest of the process. `say` prints a line;
    `advise` returns which settings to change when half the amount does not fit either.
    """

    def __init__(
        self, say: Callable[[str], None], advise: Callable[[], str], amounts: dict[str, int]
    ):
        self.say, self.advise, self.amounts = say, advise, dict(amounts)

    def attempt(
        self,
        name: str,
        work: Callable[[int], Result],
        most: int | None = None,
        relief: Callable[[], str] | None = None,
    ) -> Result:
        """Return work(amount of `name`); if it runs out of memory, try once more with half of it.

        `most` is the largest amount that `work` can use. `relief` makes `work` need less memory for
        the same amount, which is tried first; it says what it has changed, with "" for nothing.
        `work` starts from its beginning again, so it must leave nothing changed when it fails.
        UserError if half the amount fails, too.
        """
        amount = min(self.amounts[name], most or self.amounts[name])
        try:
            return work(amount)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]

        # The exception held the frames of the failed attempt, and these its tensors. Both are
        # released only now that the except block has ended.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if relief is not None and (change := relief()):
            self._say(name, amount, change)
            return self.attempt(name, work, most)
        if amount < 2:
            raise self._exhausted(name, amount, reason)

        half = self.amounts[name] = amount // 2
        self._say(name, amount, str(half))
        try:
            return work(half)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        except UserError as error:
            raise self._exhausted(name, amount, f"and half of that will not do: {error}") from error
        raise self._exhausted(name, half, reason)

    def _say(self, name: str, amount: int, change: str) -> None:
        before = f"out of memory with {name} = {amount}"
        self.say(f"{before}: once more, and from here on, with {change}")

    def _exhausted(self, name: str, amount: int, reason: str) -> UserError:
        return UserError(
            f"out of memory with {name} = {amount} ({reason.rstrip('.')}). The last checkpoint is "
            f"intact: go on from there with --resume. {self.advise()}"
        )
