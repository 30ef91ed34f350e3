"""Weights of linear layers that take the same input, next to one another in memory.

A query's, a key's and a value's weights, or a gate's and an up's, are then one matrix to a product,
and still the parameters of their modules to everybody else. One product of 2,048 outputs fills a
GPU where a key's 256 would not.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def join_weights(layers: Iterable[nn.Module]) -> None:
    """Move the weights of such linear layers in transformer layers next to one another.

    Weights that already lie so stay where they are: models may share them.
    """
    for layer in layers:
        for weights in _groups(layer):
            if as_one(weights) is not None:
                continue
            joined = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, _rows(joined, weights), strict=True):
                weight.data = part


def empty_joined(
    layer: nn.Module, like: Sequence[tuple[nn.Parameter, Tensor]], device: torch.device
) -> list[Tensor]:
    """Allocate a tensor for some parameters of a layer, the weights of a group joined.

    like: the parameters, and beside each a tensor of the shape and dtype that its own shall have.
    """
    wanted = {id(parameter) for parameter, _ in like}
    parts: dict[int, Tensor] = {}
    for weights in _groups(layer):
        if all(id(weight) in wanted for weight in weights):
            rows = sum(map(len, weights))
            joined = weights[0].new_empty(rows, weights[0].shape[1], device=device)
            parts |= zip(map(id, weights), _rows(joined, weights), strict=True)
    return [
        parts[id(parameter)] if id(parameter) in parts else torch.empty_like(tensor, device=device)
        for parameter, tensor in like
    ]


def as_one(weights: Sequence[Tensor]) -> Tensor | None:
    """View weights (Nᵢ, D) as one matrix (ΣN, D); None unless they lie behind one another."""
    first = weights[0].detach()
    storage, end = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        is_next = weight.storage_offset() == end and weight.is_contiguous()
        if not is_next or weight.untyped_storage()._cdata != storage:
            return None
        end += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


def _groups(layer: nn.Module) -> list[list[nn.Parameter]]:
    """Return the weights that belong together, of each group of plain linear layers."""
    found = []
    for module in layer.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parts = [getattr(module, name, None) for name in names]
            linears = [getattr(part, "base_layer", part) for part in parts]
            if all(type(linear) is nn.Linear for linear in linears):
                found.append([linear.weight for linear in linears])
    return found


def _rows(joined: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return joined.split([len(weight) for weight in weights])
