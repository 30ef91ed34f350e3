"""Which part of the weights and of the optimizer's state each process has, and what that moves.

Three kinds (docs/distributed.md):
- none: every process has everything; gradients are summed;
- optimizer: weights are whole everywhere, and each process updates a part of every parameter, for
  which alone it has states;
- full: weights, too, are in parts, which FSDP2 brings together layer by layer.

The optimizer is made over `Sharding.parts`, and knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..kernels.adamw.step import add_stochastic_
from ..seeds import derive_seed
from .world import SINGLE, World

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """The part of a trained parameter that this process updates: some of its elements in a row."""

    name: str
    """The parameter's name in the model."""
    weight: nn.Parameter
    """(n,) or the parameter's shape: the elements that are updated here, in the model's memory."""
    first: int
    """Index of the first of them among all elements of the parameter."""
    whole: torch.Size
    """The parameter's shape as the model defines it."""


class Sharding:
    """How weights and optimizer are spread over processes: here, everybody has all of them.

    That is `--sharding none`, what a process alone uses, and the base of the other kinds.
    """

    kind = "none"
    bucket = 2**24
    """Most elements that go through one call, 64 MiB in fp32: large enough for the wires, and small
    beside what an update needs anyway."""

    def __init__(self, model: nn.Module, world: World = SINGLE):
        self.model, self.world = model, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        """The model's trained parameters, which get gradients."""
        self.parts = self._parts()
        """What the optimizer updates, in the order of `parameters`."""

    def _parts(self) -> list[Part]:
        return [
            Part(name, p, 0, p.shape)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    # --- around a pass --------------------------------------------------------------------------

    def within(self, work: Callable[[], Result]) -> Result:
        """Return `work()`, a forward pass of the model, with the weights that it needs."""
        return work()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Have all weights whole on this process within a block, as a rollout needs them."""
        yield

    def aligned(self, batches: Sequence[Result]) -> Iterable[Result]:
        """Return the packs that this process computes: those of `batches`.

        Where passes are collective, packs without weight follow until all have equally many.
        """
        return batches

    # --- around the optimizer's step ------------------------------------------------------------

    @torch.no_grad()
    def sum_gradients(self, seed: int) -> None:
        """Sum the gradients over all processes, in fp32, into `.grad` of the parts' weights.

        A sum in bf16 is rounded stochastically, by `seed` and the element. A parameter without a
        gradient on any process keeps none.
        """
        if self.world.size == 1:
            return
        gradients = self._agreed_gradients()
        numbers, flat = list(gradients), list(gradients.values())
        for bucket in buckets(list(map(len, flat)), self.bucket):
            pieces = [flat[index][elements] for index, elements in bucket]
            if len(pieces) == 1 and pieces[0].dtype == torch.float32:
                dist.all_reduce(pieces[0])
                continue
            total = torch.cat([piece.float() for piece in pieces])
            dist.all_reduce(total)
            parts = total.split([len(piece) for piece in pieces])
            for (index, elements), piece, part in zip(bucket, pieces, parts, strict=True):
                round_into_(piece, part, sum_seed(seed, numbers[index]), elements.start)

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, 0-d in fp32, which is the same everywhere.

        It is the first process's: another model of card may round the same norm differently.
        """
        norm = gradient_norm([part.weight for part in self.parts])
        if self.world.size > 1 and self.parameters:
            norm = norm.to(self.parameters[0].device)
            dist.broadcast(norm, src=0)
        return norm

    def share_weights(self) -> None:
        """Bring what each process has updated to all that need it."""

    def _agreed_gradients(self) -> dict[int, Tensor]:
        """Return the gradients, flat, of all parameters that have one on any process, by number.

        Where this process has none, it is 0.
        """
        has = self.world.sums([p.grad is not None for p in self.parameters])
        chosen = {
            number: p
            for number, (p, count) in enumerate(zip(self.parameters, has, strict=True))
            if count
        }
        for p in chosen.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return {number: p.grad.view(-1) for number, p in chosen.items()}


def local(tensor: Tensor) -> Tensor:
    """Return the rows that this process has of a tensor that FSDP2 has cut; else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return the 2-norm of the gradients that weights have, 0-d in fp32.

    torch's `get_total_norm` would compute it in the gradients' own 16 bits.
    """
    norms = [
        torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        for weight in weights
        if weight.grad is not None
    ]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def buckets(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Cut sequences of these lengths, and gather the pieces, in order, to at most `most` elements.

    A piece is the number of its sequence and which elements of it.

    >>> list(buckets([2, 5], most=3))
    [[(0, slice(0, 2, None))], [(1, slice(0, 3, None))], [(1, slice(3, 5, None))]]
    """
    bucket: list[tuple[int, slice]] = []
    room = most
    for number, length in enumerate(lengths):
        for start in range(0, length, most):
            size = min(most, length - start)
            if size > room:
                yield bucket
                bucket, room = [], most
            bucket.append((number, slice(start, start + size)))
            room -= size
    if bucket:
        yield bucket


def sum_seed(seed: int, number: int) -> int:
    """Return the seed by which the sum of the gradients of parameter `number` is rounded."""
    return derive_seed(seed, "sum", number)


def round_into_(target: Tensor, total: Tensor, seed: int, first: int = 0) -> None:
    """Write an fp32 sum into a gradient (n,); in bf16 it is rounded stochastically by `seed`.

    `first` is the number of its first element in its parameter, so that the bits are those of the
    parameter as a whole.
    """
    if target.dtype == torch.bfloat16:
        add_stochastic_(target.zero_(), total, seed, first)
    else:
        target.copy_(total)
