"""Checkpoints: whole on disk or not there, of safetensors and JSON, and resumed bit for bit.

A checkpoint holds the trained weights, the optimizer's state, and the numbers of what else follows
from all steps so far, such as a β that reacts to the KL. It needs no random state, since data
order, sampling and dropout of step s are seeded from (seed, s) alone.

Every process writes a part (torch.distributed.checkpoint), and any number of processes can go on
from it, with any sharding. `state.json` has size and checksum of each file and of itself, so that a
damaged one is found and named before anything is changed.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from .distributed import World
from .distributed.pieces import Piece, check_pieces, load_pieces, save_pieces
from .distributed.saved_record import (
    OF_ALL,
    OF_WEIGHTS,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Damaged,
    optimizer_reader,
    reader_of,
    sound_record,
)
from .distributed.saved_state import optimizer_pieces, restore_optimizer, weight_pieces
from .distributed.shard_files import ShardReader
from .distributed.sharding import Sharding
from .errors import UserError
from .files import atomic_folder, cannot_save, discard_folder, sweep
from .identity import require_identity
from .integrity import sealed
from .resuming import saved_steps, step_folder

KEEP = 2
"""How many of the newest checkpoints stay: with two, there is a way back from a damaged one."""
UNFIT = (ValueError, TypeError, LookupError, AttributeError, SafetensorError)
"""What reading a checkpoint raises whose checksums hold, or are missing, but whose content does not
fit together."""


class Stateful(Protocol):
    """A part of a run that the next steps depend on, beside the weights and the optimizer."""

    def state(self) -> dict[str, float]:
        """Return the numbers that must be kept; none if the part is always as at the start."""

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from numbers that `state` has returned; raises ValueError for any others."""


def fingerprint(model: nn.Module) -> str:
    """Identify a starting model by the names, shapes, dtypes and first values of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        head = tensor.flatten()[:8].float().cpu().tolist()
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), head)).encode())
    return digest.hexdigest()[:16]


# --- saving -------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    start_fingerprint: str,
    parts: Mapping[str, Stateful] | None = None,
    identity: Mapping[str, Any] | None = None,
    previous: int | None = None,
) -> Path:
    """Write the checkpoint of the state after `step` steps, for example `folder/step-000050`.

    The numbers of `parts` are kept under their names, and the settings `identity`, by which a run
    is the run it is. A save that fails leaves nothing behind.
    Checkpoints that are older than the newest KEEP are removed.

    previous: the steps of the checkpoint before it, or 0 where there was none. Those of later steps
        are removed as well: they were damaged, or the run would have gone on from them.
    """
    world, path = sharding.world, step_folder(folder, step)
    tensors, numbers = optimizer_pieces(optimizer, sharding.parts)

    def write(temporary: Path) -> dict[str, Any]:
        files = save_pieces(weight_pieces(sharding.model), temporary / WEIGHTS, world)
        files |= save_pieces(tensors, temporary / OPTIMIZER, world)
        everywhere = world.gather(numbers)
        return {
            "step": step,
            "start": start_fingerprint,
            "identity": dict(identity or {}),
            "optimizer": type(optimizer).__name__,
            "optimizer_numbers": {name: each[name] for each in everywhere for name in each},
            "parts": {name: part.state() for name, part in (parts or {}).items()},
            "files": files,
        }

    _save_together(path, world, write)
    if world.is_first:
        last = step - 1 if previous is None else previous
        earlier = [each for each in saved_steps(folder) if each <= last]
        keep_only(folder, {*earlier[1 - KEEP :], step})
        sweep(folder)
    world.barrier()
    return path


def save_weights(folder: Path, step: int, sharding: Sharding) -> None:
    """Write the trained weights after `step` steps alone, for example `folder/step-000050`."""
    world = sharding.world

    def write(temporary: Path) -> dict[str, Any]:
        files = save_pieces(weight_pieces(sharding.model), temporary / WEIGHTS, world)
        return {"step": step, "files": files}

    _save_together(step_folder(folder, step), world, write)


def _save_together(path: Path, world: World, write: Callable[[Path], dict[str, Any]]) -> None:
    """Make the folder `path` of what all processes write into it, or nothing of it.

    write: writes the files of a process to a folder, collectively, and returns the content of
        `state.json`, which is written last. An error of one process must be raised in all.

    Raises UserError in all processes if one fails.
    """
    folder = atomic_folder(path)
    with ExitStack() as stack:  # that of the first process makes, names or removes the folder
        world.in_all(lambda: world.is_first and stack.enter_context(folder))
        temporary = world.of_first(folder.temporary)
        try:
            record = write(temporary)
        except OSError as error:
            raise cannot_save(path, error) from error

        def end() -> None:
            if world.is_first:
                (temporary / STATE).write_text(sealed(record))
                stack.close()

        try:
            world.in_all(end)
        except OSError as error:
            raise cannot_save(path, error) from error


# --- loading ------------------------------------------------------------------------------------


def load_checkpoint(
    folder: Path,
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    start_fingerprint: str,
    parts: Mapping[str, Stateful] | None = None,
    identity: Mapping[str, Any] | None = None,
    fall_back: Callable[[str], None] | None = None,
) -> int:
    """Restore the newest checkpoint in `folder`; returns how many steps had been done by then.

    It may be one that another number of processes has saved, with another sharding. A part of which
    the checkpoint has no numbers stays as it is: those of earlier versions have none, and a setting
    may have been changed.

    fall_back: where it is given, the newest checkpoint that is not damaged is taken, and this is
        called with a sentence for each that is.

    Raises UserError, with nothing changed, where there is none, where a file is damaged, missing or
    that of another checkpoint, and where it was made from another starting model, with another
    optimizer, or with other settings `identity`.
    """
    steps = sharding.world.of_first(saved_steps(folder))
    if not steps:
        raise UserError(
            f"there is no checkpoint in {folder}: start the run anew, with a new --output."
        )
    while steps:
        path = step_folder(folder, steps.pop())
        before = step_folder(folder, steps[-1]).name if steps else ""
        try:
            return _load(path, sharding, optimizer, start_fingerprint, parts or {}, identity or {})
        except Damaged as error:
            damaged = f"checkpoint {path} is damaged ({error})"
        if before and fall_back is not None:
            fall_back(f"{damaged}: the run goes on from {before}.")
        elif before:
            raise UserError(f"{damaged}: delete it to resume from {before}.")
    raise UserError(f"{damaged}: delete it and start the run anew, with a new --output.")


def _load(
    path: Path,
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    start_fingerprint: str,
    parts: Mapping[str, Stateful],
    identity: Mapping[str, Any],
) -> int:
    """Restore one checkpoint; returns its steps. Raises Damaged before anything is changed."""
    world, pieces = sharding.world, weight_pieces(sharding.model)
    record = sound_record(path, world, OF_ALL)
    # Before the run went on, its settings were compared with those of its config.yaml.
    way_out = "write that into its config.yaml again"
    require_identity(identity, _settings(record), path.parents[1], way_out)
    if record["start"] != start_fingerprint or not _has_same(path, record, pieces, world):
        raise UserError(
            f"checkpoint {path} was made from another model: resume with the --model, --lora, "
            "--freeze-vision and --seed of that run."
        )
    if record["optimizer"] != type(optimizer).__name__:
        raise UserError(
            f"checkpoint {path} was made with optimizer {record['optimizer']}: resume with the "
            "--optimizer of that run."
        )
    kept = {name: state for name, state in record.get("parts", {}).items() if state}

    def fitting() -> tuple[ShardReader, ShardReader, dict[str, Any]]:
        weights = reader_of(path, record, WEIGHTS)
        check_pieces(pieces, weights)
        for name in kept.keys() & parts.keys():
            deepcopy(parts[name]).load(kept[name])
        return weights, *optimizer_reader(path, record, list(pieces))

    try:
        weights, states, numbers = world.in_all(fitting)
        # Last come the weights: an optimizer that does not fit leaves all as it was.
        restore_optimizer(optimizer, sharding.parts, states, numbers, world)
        load_pieces(pieces, weights, world)
    except UNFIT as error:
        raise Damaged(str(error)) from error
    for name in kept.keys() & parts.keys():
        parts[name].load(kept[name])
    return record["step"]


def require_weights(folder: Path, step: int, world: World) -> None:
    """Raise UserError where weights that `save_weights` has written are missing or damaged."""
    path = step_folder(folder, step)
    try:
        sound_record(path, world, OF_WEIGHTS)
    except Damaged as error:
        raise _unreadable(path, error) from error


def load_weights(folder: Path, step: int, sharding: Sharding) -> None:
    """Restore the trained weights that `save_weights` has written.

    Raises UserError, with nothing changed, where they are missing or damaged.
    """
    world, path = sharding.world, step_folder(folder, step)
    pieces = weight_pieces(sharding.model)
    try:
        record = sound_record(path, world, OF_WEIGHTS)
        fits = _has_same(path, record, pieces, world)
        reader = reader_of(path, record, WEIGHTS)
        if fits:
            world.in_all(lambda: check_pieces(pieces, reader))
            load_pieces(pieces, reader, world)
    except (Damaged, *UNFIT) as error:
        raise _unreadable(path, error) from error
    if not fits:
        raise UserError(f"the weights in {path} are of another model: resume without --keep-best.")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the weights in {path} cannot be read ({error}): resume without --keep-best.")


def _has_same(
    path: Path, record: Mapping[str, Any], pieces: Mapping[str, Piece], world: World
) -> bool:
    """Say, on all processes alike, whether the weights in `path` have the names of these pieces."""

    def read() -> bool:
        metadata = reader_of(path, record, WEIGHTS).read_metadata()
        return metadata.state_dict_metadata.keys() == pieces.keys()

    try:
        return all(world.gather(world.in_all(read)))
    except UNFIT as error:
        raise Damaged(str(error)) from error


def _settings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that a checkpoint was made with; those of earlier versions have none."""
    settings = record.get("identity")
    return settings if isinstance(settings, dict) else {}


# --- the folders --------------------------------------------------------------------------------


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the weights in `folder` that are not of one of `steps`."""
    for step in saved_steps(folder):
        if step not in steps:
            discard_folder(step_folder(folder, step))
