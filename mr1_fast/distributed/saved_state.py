"""What a checkpoint holds of weights and optimizer, whoever has which part of them.

Trained weights have their names and shapes in the model. The state `m` of a parameter `a.weight` is
the tensor `a.weight.m`, flat: one entry for each element of the parameter, or for each block of
them, in the order of the parameter's elements, of which each process has those of its part.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import UserError, shortened
from ..kernels.adamw.state import BLOCK
from .pieces import Piece, check_pieces, load_pieces
from .shard_files import ShardReader
from .sharding import Part
from .world import World

OF_BLOCKS = {"m_scale", "v_scale", "absmax1", "absmax2"}
"""States that have an entry for each 256 elements. With such states, parts consist of whole blocks,
but for the end of a parameter."""
OF_ALL = {"step", "qmap1", "qmap2"}
"""States of which every process has all: a count, and the codes of bitsandbytes."""
CODES = 256
"""Entries of the codes of bitsandbytes."""


def weight_pieces(model: nn.Module) -> dict[str, Piece]:
    """Return what this process has of the trained weights, by name; loading changes the model."""
    pieces = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight, first = parameter.detach(), 0
        if isinstance(weight, DTensor):
            first = weight.__create_chunk_list__()[0].offsets[0]
            weight = weight.to_local()
        pieces[name] = Piece(weight, first, parameter.shape)
    return pieces


def optimizer_pieces(
    optimizer: torch.optim.Optimizer, parts: Sequence[Part]
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """Return the tensors and the numbers that the optimizer has for these parts, by name.

    An empty part has states of which nothing may depend: its steps are not counted.
    """
    pieces, numbers = {}, {}
    for part, state in zip(parts, _states(optimizer), strict=True):
        for name, value in state.items() if part.weight.numel() else ():
            key = f"{part.name}.{name}"
            if isinstance(value, Tensor):
                first, _, whole = _place(name, part, value.numel())
                pieces[key] = Piece(value.reshape(-1), first, torch.Size([whole]))
            else:
                numbers[key] = value
    return pieces, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    reader: ShardReader,
    numbers: Mapping[str, Any],
    world: World,
) -> None:
    """Give the optimizer what was saved for these parts, by whatever processes.

    Collective, and nothing is changed where anything of it does not fit: raises ValueError for
    states that no optimizer of this kind has, and UserError where they are those of another one.
    """
    pieces, states = world.in_all(lambda: _places_to_fill(optimizer, parts, reader, numbers))
    load_pieces(pieces, reader, world)
    state = {**optimizer.state_dict(), "state": states}
    world.in_all(lambda: optimizer.load_state_dict(state))


def _places_to_fill(
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    reader: ShardReader,
    numbers: Mapping[str, Any],
) -> tuple[dict[str, Piece], dict[int, dict[str, Any]]]:
    """Return what is to be read for these parts, and the states that it will be, by their number.

    States that the optimizer has already are read in place: beside them, every process of a machine
    would need as much of its memory.
    """
    saved = reader.read_metadata().state_dict_metadata
    tensors, counts = _by_parameter(saved), _by_parameter(numbers)
    known = {part.name for part in parts}
    if others := sorted((tensors.keys() | counts.keys()) - known):
        raise ValueError(f"{shortened(others[0])} is no trained parameter")

    pieces, states = {}, {}
    for index, (part, own) in enumerate(zip(parts, _states(optimizer), strict=True)):
        found = {name: saved[f"{part.name}.{name}"] for name in tensors[part.name]}
        _check_kind(optimizer, part, own, found, counts[part.name])
        state = {name: numbers[f"{part.name}.{name}"] for name in counts[part.name]}
        for name, tensor in found.items():
            first, count, whole = _place(name, part, tensor.size.numel())
            made, dtype = own.get(name), tensor.properties.dtype
            if made is not None and (made.numel(), made.dtype) == (count, dtype):
                content = made.view(-1)
            else:
                content = torch.empty(count, dtype=dtype)
            pieces[f"{part.name}.{name}"] = Piece(content, first, torch.Size([whole]))
            state[name] = content.view(_shape(name, part, content, made))
        if state:
            states[index] = state
    check_pieces(pieces, reader)
    return pieces, states


def _by_parameter(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of states by the parameter that they are of."""
    names = defaultdict(list)
    for key in keys:
        parameter, _, name = key.rpartition(".")
        names[parameter].append(name)
    return names


def _check_kind(
    optimizer: torch.optim.Optimizer,
    part: Part,
    own: Mapping[str, Any],
    found: Mapping[str, TensorStorageMetadata],
    counts: Sequence[str],
) -> None:
    """Raise an error unless a parameter has the states that an optimizer of this kind gives it.

    One that has never had a gradient has none, unless the optimizer makes states before the first.
    """
    if not (found or counts):
        return
    dtypes = {name: tensor.properties.dtype for name, tensor in found.items()}
    sizes = {name: found[name].size.numel() for name in found.keys() & OF_ALL}
    are_whole = all(size == (1 if name == "step" else CODES) for name, size in sizes.items())
    if own:
        tensors = {name: each.dtype for name, each in own.items() if isinstance(each, Tensor)}
        kinds, numbers = [tensors], own.keys() - tensors.keys()
    else:
        kinds, numbers = _kinds(type(optimizer).__name__, part)
    if are_whole and dtypes in kinds and set(counts) == numbers:
        return
    if own:
        raise UserError(
            f"the saved optimizer's states of {shortened(part.name)} do not fit this one's: "
            "resume with the --model and the --optimizer of that run."
        )
    raise ValueError(f"the states of {shortened(part.name)} are of no {type(optimizer).__name__}")


def _kinds(optimizer: str, part: Part) -> tuple[list[dict[str, torch.dtype]], set[str]]:
    """Return the dtypes that states may have together, and the names of the numbers beside them.

    These are optimizers that make their states at the first step.
    """
    fp32 = torch.float32
    if optimizer == "AdamW":
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), part.weight.dtype)
        return [{"step": fp32, **moments}], set()
    of_small = dict.fromkeys(("state1", "state2"), fp32)
    of_blocks = dict.fromkeys(("qmap1", "qmap2", "absmax1", "absmax2"), fp32)
    return [of_small, {**dict.fromkeys(of_small, torch.uint8), **of_blocks}], {"step"}


def _place(name: str, part: Part, entries: int) -> tuple[int, int, int]:
    """Return where a part's entries of a state begin, how many they are, and how many all are.

    entries: how many a state has that is not cut.
    """
    n, total = part.weight.numel(), part.whole.numel()
    if name in OF_ALL:
        return 0, entries, entries
    if name in OF_BLOCKS:
        return part.first // BLOCK, -(-n // BLOCK), -(-total // BLOCK)
    return part.first, n, total


def _shape(name: str, part: Part, content: Tensor, own: Tensor | None) -> torch.Size:
    """Return the shape that the optimizer gives a state: flat, or that of the part's weight.

    own: the state that the optimizer has now, if any.
    """
    if own is not None and own.numel() == content.numel():
        return own.shape
    if name == "step":
        return torch.Size()
    return content.shape if name in OF_ALL | OF_BLOCKS else part.weight.shape


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the states of the optimizer's parameters, in the order of the parts they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state.get(p, {}) for p in parameters]
