"""The reference: the policy as it was when training began, from which the KL is measured.

A policy with adapters is its own reference without them. Any other needs a frozen copy, which is
held in the model's dtype, in 8 bits, or in host memory.
"""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import PackedBatch
from .forward import base_model
from .policy import Policy


class Reference:
    """The starting policy, which gives reference log-probabilities.

    A policy with adapters is its own reference with the adapters switched off. Otherwise `place`
    says where a frozen copy is held:
    - `resident`: on the policy's device;
    - `8bit`: on the policy's device, with the weights of its layers in 8 bits;
    - `offload`: in host memory, from which layers are copied to the device ahead of their use. The
      numbers are the same as with `resident`.
    """

    def __init__(self, policy: Policy, place: str = "resident"):
        self.policy = policy
        self.has_adapter = hasattr(policy.model, "disable_adapter")
        self.stream: LayerStream | None = None
        if self.has_adapter:
            return
        # deepcopy takes what its memo holds as it is, so the device never holds a second full copy.
        replacements = {"resident": lambda _: {}, "8bit": in_8_bits, "offload": on_host}[place]
        frozen = copy.deepcopy(policy.model, replacements(policy.model))
        frozen = frozen.requires_grad_(False).eval()
        self.policy = Policy(frozen, policy.processor, policy.encode, policy.layers)
        if place == "offload":
            self.stream = LayerStream(frozen, policy.device)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Return the reference's log-probability, (N,) fp32, of each target of the batch."""
        if self.has_adapter:
            context = self.policy.model.disable_adapter()
        else:
            context = self.stream or nullcontext()
        with context:
            logp, _ = self.policy.logprobs(batch, temperature)
        return logp


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the vision blocks and then the decoder layers, as a forward pass uses them."""
    inner = base_model(model).model
    return [*inner.visual.blocks, *inner.language_model.layers]


# --- in host memory -------------------------------------------------------------------------------


def on_host(model: nn.Module) -> dict[int, nn.Parameter]:
    """Copy every parameter, frozen, to host memory; returned by the parameter's id.

    The copies of a model on CUDA are page-locked.
    """
    copies = {}
    for parameter in model.parameters():
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
        copies[id(parameter)] = nn.Parameter(host.copy_(parameter.detach()), requires_grad=False)
    return copies


class LayerStream:
    """A context in which a model whose parameters are in host memory runs on `device`.

    While one layer computes, the next layer's weights are copied, on a stream of their own, into
    one of two slots on the device. All other weights (embedding, LM head, norms, the ends of the
    vision tower) are on the device from the beginning of the context to its end. Outside it the
    device holds none.
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
        # The memory of a slot that was filled ahead must not be reused before that copy has ended.
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.slots.clear()
        for parameter, host in self.others:
            parameter.data = host
        for parameters, hosts in zip(self.layers, self.host, strict=True):
            for parameter, host in zip(parameters, hosts, strict=True):
                parameter.data = host

    def _slot(self, index: int) -> tuple:
        """Return the key of a layer's slot: layers with the same shapes take turns in two slots."""
        return index % 2, *(tuple(host.shape) for host in self.host[index])

    def _load(self, index: int) -> None:
        """Begin to copy a layer into its slot, once the slot's last layer has been computed."""
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
        # A new slot's memory may still be in use by work that is queued on the current stream.
        last_use = self.free.get(key) or torch.cuda.current_stream(self.device).record_event()
        self.copies.wait_event(last_use)
        with torch.cuda.stream(self.copies):
            for target, host in zip(self.slots[key], hosts, strict=True):
                target.copy_(host, non_blocking=True)
            self.ready[index] = self.copies.record_event()

    def _before(self, index: int, *_) -> None:
        """Make a layer use its slot's weights, and begin to load the layer after it."""
        self._load(index)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[index])
        slot = self.slots[self._slot(index)]
        for parameter, target in zip(self.layers[index], slot, strict=True):
            parameter.data = target
        self._load(index + 1)

    def _after(self, index: int, *_) -> None:
        """Note when the layer's slot is free again."""
        if self.copies is not None:
            self.free[self._slot(index)] = torch.cuda.current_stream(self.device).record_event()


# --- in 8 bits ------------------------------------------------------------------------------------


def in_8_bits(model: nn.Module) -> dict[int, nn.Module]:
    """Make an Int8Linear for every nn.Linear inside the layers; returned by that module's id."""
    linears = (
        module for layer in layers(model) for module in layer.modules() if type(module) is nn.Linear
    )
    return {id(linear): Int8Linear(linear) for linear in linears}


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8 with one scale per output.

    Activations keep their dtype. bitsandbytes' 8-bit layer would round them too, and that error is
    larger than the KL near the start of training.
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
        """Map x (…, in) to (…, out), in the dtype of x."""
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias
