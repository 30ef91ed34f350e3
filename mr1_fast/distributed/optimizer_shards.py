"""Weights whole on every process, the optimizer's states in parts (`--sharding optimizer`).

Each process updates its part of every trained parameter: one piece of its flat elements, of whole
blocks of 256, so that AdamW computes there what it would compute alone. Gradients are summed for
the process that needs them (reduce-scatter), and updated weights go to all (all-gather): together
what summing all gradients everywhere sends.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.adamw.state import BLOCK
from .sharding import Part, Sharding, buckets, gradient_norm, round_into_, sum_seed

# torch 2.13 has new names for them.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class OptimizerShards(Sharding):
    """Every process has all weights, and states of a part of every trained parameter.

    A small parameter may have fewer blocks than there are processes. The last ones then have an
    empty part of it, which never gets a gradient, so that optimizers pass over it.
    """

    kind = "optimizer"

    def _parts(self) -> list[Part]:
        return [self._part(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        own = self._own(parameter.numel())
        # The memory is the model's: what updates the part updates the model.
        return Part(name, nn.Parameter(_flat(parameter)[own]), own.start, parameter.shape)

    # --- around the optimizer's step ------------------------------------------------------------

    @torch.no_grad()
    def sum_gradients(self, seed: int) -> None:
        """Sum the gradients over all processes, in fp32, each process those of its parts.

        The sums take the place of this process's own gradients, in whose memory they lie: `.grad`
        of a part is that piece of `.grad` of its parameter, whose rest then holds nothing of use.
        """
        gradients = self._agreed_gradients()
        numbers, flat = list(gradients), list(gradients.values())
        sizes = [piece_size(len(gradient), self.world.size) for gradient in flat]
        for bucket in buckets(sizes, self._most()):
            pieces = [(flat[index], sizes[index], elements) for index, elements in bucket]
            width = sum(elements.stop - elements.start for _, elements in bucket)
            rows = torch.zeros(self.world.size, width, device=flat[0].device)
            for columns, piece in zip(_columns(rows, bucket), pieces, strict=True):
                _exchange(columns, *piece, write=False)
            total = sum_of_own_row(rows, self.world.rank)

            for part, (index, elements) in zip(_columns(total, bucket), bucket, strict=True):
                own = self._own(len(flat[index]))
                target = flat[index][own][elements]
                first = own.start + elements.start
                round_into_(target, part[: len(target)], sum_seed(seed, numbers[index]), first)

        for number, gradient in gradients.items():
            own = gradient[self._own(len(gradient))]
            self.parts[number].weight.grad = own if len(own) else None

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, 0-d in fp32, which is the same everywhere."""
        squares = gradient_norm([part.weight for part in self.parts]).square()
        if self.world.size > 1 and self.parameters:
            squares = squares.to(self.parameters[0].device)
            dist.all_reduce(squares)
        return squares.sqrt()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Bring the updated parts of all processes into the weights of each."""
        weights = [_flat(p) for p in self.parameters if p.grad is not None]
        for dtype in dict.fromkeys(weight.dtype for weight in weights):
            self._gather([weight for weight in weights if weight.dtype == dtype])

    def _gather(self, weights: list[Tensor]) -> None:
        """Bring the parts of weights (n,) of one dtype to all processes."""
        sizes = [piece_size(len(weight), self.world.size) for weight in weights]
        for bucket in buckets(sizes, self._most()):
            pieces = [(weights[index], sizes[index], elements) for index, elements in bucket]
            width = sum(elements.stop - elements.start for _, elements in bucket)
            rows = weights[0].new_empty(self.world.size, width)
            own_row = rows[self.world.rank]
            for columns, (index, elements) in zip(_columns(own_row, bucket), bucket, strict=True):
                own = weights[index][self._own(len(weights[index]))][elements]
                columns[: len(own)].copy_(own)
            all_gather(rows.view(-1), own_row)
            for columns, piece in zip(_columns(rows, bucket), pieces, strict=True):
                _exchange(columns, *piece, write=True)

    # --- who has what ---------------------------------------------------------------------------

    def _own(self, length: int) -> slice:
        """Return which of a parameter's elements this process has."""
        size = piece_size(length, self.world.size)
        first = min(self.world.rank * size, length)
        return slice(first, min(first + size, length))

    def _most(self) -> int:
        """Return how many elements of each process go through one call."""
        return max(1, self.bucket // self.world.size)


def piece_size(length: int, processes: int) -> int:
    """Return how many of a parameter's elements each process has, but for those at its end."""
    blocks = -(-length // BLOCK)
    return -(-blocks // processes) * BLOCK


def sum_of_own_row(rows: Tensor, rank: int) -> Tensor:
    """Sum rows (N, width) over N processes; returns row number `rank` of the sum, (width,).

    Not every version of torch has a reduce-scatter over gloo, where all rows are summed instead.
    """
    if dist.get_backend() == "gloo":
        dist.all_reduce(rows)
        return rows[rank]
    total = torch.empty_like(rows[rank])
    reduce_scatter(total, rows.view(-1))
    return total


def _exchange(columns: Tensor, flat: Tensor, size: int, elements: slice, write: bool) -> None:
    """Copy some elements of all pieces of a parameter (n,) into columns (N, width), or back.

    Each of N processes has `size` elements in a row, but for the last ones, who may have fewer.
    """
    whole = len(flat) // size
    pairs = [(columns[:whole], flat[: whole * size].view(whole, size)[:, elements])]
    if len(rest := flat[whole * size :][elements]):
        pairs.append((columns[whole, : len(rest)], rest))
    for in_columns, in_flat in pairs:
        if write:
            in_flat.copy_(in_columns)
        else:
            in_columns.copy_(in_flat)


def _columns(rows: Tensor, bucket: list[tuple[int, slice]]) -> tuple[Tensor, ...]:
    """Cut rows (…, width) into the parts of a bucket's pieces."""
    return rows.split([elements.stop - elements.start for _, elements in bucket], dim=-1)


def _flat(parameter: nn.Parameter) -> Tensor:
    """View a parameter's elements in a row, without its gradient."""
    return parameter.detach().view(-1)
