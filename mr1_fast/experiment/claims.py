"""Which process runs which cell of an experiment, where torchrun has started several.

Every process goes through all cells and runs those that no other has begun, so that none is idle
while a cell is left. What has begun and ended stands in the experiment's folder as empty files,
each of which only one process can create.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..distributed import World
from ..distributed.launch import work_alone
from ..files import remove_folder


class Claims:
    """The cells, by their numbers, that the processes of this call have begun and ended."""

    def __init__(self, folder: Path):
        self.folder = folder

    def take(self, number: int) -> bool:
        """Begin a cell; False if a process has begun it already."""
        try:
            (self.folder / f"{number}.begun").touch(exist_ok=False)
        except FileExistsError:
            return False
        except FileNotFoundError:  # all cells have ended, or the first process was stopped
            return False
        return True

    def end(self, number: int) -> None:
        """Tell the first process that a cell has ended, finished or failed."""
        with suppress(FileNotFoundError):  # it was stopped
            (self.folder / f"{number}.ended").touch()

    def are_over(self) -> bool:
        """Return whether the first process has left, with which no cell is to be run any more."""
        return not self.folder.exists()

    def has_ended(self, number: int) -> bool:
        """Return whether a cell has ended."""
        return (self.folder / f"{number}.ended").exists()


@contextmanager
def claims_in(output: Path, world: World) -> Iterator[Claims]:
    """Have the claims of this call within a block, in the experiment's folder `output`.

    Collective where the block begins, and the end of `world`: from then on the processes know of
    one another by their claims alone. The first one must leave the block last, once all cells have
    ended, or when it is stopped.
    """
    folder = output / ".claims"
    if world.is_first:
        for earlier in (folder, output / ".claims.over"):  # of a call that was stopped
            remove_folder(earlier)
        folder.mkdir()
    work_alone(world)
    try:
        yield Claims(folder)
    finally:
        if world.is_first:
            # At once, since nobody may find a cell that has neither begun nor ended.
            over = folder.rename(output / ".claims.over")
            remove_folder(over)
