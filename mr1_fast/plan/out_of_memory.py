"""What happens when memory runs out: the same work once more with half the amount, then advice.

Of several processes, each tries again by itself, since what it does between two exchanges is its
own; after the step, all go on with the least amount of any. Where a pass over packs is itself an
exchange, as with `--sharding full`, one process cannot go back while the others wait within it:
then the run ends, and half the amount is kept for its restart.
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from ..distributed import SINGLE, World
from ..errors import UserError
from ..files import write_json
from ..report.records import read_json_object

Result = TypeVar("Result")

PACK_TOKENS = "tokens_per_microbatch"
"""Name of the amount of tokens in one forward and backward pass, as the setting is called."""
ROLLOUT_CACHE = "tokens in the rollout's KV cache"
"""Name of the amount of tokens whose keys and values the rollout holds at once."""
EVALUATION_CACHE = "tokens in the evaluation's KV cache"
"""Name of the amount of tokens whose keys and values an evaluation holds at once."""
KEPT = "memory.json"
"""The file of a run folder with the amounts that a restart begins with, by name."""


class MemoryLimits:
    """Amounts of work that fit into memory, by name.

    An amount that does not fit is halved for the rest of the process. `say` prints a line;
    `advise` returns which settings to change when half the amount does not fit either.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        advise: Callable[[], str],
        amounts: dict[str, int],
        world: World = SINGLE,
        kept: Path | None = None,
    ):
        """`kept` is the file for a restart, where passes over packs are exchanges; else None."""
        self.say, self.advise, self.amounts = say, advise, dict(amounts)
        self.world, self.kept = world, kept
        self.notes: list[str] = []
        """What this process has halved since the last `agree`, where there are several."""
        try:
            lower = _read(kept)
        except UserError:
            lower = {}
            say(f"{kept} is damaged, so that this run begins with the planned amounts.")
        for name, amount in lower.items():
            if amount < self.amounts.get(name, 0):
                self.amounts[name] = amount
                say(f"{name} = {amount}: this run was out of memory with more ({kept})")

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
        `work` starts from its beginning again, so it must leave nothing changed when it fails, and
        must not fail once it has exchanged anything with other processes.
        UserError if half the amount fails, too.
        """
        amount = min(self.amounts[name], most or self.amounts[name])
        try:
            return work(amount)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]

        if self.kept is not None and name == PACK_TOKENS:
            raise self._ended(name, amount, reason)
        # The exception held the frames of the failed attempt, and these its tensors. Both are
        # released only now that the except block has ended.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if relief is not None and (change := relief()):
            self._note(name, amount, change)
            return self.attempt(name, work, most)
        if amount < 2:
            raise self._exhausted(name, amount, reason)

        half = self.amounts[name] = amount // 2
        self._note(name, amount, str(half))
        try:
            return work(half)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        except UserError as error:
            raise self._exhausted(name, amount, f"and half of that will not do: {error}") from error
        raise self._exhausted(name, half, reason)

    def agree(self) -> None:
        """Go on with the least amounts of all processes, which all call this between two steps.

        The first one says what was halved, and in which processes.
        """
        if self.world.size == 1:
            return
        parts = self.world.gather((self.amounts, self.notes))
        self.amounts = {name: min(each[name] for each, _ in parts) for name in self.amounts}
        self.notes = []
        ranks: dict[str, list[int]] = {}
        for rank, (_, notes) in enumerate(parts):
            for note in notes:
                ranks.setdefault(note, []).append(rank)
        for note, where in ranks.items():
            self.say(f"process {', '.join(map(str, where))}: {note}")

    def _note(self, name: str, amount: int, change: str) -> None:
        before = f"out of memory with {name} = {amount}"
        note = f"{before}: once more, and from here on, with {change}"
        if self.world.size == 1:
            self.say(note)
        else:
            self.notes.append(note)

    def _exhausted(self, name: str, amount: int, reason: str) -> UserError:
        return UserError(
            f"{self._what_happened(name, amount, reason)}. The last checkpoint is intact: go on "
            f"from there with --resume. {self.advise()}"
        )

    def _ended(self, name: str, amount: int, reason: str) -> UserError:
        """Keep half the amount for a restart; returns what ends the run."""
        half = max(1, amount // 2)
        with suppress(UserError):  # a folder that cannot be written is not what went wrong here
            write_json(self.kept, {name: half})
        return UserError(
            f"{self._what_happened(name, amount, reason)}, and --sharding full cannot try again "
            "in one process alone. The last checkpoint is intact: go on from there with --resume, "
            f"which begins with {name} = {half}. {self.advise()}"
        )

    def _what_happened(self, name: str, amount: int, reason: str) -> str:
        where = f" in process {self.world.rank}" if self.world.size > 1 else ""
        return f"out of memory{where} with {name} = {amount} ({reason.rstrip('.')})"


def _read(kept: Path | None) -> dict[str, int]:
    """Return the amounts in a file for a restart; none without one.

    Raises UserError where it is damaged.
    """
    if kept is None or not kept.exists():
        return {}
    amounts = read_json_object(kept)
    if not all(type(amount) is int and amount > 0 for amount in amounts.values()):
        raise UserError(f"{kept} has an amount that is no whole number above 0: remove it.")
    return amounts
