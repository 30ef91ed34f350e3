"""Checkpoints: whole on disk or not there, of safetensors and JSON, and resumed bit for bit.

A checkpoint holds the trained weights, the optimizer's state, and the numbers of what else follows
from all steps so far, such as a β that reacts to the KL. It needs no random state, since data
order, sampling and dropout of step s are seeded from (seed, s) alone.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .distributed.sharding import Replicated
from .errors import UserError
from .files import atomic_folder

KEEP = 2
"""How many of the newest checkpoints stay: with two, there is a way back from a damaged one."""


class Part(Protocol):
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


def save_checkpoint(
    folder: Path,
    step: int,
    sharding: Replicated,
    optimizer: torch.optim.Optimizer,
    start_fingerprint: str,
    parts: Mapping[str, Part] | None = None,
) -> Path:
    """Write the checkpoint of the state after `step` steps, for example `folder/step-000050`.

    The numbers of `parts` are kept under their names. A save that fails leaves nothing behind.
    Checkpoints that are older than the newest KEEP are removed.
    """
    model, world = sharding.model, sharding.world
    path = _step_folder(folder, step)
    if not world.is_first:
        world.barrier()
        return path
    tensors, numbers = {}, {}
    for name, value in _flatten(optimizer.state_dict()["state"]).items():
        if isinstance(value, torch.Tensor):
            # A copy: safetensors refuses tensors that share memory, as bitsandbytes' tables do.
            tensors[name] = value.to("cpu", copy=True).contiguous()
        else:
            numbers[name] = value
    record = {
        "step": step,
        "start": start_fingerprint,
        "optimizer": type(optimizer).__name__,
        "optimizer_numbers": numbers,
        "parts": {name: part.state() for name, part in (parts or {}).items()},
    }
    with atomic_folder(path) as temporary:
        save_file(_trained(model), temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    world.barrier()
    return path


def load_checkpoint(
    folder: Path,
    sharding: Replicated,
    optimizer: torch.optim.Optimizer,
    start_fingerprint: str,
    parts: Mapping[str, Part] | None = None,
) -> int:
    """Restore the newest checkpoint in `folder`; returns how many steps had been done by then.

    A part of which the checkpoint has no numbers stays as it is: those of earlier versions have
    none, and a setting may have been changed.

    Raises UserError where there is none, where a file is damaged, and where it was made from
    another starting model or with another optimizer.
    """
    model = sharding.model
    paths = sorted(folder.glob("step-*"))
    if not paths:
        raise UserError(
            f"there is no checkpoint in {folder}: start the run anew, with a new --output."
        )
    path = paths[-1]
    try:
        record = json.loads((path / "state.json").read_text())
        step, start, numbers = record["step"], record["start"], record["optimizer_numbers"]
        kind = record["optimizer"]
        weights = load_file(path / "weights.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        states = record.get("parts", {})
        for name, part in (parts or {}).items():
            if states.get(name):
                part.load(states[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}): delete it to resume from the one before."
        ) from error
    if start != start_fingerprint or weights.keys() != _trained(model).keys():
        raise UserError(
            f"checkpoint {path} was made from another model: resume with the --model, --lora, "
            "--freeze-vision and --seed of that run."
        )
    if kind != type(optimizer).__name__:
        raise UserError(
            f"checkpoint {path} was made with optimizer {kind}: resume with the --optimizer of "
            "that run."
        )
    _restore(model, weights)
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": _unflatten({**tensors, **numbers})}
    )
    return step


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, in order, or of the weights kept there."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def save_weights(folder: Path, step: int, sharding: Replicated) -> None:
    """Write the trained weights after `step` steps alone, for example `folder/step-000050`."""
    model = sharding.model
    if not sharding.world.is_first:
        sharding.world.barrier()
        return
    with atomic_folder(_step_folder(folder, step)) as temporary:
        save_file(_trained(model), temporary / "weights.safetensors")
    sharding.world.barrier()


def load_weights(folder: Path, step: int, sharding: Replicated) -> None:
    """Restore the trained weights that `save_weights` has written.

    Raises UserError where they are missing or damaged.
    """
    model, path = sharding.model, _step_folder(folder, step)
    try:
        weights = load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the weights in {path} cannot be read ({error}): resume without --keep-best."
        ) from error
    if weights.keys() != _trained(model).keys():
        raise UserError(f"the weights in {path} are of another model: resume without --keep-best.")
    _restore(model, weights)


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the weights in `folder` that are not of one of `steps`."""
    for step in saved_steps(folder):
        if step not in steps:
            shutil.rmtree(_step_folder(folder, step))


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


@torch.no_grad()
def _restore(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of their names."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def _flatten(state: dict, prefix: str = "") -> dict[str, object]:
    """Turn {0: {"step": 1, "inner": {"max": 2}}} into {"0.step": 1, "0.inner.max": 2}."""
    flat: dict[str, object] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _unflatten(flat: dict[str, object]) -> dict[int, dict]:
    """Undo `_flatten`; the outermost names are whole numbers again."""
    state: dict[int, dict] = {}
    for key, value in flat.items():
        index, *outer, name = key.split(".")
        inner = state.setdefault(int(index), {})
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return state


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are trained, by name."""
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
