"""Checkpoints: whole on disk or not there, of safetensors and JSON, and resumed bit for bit.

A checkpoint holds the trained weights, the optimizer's state, and the numbers of what else follows
from all steps so far, such as a β that reacts to the KL. It needs no random state, since data
order, sampling and dropout of step s are seeded from (seed, s) alone.

Every process writes a part (torch.distributed.checkpoint), and any number of processes can go on
from it, with any sharding. `state.json` has size and checksum of each file, so that a damaged one
is found and named before anything is changed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .distributed import World
from .distributed.pieces import load_pieces, save_pieces
from .distributed.saved_state import optimizer_pieces, restore_optimizer, weight_pieces
from .distributed.shard_files import ShardReader, checksum
from .distributed.sharding import Sharding
from .errors import UserError
from .files import atomic_folder, cannot_save
from .identity import require_identity

KEEP = 2
"""How many of the newest checkpoints stay: with two, there is a way back from a damaged one."""
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
"""The files of a process alone; of several, each has its number in the first two names."""


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
) -> Path:
    """Write the checkpoint of the state after `step` steps, for example `folder/step-000050`.

    The numbers of `parts` are kept under their names, and the settings `identity`, by which a run
    is the run it is. A save that fails leaves nothing behind.
    Checkpoints that are older than the newest KEEP are removed.
    """
    world, path = sharding.world, _step_folder(folder, step)
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
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    world.barrier()
    return path


def save_weights(folder: Path, step: int, sharding: Sharding) -> None:
    """Write the trained weights after `step` steps alone, for example `folder/step-000050`."""
    world = sharding.world

    def write(temporary: Path) -> dict[str, Any]:
        files = save_pieces(weight_pieces(sharding.model), temporary / WEIGHTS, world)
        return {"step": step, "files": files}

    _save_together(_step_folder(folder, step), world, write)


def _save_together(path: Path, world: World, write: Callable[[Path], dict[str, Any]]) -> None:
    """Make the folder `path` of what all processes write into it, or nothing of it.

    write: writes the files of a process to a folder, collectively, and returns the content of
        `state.json`, which is written last. An error of one process must be raised in all.

    Raises UserError in all processes if one fails.
    """
    folder = atomic_folder(path)
    with ExitStack() as stack:  # that of the first process makes, names or removes the folder
        world.in_all(lambda: world.is_first and stack.enter_context(folder))
        try:
            record = write(folder.temporary)
        except OSError as error:
            raise cannot_save(path, error) from error

        def end() -> None:
            if world.is_first:
                (folder.temporary / STATE).write_text(json.dumps(record, indent=1))
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
) -> int:
    """Restore the newest checkpoint in `folder`; returns how many steps had been done by then.

    It may be one that another number of processes has saved, with another sharding. A part of which
    the checkpoint has no numbers stays as it is: those of earlier versions have none, and a setting
    may have been changed.

    Raises UserError where there is none, where a file is damaged, missing or that of another
    checkpoint, and where it was made from another starting model, with another optimizer, or with
    other settings `identity`.
    """
    world = sharding.world
    steps = world.of_first(saved_steps(folder))
    if not steps:
        raise UserError(
            f"there is no checkpoint in {folder}: start the run anew, with a new --output."
        )
    path = _step_folder(folder, steps[-1])
    way_out = "delete it and start the run anew, with a new --output"
    if steps[:-1]:
        way_out = f"delete it to resume from {_step_folder(folder, steps[-2]).name}"
    try:
        record = _sound_record(path, world, ("start", "optimizer", "optimizer_numbers"))
        weights = _reader(path, record, WEIGHTS)
        saved = weights.read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error, way_out) from error
    # Before the run went on, its settings were compared with those of its config.yaml.
    require_identity(
        identity or {}, _settings(record), folder.parent, "write that into its config.yaml again"
    )
    pieces = weight_pieces(sharding.model)
    if record["start"] != start_fingerprint or saved.keys() != pieces.keys():
        raise UserError(
            f"checkpoint {path} was made from another model: resume with the --model, --lora, "
            "--freeze-vision and --seed of that run."
        )
    if record["optimizer"] != type(optimizer).__name__:
        raise UserError(
            f"checkpoint {path} was made with optimizer {record['optimizer']}: resume with the "
            "--optimizer of that run."
        )
    try:
        states = record.get("parts", {})
        for name, part in (parts or {}).items():
            if states.get(name):
                part.load(states[name])
        reader, numbers = _optimizer_reader(path, record, pieces)
        # Last come the weights: an optimizer that does not fit leaves all as it was.
        restore_optimizer(optimizer, sharding.parts, reader, numbers, world)
        load_pieces(pieces, weights, world)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(path, error, way_out) from error
    return record["step"]


def load_weights(folder: Path, step: int, sharding: Sharding) -> None:
    """Restore the trained weights that `save_weights` has written.

    Raises UserError where they are missing or damaged.
    """
    world, path = sharding.world, _step_folder(folder, step)
    pieces = weight_pieces(sharding.model)
    try:
        reader = _reader(path, _sound_record(path, world), WEIGHTS)
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the weights in {path} cannot be read ({error}): resume without --keep-best."
        ) from error
    if saved.keys() != pieces.keys():
        raise UserError(f"the weights in {path} are of another model: resume without --keep-best.")
    load_pieces(pieces, reader, world)


def _sound_record(path: Path, world: World, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the first process reads in `state.json`, once all files have been checked.

    Each process checks a part of the files. Raises ValueError in all of them, which names the file,
    if one is damaged or missing, or if `state.json` lacks one of `keys`.
    """
    read = world.in_all(lambda: _record(path, keys) if world.is_first else None)
    record = world.of_first(read)
    expected = record.get("files") or dict.fromkeys([WEIGHTS, OPTIMIZER][: 2 if keys else 1])
    mine = [_finding(path / name, check) for name, check in world.share(list(expected.items()))]
    for finding in world.whole(mine):
        if finding:
            raise ValueError(finding)
    return record


def _record(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read `state.json`; weights alone had none in earlier versions."""
    if not keys and not (path / STATE).exists():
        return {}
    try:
        record = json.loads((path / STATE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{STATE} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{STATE}: {error}") from error
    for key in ("step", *keys):
        if key not in record:
            raise ValueError(f"{STATE} has no {key}")
    if _step_folder(path.parent, record["step"]) != path:
        raise ValueError(f"{STATE} is that of step {record['step']}")
    return record


def _settings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that a checkpoint was made with; those of earlier versions have none."""
    settings = record.get("identity")
    return settings if isinstance(settings, dict) else {}


def _finding(path: Path, expected: dict[str, Any] | None) -> str:
    """Say what is wrong with a file, "" for nothing; earlier versions have no checksum of it."""
    try:
        if expected is None:
            with safe_open(path, "pt"):
                return ""
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path.name} has {size} bytes instead of {expected['bytes']}"
        return "" if checksum(path) == expected else f"{path.name} is not what was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, LookupError, TypeError, SafetensorError) as error:
        return f"{path.name}: {error}"


def _reader(path: Path, record: Mapping[str, Any], kind: str) -> ShardReader:
    """Return the reader of all files of weights, or of the optimizer."""
    files = record.get("files") or [kind]
    return ShardReader([path / name for name in files if name.startswith(Path(kind).stem)])


def _optimizer_reader(
    path: Path, record: Mapping[str, Any], trained: Iterable[str]
) -> tuple[ShardReader, dict[str, Any]]:
    """Return the reader of the optimizer's tensors, and its numbers.

    Earlier versions have the numbers of the trained parameters in place of their names.
    """
    numbers = record["optimizer_numbers"]
    if "files" in record:
        return _reader(path, record, OPTIMIZER), numbers
    names = list(trained)

    def rename(key: str) -> str:
        number, *_, name = key.split(".")
        return f"{names[int(number)]}.{name}"

    renamed = {rename(key): value for key, value in numbers.items()}
    return ShardReader([path / OPTIMIZER], rename), renamed


def _damaged(path: Path, error: Exception, way_out: str) -> UserError:
    return UserError(f"checkpoint {path} is damaged ({error}): {way_out}.")


# --- the folders --------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, in order, or of the weights kept there."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the weights in `folder` that are not of one of `steps`."""
    for step in saved_steps(folder):
        if step not in steps:
            shutil.rmtree(_step_folder(folder, step))


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"
