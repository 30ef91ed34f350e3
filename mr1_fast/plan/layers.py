"""Bytes that layers allocate, found by running them without data.

The layers run on torch's meta device, whose tensors have shapes and no data, while every new
tensor is counted. So no formula has to follow transformers: whatever a layer saves for its backward
pass, or casts to fp32, is counted. What the meta device cannot run is in stand_ins.py.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

ELEMENTWISE = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
"""Operations that a CPU computes only after it has cast both operands to one dtype."""


def nbytes(module: nn.Module, trainable: bool = False) -> int:
    """Bytes of a module's parameters and buffers; with `trainable`, of what requires a gradient."""
    if trainable:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors made within it.

    `live` is the bytes of those that still exist, `peak` the most that existed at once. With
    `casts`, a sum or product of two dtypes counts a copy of the operand that is cast first, as on
    a CPU; CUDA kernels cast each number as they read it.
    """

    def __init__(self, casts: bool):
        super().__init__()
        self.live = self.peak = 0
        self.casts = casts
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known.update(x.untyped_storage() for x in inputs)
        result = function(*args, **(kwargs or {}))

        for x in tree_leaves(result):
            # A view, or the result of an operation in place, has a storage that is known.
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())

        if self.casts and function in ELEMENTWISE:
            cast = [x for x in args if isinstance(x, Tensor) and x.ndim and x.dtype != result.dtype]
            self.peak = max(self.peak, self.live + sum(x.numel() for x in cast) * result.itemsize)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Training:
    """How the layers of a pass with gradients keep what their backward pass needs."""

    recompute: bool
    """Keep only the input of each layer, and run its forward again in the backward pass."""
    offload: bool
    """Keep these inputs in host memory instead of the GPU's."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that equal layers allocate, one after the other, beside weights and the first input."""

    depth: int
    """Number of layers."""
    infer: int
    """Most bytes at once while one layer runs without gradients, its output included."""
    saved: int = 0
    """Bytes that each layer's forward pass keeps for its backward pass, its output included if a
    later operation needs it."""
    extra: int = 0
    """Most bytes at once in one layer's backward pass, what its forward pass has kept included, its
    input and the incoming gradient not."""
    gradients: int = 0
    """Bytes of the gradients of each layer's weights."""


def trace(
    layers: list[nn.Module],
    x: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor],
    device: str,
    training: Training | None = None,
) -> LayerBytes:
    """The bytes of `call(layer, x)` for each of equal `layers` on a `device` of type cuda or cpu.

    `x` is the first layer's input, on the meta device, and each layer's output the next one's
    input. `training` None is a pass without gradients.
    """
    layer, casts = layers[0], device == "cpu"
    with torch.no_grad(), LiveBytes(casts) as count:
        call(layer, x)
    infer = count.peak
    if training is None:
        return LayerBytes(len(layers), infer)

    def forward(x: Tensor) -> Tensor:
        if training.recompute:
            return checkpoint(call, layer, x, use_reentrant=False)
        return call(layer, x)

    x = x.detach().requires_grad_(x.is_floating_point())
    with LiveBytes(casts) as count:
        y = forward(x)
        saved = count.live
        if len(layers) > 1:  # whether an output is kept shows only once the next layer has used it
            y = forward(y)
            saved = count.live - saved

    y = gradient = None
    with LiveBytes(casts) as count:
        y = forward(x)
        gradient = torch.empty_like(y)
        outside = y.nbytes + gradient.nbytes
        count.peak = 0
        y.backward(gradient)
    layer.zero_grad(set_to_none=True)
    extra = count.peak - outside
    if training.recompute and training.offload:
        # The input of a layer is on the GPU only while the layer runs again.
        saved, extra = 0, extra + x.nbytes
    return LayerBytes(len(layers), infer, saved, extra, nbytes(layer, trainable=True))
