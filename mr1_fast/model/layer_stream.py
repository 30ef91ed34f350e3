"""Weights in host memory, which are copied to the device layer by layer, ahead of their use."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..distributed import SINGLE, World
from .families import text_model, vision_tower
from .host_memory import can_share, shared_copies
from .joined_weights import empty_joined


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the vision blocks and then the decoder layers, as a forward pass uses them."""
    tower = vision_tower(model)
    return [*(tower.blocks if tower else ()), *text_model(model).layers]


def on_host(parameters: Sequence[nn.Parameter], world: World = SINGLE) -> dict[int, nn.Parameter]:
    """Copy parameters, frozen, to host memory; returned by the parameter's id.

    The copies of what is on CUDA are page-locked. Processes of one machine share them; all of the
    `world` call this, with equal parameters.
    """
    if can_share(world):
        copies = shared_copies(parameters, world)
    else:
        copies = [
            torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda).copy_(p.detach())
            for p in parameters
        ]
    return {
        id(parameter): nn.Parameter(copy, requires_grad=False)
        for parameter, copy in zip(parameters, copies, strict=True)
    }


def streamed_bytes(model: nn.Module, resident: Collection[int] = ()) -> tuple[int, int]:
    """Return the bytes that a LayerStream has on the device: of its slots, and of other weights.

    `resident` are the ids of the parameters that are always on the device.
    """
    slots, in_layers, kinds = 0, set(), {}
    for layer in layers(model):
        streamed = [p for p in layer.parameters() if id(p) not in resident]
        in_layers |= set(map(id, streamed))
        kind = tuple(p.shape for p in streamed)
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= 2:
            slots += sum(p.nbytes for p in streamed)
    others = [p for p in model.parameters() if id(p) not in in_layers and id(p) not in resident]
    return slots, sum(p.nbytes for p in others)


class LayerStream:
    """A context in which a model whose parameters are in host memory runs on `device`.

    Its layers are run by a loop over `through`: while one computes, the weights of the next are
    copied, on a stream of their own, into one of two slots on the device. All other weights
    (embedding, LM head, norms, the ends of the vision tower) are on the device from the beginning
    of the context to its end. Outside it the device holds none.

    `resident` are the ids of the parameters that are on the device anyway, and stay there.
    """

    def __init__(self, model: nn.Module, device: torch.device, resident: Collection[int] = ()):
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device_bytes = sum(streamed_bytes(model, resident))

        def in_host_memory(parameters) -> list[tuple[nn.Parameter, Tensor]]:
            return [(p, p.data) for p in parameters if id(p) not in resident]

        self.host = {layer: in_host_memory(layer.parameters()) for layer in layers(model)}
        self.numbers = {layer: number for number, layer in enumerate(self.host)}
        in_layers = {id(p) for weights in self.host.values() for p, _ in weights}
        self.others = in_host_memory(p for p in model.parameters() if id(p) not in in_layers)

    @property
    def is_pageable(self) -> bool:
        """Whether a GPU must wait for its copies, since the host memory is not page-locked."""
        if self.copies is None:
            return False
        weights = (self.others, *self.host.values())
        return not all(host.is_pinned() for each in weights for _, host in each)

    def __enter__(self) -> None:
        self.slots: dict[tuple, list[Tensor]] = {}
        self.ready: dict[nn.Module, torch.cuda.Event | None] = {}
        self.free: dict[tuple, torch.cuda.Event] = {}
        try:
            for parameter, host in self.others:
                parameter.data = host.to(self.device, non_blocking=True)
        except torch.OutOfMemoryError:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        # The memory of a slot that was filled ahead must not be reused before that copy has ended.
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.slots.clear()
        for weights in (self.others, *self.host.values()):
            for parameter, host in weights:
                parameter.data = host

    def through(
        self, chosen: Sequence[nn.Module], then: nn.Module | None = None
    ) -> Iterator[nn.Module]:
        """Yield layers in turn, each while its weights are on the device.

        `then` is the layer that will be used after the last of them: it is copied meanwhile.
        """
        for number, layer in enumerate(chosen):
            self._load(layer)
            self._use(layer)
            following = chosen[number + 1] if number + 1 < len(chosen) else then
            if following is not None:
                self._load(following)
            yield layer
            self._release(layer)

    def _slot(self, layer: nn.Module) -> tuple:
        """Return the key of a layer's slot: layers with the same shapes take turns in two slots."""
        return self.numbers[layer] % 2, *(tuple(host.shape) for _, host in self.host[layer])

    def _load(self, layer: nn.Module) -> None:
        """Begin to copy a layer into its slot, once the slot's last layer has been computed."""
        if layer in self.ready:
            return
        key, hosts = self._slot(layer), [host for _, host in self.host[layer]]
        if key not in self.slots:
            self.slots[key] = empty_joined(layer, self.host[layer], self.device)
        if self.copies is None:
            for target, host in zip(self.slots[key], hosts, strict=True):
                target.copy_(host)
            self.ready[layer] = None
            return
        # A new slot's memory may still be in use by work that is queued on the current stream.
        last_use = self.free.get(key) or torch.cuda.current_stream(self.device).record_event()
        self.copies.wait_event(last_use)
        with torch.cuda.stream(self.copies):
            for target, host in zip(self.slots[key], hosts, strict=True):
                target.copy_(host, non_blocking=True)
            self.ready[layer] = self.copies.record_event()

    def _use(self, layer: nn.Module) -> None:
        """Make a layer use its slot's weights, from when they have arrived."""
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[layer])
        for (parameter, _), target in zip(
            self.host[layer], self.slots[self._slot(layer)], strict=True
        ):
            parameter.data = target

    def _release(self, layer: nn.Module) -> None:
        """Make the layer's slot free again once the work that is queued now has been done."""
        if self.copies is not None:
            event = torch.cuda.current_stream(self.device).record_event()
            self.free[self._slot(layer)] = event
        del self.ready[layer]
        for parameter, host in self.host[layer]:
            parameter.data = host
