"""Weights in parts on all processes, brought together layer by layer (`--sharding full`).

torch's FSDP2 does the work: each layer is a group, and what is left (embedding, norms, LM head, the
ends of the vision tower) is the root's. Its hooks fire around calls of modules, and our forward
pass calls none: it reads weights. So a layer runs inside a method of its module, `with_weights`,
around which FSDP2 gathers the weights and lets go of them; the same method of the root surrounds
the whole pass with its loss. A layer that is run again in the backward pass finds its weights
there already.

Gradients are summed in fp32, each process gets those of its rows. What cannot be cut stays whole,
as in `Sharding`: adapters, and parameters that an optimizer with blocks of elements could not
continue at the same bits (`kept_whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ..distributed import World
from ..distributed.sharding import Part, Sharding, gradient_norm, local
from ..errors import UserError
from ..types import PackedBatch
from .families import base_model, vision_tower
from .forward import WITH_WEIGHTS
from .idle import aligned, idle_pack
from .layer_stream import layers

Result = TypeVar("Result")


class FullShards(Sharding):
    """Every process has some rows of each weight, and their optimizer state."""

    kind = "full"

    def __init__(self, model: nn.Module, world: World, mesh: DeviceMesh, block: int = 1):
        """Cut the model's weights, which may be on the CPU, onto the devices of the mesh.

        block: elements of the optimizer's states that cannot be cut, as `kept_whole` takes them.
        """
        self.idle = idle_pack(model, with_image=False)
        self.idle_image = idle_pack(model, with_image=True) if vision_tower(model) else None
        self.root = base_model(model)
        whole = kept_whole(model, world.size, block)
        _shard(model, mesh, whole)
        self.groups = [each for each in self.root.modules() if isinstance(each, FSDPModule)]
        self.started = False
        super().__init__(model, world)

    def _parts(self) -> list[Part]:
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.replicated = [p for _, p in trained if not isinstance(p, DTensor)]
        """Trained parameters that are whole on every process."""
        self.cut: list[tuple[nn.Parameter, Part]] = []
        """Trained parameters that are cut, and the part of each that this process has. It is empty
        on the last processes where there are fewer rows than processes."""
        parts = []
        for name, p in trained:
            if not isinstance(p, DTensor):
                parts.append(Part(name, p, 0, p.shape))
                continue
            first = min(self.world.rank * most_elements(p, self.world.size), p.numel())
            parts.append(Part(name, nn.Parameter(local(p.detach()).view(-1)), first, p.shape))
            self.cut.append((p, parts[-1]))
        return parts

    # --- around a pass --------------------------------------------------------------------------

    def within(self, work: Callable[[], Result]) -> Result:
        """Return `work()`, one pass or several, for which all processes must come here."""
        self._start()
        # Gathered here, the root's weights come from the memory that activations use, too. FSDP2
        # would keep as much for its own stream, and layers would be cut from it.
        self.root.unshard()
        try:
            return getattr(self.root, WITH_WEIGHTS)(lambda: work)
        finally:
            if not torch.is_grad_enabled():  # else the backward pass, which needs them, ends it
                self.root.reshard()
                self._forget_passes()

    @torch.no_grad()
    def _start(self) -> None:
        """Make the root FSDP2's root, which is whichever group comes first."""
        if not self.started:
            self.started = True
            getattr(self.root, WITH_WEIGHTS)(lambda: lambda: None)
            self.root.reshard()
            self._forget_passes()

    def _forget_passes(self) -> None:
        """Drop FSDP2's notes for the next backward pass, which a reference never has."""
        order = self.root._get_fsdp_state()._comm_ctx.post_forward_order
        for group in order:
            group._post_forward_indices.clear()
        order.clear()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Have all weights whole on this process within a block; nothing in it is collective.

        This process's rows, which the whole weights have as well, take no memory meanwhile.
        UserError where the card has no room for all of them.
        """
        self._start()
        is_whole = False
        methods = {group: group.__dict__.pop(WITH_WEIGHTS) for group in self.groups}
        rows: dict[nn.Parameter, _Rows] = {}
        try:
            for group in self.groups:
                parts = list(group.parameters())
                group.unshard()
                for part, whole in zip(parts, group.parameters(), strict=True):
                    own = local(part.detach())
                    # A CPU's memory that numpy has seen, as in a save, cannot be given up.
                    is_cut = part is not whole and len(own) > 0
                    if is_cut and own.untyped_storage().resizable():
                        rows[whole] = _Rows(own, whole, self.world)
            is_whole = True
            yield
        except torch.OutOfMemoryError as error:
            if is_whole:
                raise
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"out of memory in process {self.world.rank} as all weights were brought together, "
                f"with which it samples ({reason}): take more or larger cards, and go on with "
                "--resume where there is a checkpoint."
            ) from error
        finally:
            for group in reversed(self.groups):  # layers first, so that little is there twice
                for whole in group.parameters():
                    if whole in rows and is_whole:  # else the run is over
                        rows.pop(whole).fill()
                setattr(group, WITH_WEIGHTS, methods[group])
                group.reshard()

    def aligned(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Return the packs of `batches`, with idle ones so that all processes run alike."""
        return aligned(self.world, batches, self.idle, self.idle_image)

    # --- around the optimizer's step ------------------------------------------------------------

    def sum_gradients(self, seed: int) -> None:
        """Hand the parts the gradients that FSDP2 has summed, and sum those of whole weights."""
        for parameter, part in self.cut:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and part.weight.numel():
                part.weight.grad = local(gradient).view(-1)
        super().sum_gradients(seed)

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, 0-d in fp32, which is the same everywhere."""
        device = self.parameters[0].device
        square = gradient_norm([part.weight for _, part in self.cut]).to(device).double() ** 2
        dist.all_reduce(square)
        square += gradient_norm(self.replicated).to(device).double() ** 2
        dist.broadcast(square, src=0)  # the whole ones' may be rounded otherwise by other cards
        return square.sqrt().float()


class _Rows:
    """The memory of the rows that this process has of a parameter, which is given up for a time."""

    def __init__(self, rows: Tensor, whole: Tensor, world: World):
        """Free the memory of the rows; `whole` is the parameter with those of all processes."""
        first = world.rank * -(-len(whole) // world.size)
        self.rows, self.of_whole = rows, whole.detach()[first : first + len(rows)]
        self.size = rows.untyped_storage().nbytes()
        rows.untyped_storage().resize_(0)

    @torch.no_grad()
    def fill(self) -> None:
        """Take memory again, and write the rows of the whole parameter into it."""
        self.rows.untyped_storage().resize_(self.size)
        self.rows.copy_(self.of_whole)


def kept_whole(model: nn.Module, size: int, block: int) -> set[nn.Parameter]:
    """Return the parameters that `size` processes do not cut.

    They are adapters, and trained parameters of which a process's rows would not end at a multiple
    of `block` elements: an optimizer that has one scale for each block of its states would then
    round otherwise than on another number of processes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if base_model(model) is not model:
        return set(trained)
    return {p for p in trained if most_elements(p, size) % block}


def most_elements(parameter: nn.Parameter, size: int) -> int:
    """Return the elements of the most rows of a parameter that one of `size` processes has."""
    rows = parameter.shape[0]
    return -(-rows // size) * (parameter.numel() // rows)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all its rows, which is collective if it has been cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(model: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Cut the rows of all parameters but those that stay `whole`, a layer at a time."""
    root = base_model(model)
    device = torch.device(mesh.device_type)
    for p in whole:
        p.data = p.data.to(device)
    is_small = next(root.parameters()).dtype.itemsize < 4
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if is_small else None)
    for module in (*layers(model), root):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        # The sum of all gradients, and not their mean; gloo has no sum with a factor.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        setattr(module, WITH_WEIGHTS, MethodType(_with_weights, module))
        register_fsdp_forward_method(module, WITH_WEIGHTS)


def _with_weights(module: nn.Module, make: Callable[[], Callable], *arguments, **named):
    """Make a function of the weights that the module has now, and call it."""
    return make()(*arguments, **named)
