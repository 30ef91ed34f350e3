"""The linear layers of a decode step: the way to compute them is chosen once, from the modules.

A model's layers may be plain, have LoRA adapters, or weights in 4 bits; peft's and bitsandbytes'
modules would add launches to each, and dequantise every weight at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels.decode.layer import Layer
from ..kernels.decode.linear import linear_parts, linears, splits, swiglu, takes
from ..kernels.four_bit.weight import FourBitWeight
from ..kernels.layers.operations import silu_mul
from ..model.adapters import base_and_adapter
from ..model.four_bits import product_dtype
from ..model.joined_weights import as_one
from ..model.linears import Linears


class Projection:
    """Linear layers that take the same input, each by its module's own forward."""

    way = "module by module"
    upcoming: tuple[Tensor, ...] = ()
    """What the layers read from memory, where a kernel may load it ahead of time."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        self.modules = modules

    @property
    def key(self) -> tuple:
        """Return what a CUDA graph holds beside the model's weights: with another, it is stale."""
        return self.way, *(_adapters_in_use(module) for module in self.modules)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Apply each of the layers to x (R, D): (R, N_i) each."""
        return tuple(module(x) for module in self.modules)

    def gated(self, x: Tensor) -> Tensor:
        """Compute silu(gate(x)) · up(x), (R, F), of the two layers and x (R, D)."""
        return silu_mul(torch.cat(self.outputs(x), dim=1), None)

    def parts(self, x: Tensor) -> Tensor:
        """Apply the only layer to x (R, D): (R, N), or parts (S, R, N) that the next norm adds."""
        return self.outputs(x)[0]


class JoinedProjection(Projection):
    """Layers whose outputs come side by side from one function."""

    def __init__(
        self,
        modules: tuple[nn.Module, ...],
        way: str,
        lengths: tuple[int, ...],
        product: Callable[[Tensor], Tensor],
    ):
        super().__init__(modules)
        self.way, self.lengths, self.product = way, lengths, product

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute them side by side."""
        return self.product(x).split(self.lengths, dim=1)

    def gated(self, x: Tensor) -> Tensor:
        """Compute both side by side, and gate them."""
        return silu_mul(self.product(x), None)


class KernelProjection(Projection):
    """Layers in one kernel for decoding, with their adapters, from weights in 16 or 4 bits."""

    def __init__(self, modules: tuple[nn.Module, ...], layers: tuple[Layer, ...], like: Tensor):
        super().__init__(modules)
        self.layers = layers
        self.upcoming = tuple(layer.stored for layer in layers)
        bits = "4" if layers[0].in_four_bits else "16"
        lora = " with LoRA" if any(layer.adapter for layer in layers) else ""
        is_split = len(layers) > 1 or splits(layers[0], like)
        self.way = f"one kernel, {bits} bits{lora}" if is_split else "PyTorch's product"

    @property
    def key(self) -> tuple:
        """Return the way, and what launches hold: scales, addresses of adapters and levels."""
        found: list[object] = [self.way]
        for layer in self.layers:
            tensors = [layer.adapter.a, layer.adapter.b] if layer.adapter else []
            if isinstance(layer.weight, FourBitWeight):
                parts = vars(layer.weight).values()
                tensors += [each for each in parts if isinstance(each, Tensor)]
            found += [layer.adapter and layer.adapter.scale, *(each.data_ptr() for each in tensors)]
        return tuple(found)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute them in one launch."""
        return linears(x, self.layers)

    def gated(self, x: Tensor) -> Tensor:
        """Compute the gating, too, in the same launch."""
        return swiglu(x, *self.layers)

    def parts(self, x: Tensor) -> Tensor:
        """Leave a product that was split to the next norm."""
        return linear_parts(x, self.layers[0])


def projection(like: Tensor, *modules: nn.Module) -> Projection:
    """Choose the fastest way for modules on the same input, of the dtype and device of `like`."""
    layers = tuple(layer_of(module, like.dtype) for module in modules)
    if None not in layers and takes(layers, like):
        return KernelProjection(modules, layers, like)
    # On a GPU, a captured graph would hold copies of biases and adapters.
    joined = None if like.is_cuda else Linears.of(*modules)
    if joined is None or joined.dtype != like.dtype:
        return Projection(modules)
    if joined.adapters is not None or joined.four_bits is not None:
        return JoinedProjection(modules, "as in training", joined.lengths, joined.forward)
    weight = as_one(joined.weights)
    if weight is None:
        return Projection(modules)
    product = partial(linear, weight=weight, bias=joined.bias)
    return JoinedProjection(modules, "one product", joined.lengths, product)


def layer_of(module: nn.Module, dtype: torch.dtype) -> Layer | None:
    """Read a linear layer, as it is now; None unless it is plain, in 4 bits, or LoRA on these.

    None, too, if it computes in another dtype.
    """
    found = base_and_adapter(module)
    if found is None:
        return None
    base, adapter = found
    if type(base) is nn.Linear:
        return Layer(base.weight, base.bias, adapter) if base.weight.dtype == dtype else None
    weight = FourBitWeight.of(base)
    if weight is None or product_dtype(base) != dtype:
        return None
    return Layer(weight, base.bias, adapter)


def _adapters_in_use(module: nn.Module) -> tuple | None:
    """Describe which adapters of peft's layer count in its forward, and how; None without any."""
    if not hasattr(module, "lora_A"):
        return None
    state = module.disable_adapters, module.merged, *module.active_adapters
    return *state, *(module.scaling.get(name) for name in module.active_adapters)
