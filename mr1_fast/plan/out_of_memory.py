"""How much is computed at once, and what happens when memory runs out: half of it, once, then advice."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import UserError

Result = TypeVar("Result")
TOKENS = "tokens_per_microbatch"
SAMPLED, EVALUATED = "tokens in the rollout's KV cache", "tokens in the evaluation's KV cache"
"""Names of amounts: the setting, and what the memory plan leaves for keys and values."""


class Room:
    """Amounts that fit into memory, by name; one that does not is halved for the rest of the process.

    `say` prints a line; `advise` returns what to change when halving was not enough.
    """

    def __init__(
        self, say: Callable[[str], None], advise: Callable[[], str], amounts: dict[str, int]
    ):
        self.say, self.advise, self.amounts = say, advise, dict(amounts)

    def attempt(self, name: str, work: Callable[[int], Result], most: int | None = None) -> Result:
        """work(amount of `name`); where it runs out of memory, once more from its beginning with half the amount.

        `most`: more than that is of no use to it. `work` must leave nothing changed when it fails. UserError where half
        is too much, too.
        """
        amount = min(self.amounts[name], most or self.amounts[name])
        try:
            return work(amount)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        # Only here are the failed attempt's tensors out of use: the exception held its frames.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if amount < 2:
            raise self._exhausted(name, amount, reason)
        half = self.amounts[name] = amount // 2
        self.say(f"out of memory with {name} = {amount}: once more, and from here on, with {half}")
        try:
            return work(half)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        except UserError as error:
            raise self._exhausted(name, amount, f"and half of that will not do: {error}") from error
        raise self._exhausted(name, half, reason)

    def _exhausted(self, name: str, amount: int, reason: str) -> UserError:
        return UserError(
            f"out of memory with {name} = {amount} ({reason.rstrip('.')}). The last checkpoint is intact: go on "
            f"from there with --resume. {self.advise()}"
        )
