"""The reference: the policy as it was when training began, from which the KL is measured.

A policy with new adapters is its own reference without them, and one that goes on with adapters
of an earlier run with a copy of those. Any other policy needs a frozen copy, which is held in the
model's dtype, in 8 bits, or in host memory.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import SINGLE, World
from ..distributed.sharding import Sharding
from ..types import PackedBatch
from .joined_weights import join_weights
from .layer_stream import LayerStream, layers, on_host
from .layerwise import run_by_layers, states_wait_on_device
from .policy import Policy


class Reference:
    """The starting policy, which gives reference log-probabilities.

    A policy with adapters is its own reference with the adapters switched off, or as they are now
    if they are those of an earlier run. Otherwise `place` says where a frozen copy is held:
    - `resident`: on the policy's device;
    - `8bit`: on the policy's device, with the weights of its layers in 8 bits;
    - `offload`: in host memory, from which layers are copied to the device ahead of their use, once
      for all packs of a step. The numbers are the same as with `resident`. The processes of a
      machine have one copy together.

    Parameters that are not trained stay what they are, so the copy shares the policy's. All
    processes of a `world` make theirs together, before any of them trains.
    """

    def __init__(self, policy: Policy, place: str = "resident", world: World = SINGLE):
        self.policy = policy
        self.has_adapter = hasattr(policy.model, "disable_adapter")
        self.stream: LayerStream | None = None
        self.adapters: list[tuple[nn.Parameter, Tensor]] = []
        """The parameters of an earlier run's adapters, and a copy of each as it was then."""
        if self.has_adapter:
            if policy.adapters_go_on:
                trained = [p for p in policy.model.parameters() if p.requires_grad]
                self.adapters = [(p, p.detach().clone()) for p in trained]
            self.sharding = Sharding(policy.model)
            """How the weights are spread over processes; whoever spreads them sets it."""
            return
        # deepcopy takes what its memo holds as it is, so the device never holds a second full copy.
        shared = frozen_parameters(policy.model)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        replacements = dict(shared)
        if place == "8bit":
            replacements |= in_8_bits(policy.model)
        elif place == "offload":
            replacements |= on_host(trained, world)
        frozen = copy.deepcopy(policy.model, replacements).requires_grad_(False).eval()
        self.policy = Policy(frozen, policy.processor, policy.encode, policy.layers)
        if policy.layers.fused and place == "resident":
            join_weights(layers(frozen))
        if place == "offload":
            self.stream = LayerStream(frozen, policy.device, resident=shared)
            self.gradients = sum(p.nbytes for p in trained)
        self.sharding = Sharding(frozen)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return the reference's log-probability, (N,) fp32, of each target, for each of the packs.

        The packs may be in host memory; they are moved to the device as they are needed.
        """
        if self.stream is not None:
            with self.stream:
                return self._by_layers(self.stream, batches, temperature)
        with self._as_it_was():
            return self.policy.logprobs_by_pack(batches, temperature, self.sharding)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Give the policy's adapters the effect that they had when training began."""
        without = self.has_adapter and not self.adapters
        self._swap_adapters()
        try:
            with self.policy.model.disable_adapter() if without else nullcontext():
                yield
        finally:
            self._swap_adapters()

    def _swap_adapters(self) -> None:
        for parameter, other in self.adapters:
            parameter.data, other.data = other.data, parameter.data

    def _by_layers(
        self, stream: LayerStream, batches: Sequence[PackedBatch], temperature: float
    ) -> list[Tensor]:
        """Compute `logprobs` with each layer over all packs before the next layer is needed."""
        model, fused = self.policy.model, self.policy.layers.fused

        def logprobs(hidden: Tensor, batch: PackedBatch) -> Tensor:
            return self.policy.logprobs_of(hidden, batch, temperature)[0]

        on_device = states_wait_on_device(model, batches, stream.device_bytes, self.gradients)
        return run_by_layers(model, batches, stream, logprobs, fused, on_device)


def frozen_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters that are not trained, by their ids."""
    return {id(p): p for p in model.parameters() if not p.requires_grad}


# --- in 8 bits ------------------------------------------------------------------------------------


def in_8_bits(model: nn.Module) -> dict[int, nn.Module]:
    """Make an Int8Linear for every nn.Linear inside the layers; returned by that module's id.

    Frozen layers are left out, since they are shared with the policy.
    """
    modules = (module for layer in layers(model) for module in layer.modules())
    linears = (module for module in modules if type(module) is nn.Linear)
    return {id(each): Int8Linear(each) for each in linears if each.weight.requires_grad}


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
