"""What a checkpoint holds of weights and optimizer, whoever has which part of them.

Trained weights have their names and shapes in the model. The state `m` of a parameter `a.weight` is
the tensor `a.weight.m`, flat: one entry for each element of the parameter, or for each block of
them, in the order of the parameter's elements, of which each process has those of its part.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..kernels.adamw.state import BLOCK
from .pieces import Piece, load_pieces
from .shard_files import ShardReader
from .sharding import Part
from .world import World

OF_BLOCKS = {"m_scale", "v_scale", "absmax1", "absmax2"}
"""States that have an entry for each 256 elements. With such states, parts consist of whole blocks,
but for the end of a parameter."""
OF_ALL = {"step", "qmap1", "qmap2"}
"""States of which every process has all: a count, and the codes of bitsandbytes."""


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

    Collective. Raises UserError where the optimizer says that it does not fit.
    """
    saved = reader.read_metadata().state_dict_metadata
    names = defaultdict(list)
    for key in saved:
        parameter, _, name = key.rpartition(".")
        names[parameter].append(name)

    pieces, states = {}, defaultdict(dict)
    for index, (part, own) in enumerate(zip(parts, _states(optimizer), strict=True)):
        has_all = own.keys() == set(names[part.name])
        for name in names[part.name]:
            tensor = saved[key := f"{part.name}.{name}"]
            first, count, whole = _place(name, part, tensor.size.numel())
            made, dtype = own.get(name), tensor.properties.dtype
            # States that the optimizer has already are read in place: beside them, every process
            # of a machine would need as much of its memory.
            if has_all and (made.numel(), made.dtype) == (count, dtype):
                content = made.view(-1)
            else:
                content = torch.empty(count, dtype=dtype)
            pieces[key] = Piece(content, first, torch.Size([whole]))
            states[index][name] = content.view(_shape(name, part, content, made))
    for key, value in numbers.items():
        parameter, _, name = key.rpartition(".")
        for index, part in enumerate(parts):
            if part.name == parameter:
                states[index][name] = value
    load_pieces(pieces, reader, world)
    state = {**optimizer.state_dict(), "state": dict(states)}
    world.in_all(lambda: optimizer.load_state_dict(state))


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
