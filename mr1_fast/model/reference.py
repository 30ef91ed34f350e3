"""The policy as it was when training began, for KL: without adapters, or a copy: as is, in 8 bits, or streamed."""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import PackedBatch
from .forward import base_model
from .load import Policy


class Reference:
    """Log-probabilities of the starting policy.

    A policy with adapters is its own reference with them off. Otherwise `place` says where a frozen copy lives:
    `resident` (on the policy's device), `8bit` (there, its layers' weights in 8 bits), or `offload` (in host memory,
    layers streamed to the device ahead of their use; the same numbers as `resident`).
    """

    def __init__(self, policy: Policy, place: str = "resident"):
        self.policy = policy
        self.has_adapter = hasattr(policy.model, "disable_adapter")
        self.stream: LayerStream | None = None
        if self.has_adapter:
            return
        # What deepcopy finds in its memo it takes as it is, so a second full copy never exists on the device.
        replaced = {"resident": lambda _: {}, "8bit": in_8_bits, "offload": on_host}[place]
        frozen = copy.deepcopy(policy.model, replaced(policy.model)).requires_grad_(False).eval()
        self.policy = Policy(frozen, policy.processor, policy.encode)
        if place == "offload":
            self.stream = LayerStream(frozen, policy.device)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Reference log-probabilities (N,), fp32."""
        with (
            self.policy.model.disable_adapter()
            if self.has_adapter
            else self.stream or nullcontext()
        ):
            return self.policy.logprobs(batch, temperature)[0]


def layers(model: nn.Module) -> list[nn.Module]:
    """Vision blocks and decoder layers, in the order of their use."""
    inner = base_model(model).model
    return [*inner.visual.blocks, *inner.language_model.layers]


# --- in host memory -----------------------------------------------------------------------------------------------


def on_host(model: nn.Module) -> dict[int, nn.Parameter]:
    """A frozen copy of every parameter in host memory (page-locked for CUDA), by the parameter's id."""
    copies = {}
    for parameter in model.parameters():
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
        copies[id(parameter)] = nn.Parameter(host.copy_(parameter.detach()), requires_grad=False)
    return copies


class LayerStream:
    """Context in which a model, whose parameters are in host memory, runs on `device`.

    Each layer's weights are copied on a stream of their own into one of two slots while the layer before computes; the
    rest (embedding, LM head, norms, the vision tower's ends) is there from beginning to end. Outside nothing is.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layers = [list(layer.parameters()) for layer in layers(model)]
        self.host = [[p.data for p in parameters] for parameters in self.layers]
        in_layers = {id(p) for parameters in self.layers for p in parameters}
        self.others = [(p, p.data) for p in model.parameters() if id(p) not in in_layers]
        for index, layer in enumerate(layers(model)):
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index))

    def __enter__(self) -> None:
        self.slots: dict[tuple, list[Tensor]] = {}
        self.ready: dict[int, torch.cuda.Event | None] = {}
        self.free: dict[tuple, torch.cuda.Event] = {}
        try:
            for parameter, host in self.others:
                parameter.data = host.to(self.device, non_blocking=True)
        except torch.OutOfMemoryError:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        if (
            self.copies is not None
        ):  # a slot that was filled ahead must not be used again before the copy has ended
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.slots.clear()
        for parameter, host in self.others:
            parameter.data = host
        for parameters, hosts in zip(self.layers, self.host, strict=True):
            for parameter, host in zip(parameters, hosts, strict=True):
                parameter.data = host

    def _slot(self, index: int) -> tuple:
        """Layers of the same shapes take turns in two slots."""
        return index % 2, *(tuple(host.shape) for host in self.host[index])

    def _load(self, index: int) -> None:
        """Begin to copy a layer into its slot, once the layer that used it has been computed."""
        if index in self.ready or index >= len(self.layers):
            return
        key, hosts = self._slot(index), self.host[index]
        if key not in self.slots:
            self.slots[key] = [torch.empty_like(host, device=self.device) for host in hosts]
        if self.copies is None:
            for target, host in zip(self.slots[key], hosts, strict=True):
                target.copy_(host)
            self.ready[index] = None
            return
        # Nothing in this slot was computed on yet: its memory may still be in use by what the allocator gave it to.
        self.copies.wait_event(
            self.free.get(key) or torch.cuda.current_stream(self.device).record_event()
        )
        with torch.cuda.stream(self.copies):
            for target, host in zip(self.slots[key], hosts, strict=True):
                target.copy_(host, non_blocking=True)
            self.ready[index] = self.copies.record_event()

    def _before(self, index: int, *_) -> None:
        self._load(index)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[index])
        for parameter, target in zip(
            self.layers[index], self.slots[self._slot(index)], strict=True
        ):
            parameter.data = target
        self._load(index + 1)

    def _after(self, index: int, *_) -> None:
        if self.copies is not None:
            self.free[self._slot(index)] = torch.cuda.current_stream(self.device).record_event()


# --- in 8 bits ----------------------------------------------------------------------------------------------------


def in_8_bits(model: nn.Module) -> dict[int, nn.Module]:
    """An Int8Linear for every linear layer of the layers, by the linear layer's id."""
    linears = (
        module for layer in layers(model) for module in layer.modules() if type(module) is nn.Linear
    )
    return {id(linear): Int8Linear(linear) for linear in linears}


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8 with a scale per output, its activations as they are.

    bitsandbytes' 8-bit layer would round activations too, and the KL near the start is smaller than that error.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-30).to(weight.dtype)
        rounded = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias
