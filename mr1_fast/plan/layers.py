"""Bytes that layers allocate, found by running them without data.

The layers run on torch's meta device, whose tensors have shapes and no data, while every new
tensor is counted. They run in the loop that training runs (model/recompute.py), so no formula has
to follow it: whatever a layer keeps for its backward pass, or casts to fp32, is counted. What the
meta device cannot run is in stand_ins.py.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.layers import operations
from ..model.recompute import Layer, run_layers

ELEMENTWISE = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
"""Operations that a CPU computes only after it has cast both operands to one dtype."""


def nbytes(module: nn.Module, trainable: bool = False) -> int:
    """Bytes of a module's parameters and buffers; with `trainable`, of what requires a gradient."""
    if trainable:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors made within it, on a cuda or cpu device.

    `live` is the bytes of those that still exist, `peak` the most that existed at once.

    On a CPU, a sum or product of two dtypes counts a copy of the operand that is cast first; CUDA
    kernels cast each number as they read it. And our operators are PyTorch there, whose temporary
    tensors count; on CUDA each is a kernel, which allocates its results alone.
    """

    def __init__(self, device: str):
        super().__init__()
        self.live = self.peak = 0
        self.on_cpu = device == "cpu"
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known.update(x.untyped_storage() for x in inputs)
        if self.on_cpu and function.namespace == "mr1_fast":
            with self:
                return getattr(operations, function._opname)(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))

        for x in tree_leaves(result):
            # A view, or the result of an operation in place, has a storage that is known.
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())

        if self.on_cpu and function in ELEMENTWISE:
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
    offload: bool = False
    """Keep these inputs in host memory instead of the GPU's."""


STORED = Training(recompute=False)
"""How layers that are not run again train: everything that they need stays on the device."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one of equal layers allocates, beside its weights."""

    infer: int
    """Most bytes at once while it runs without gradients, its input and its output included."""
    alone: int
    """The same for a layer whose input is one tensor, which does not count: the hidden state of a
    pack that waits for its turn. For other parts it is without the input, too."""
    saved: int = 0
    """Bytes that its forward pass keeps for its backward pass, its input included."""
    extra: int = 0
    """Most bytes at once in its backward pass: what its forward pass has kept and the gradients of
    its weights are included, the incoming gradient is not."""
    gradients: int = 0
    """Bytes of the gradients of its weights."""


@dataclass(frozen=True)
class LayerStack:
    """Equal layers, one after the other, of which the first may be run again in the backward."""

    depth: int
    """Number of layers."""
    stored: LayerBytes
    """A layer that keeps the results of its matrix products."""
    again: LayerBytes
    """A layer that keeps its input and is run again."""

    @property
    def infer(self) -> int:
        """Most bytes at once while one layer runs without gradients."""
        return self.stored.infer

    @property
    def alone(self) -> int:
        """Most bytes at once while one layer runs on one pack of several, beside its input."""
        return self.stored.alone

    def saved(self, recomputed: int, layers: int | None = None) -> int:
        """Bytes that the first `layers` keep, by default all, with `recomputed` run again."""
        layers = self.depth if layers is None else layers
        again = min(layers, recomputed)
        return again * self.again.saved + (layers - again) * self.stored.saved

    def backward(
        self, recomputed: int, others: Collection[int] = ()
    ) -> Iterator[tuple[int, int, int]]:
        """The possible peaks of the backward pass, from the last layer to the first.

        Yields a layer's number, counted from 1; the bytes of what the layers keep and this one
        allocates, beside the incoming gradient; and those of the gradients that the layers after it
        have left. From layer to layer what is kept becomes less and the gradients more, both by a
        constant for each kind of layer: so the peak of a kind is at its last layer or at its first.
        `others` are further layers to look at.
        """
        ends = {self.depth, recomputed + 1, recomputed, 1, *others}
        for layer in sorted(ends & set(range(1, self.depth + 1)), reverse=True):
            kind = self.again if layer <= recomputed else self.stored
            kept = self.saved(recomputed, layer - 1)
            yield layer, kept + kind.extra, (self.depth - layer) * kind.gradients


def trace_layer(
    module: nn.Module,
    make: Callable[[], Layer],
    x: Tensor,
    device: str,
    training: Training | None = None,
) -> LayerBytes:
    """The bytes of a layer that has others before and after it.

    make: makes the layer, which computes what `module` has the weights of.
    x: is like its input, on the meta device.
    training: None is a pass without gradients.
    """
    with torch.no_grad(), LiveBytes(device) as count:
        has_update = make()(x, None)[1] is not None
    alone, carry = count.peak, (x, x) if has_update else (x,)

    def make_run(recomputed: int) -> Callable[..., tuple]:
        layer = make()
        return lambda *inputs: run_layers([layer], _pair(inputs), recomputed)

    infer = _most_without_gradients(lambda: make_run(0), carry, device)
    if training is None:
        return LayerBytes(infer, alone)
    saved, extra = _kept(module, lambda: make_run(int(training.recompute)), carry, device)
    extra -= x.nbytes  # the gradient of the sum, which residual and update have in common
    if training.recompute and training.offload:
        # The input of a layer is on the GPU only while the layer runs again.
        saved -= x.nbytes
    return LayerBytes(infer, alone, saved, extra, nbytes(module, trainable=True))


def trace_part(
    module: nn.Module,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    device: str,
    training: Training | None = None,
) -> LayerBytes:
    """The bytes of `call(*inputs)`, which computes what `module` has the weights of.

    The inputs are like those on the meta device; what `call` holds besides is not counted.
    """
    infer = _most_without_gradients(lambda: call, inputs, device)
    alone = infer - sum(x.nbytes for x in inputs)
    if training is None:
        return LayerBytes(infer, alone)
    with torch.no_grad():
        gradient = call(*inputs).nbytes
    saved, extra = _kept(module, lambda: call, inputs, device)
    return LayerBytes(infer, alone, saved, extra - gradient, nbytes(module, trainable=True))


def _pair(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """A residual and an update, of which the second may be missing."""
    return inputs if len(inputs) == 2 else (inputs[0], None)


def _most_without_gradients(
    make: Callable[[], Callable], inputs: tuple[Tensor, ...], device: str
) -> int:
    """Most bytes at once of `make()(*inputs)`, its inputs and its result included."""
    with torch.no_grad(), LiveBytes(device) as count:
        made = [torch.empty_like(x) for x in inputs]
        make()(*made)
    return count.peak


def _kept(
    module: nn.Module, make: Callable[[], Callable], inputs: tuple[Tensor, ...], device: str
) -> tuple[int, int]:
    """Bytes that `make()(*inputs)` keeps for its backward pass, and most bytes at once in that.

    Inputs and results exist only where they are kept.
    """
    start = torch.empty(0, device="meta", requires_grad=True)
    with LiveBytes(device) as count:
        made = _Begin.apply(start, *inputs) if inputs else ()
        results = make()(*made)
        end = _End.apply(*(results if isinstance(results, tuple) else (results,)))
        made = results = None
        saved = count.live
        count.peak = 0
        end.backward()
    module.zero_grad(set_to_none=True)
    return saved, count.peak


class _Begin(Function):
    """Makes tensors like x, which require gradients and are held by whoever uses them alone."""

    @staticmethod
    def forward(ctx, start: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, x))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


class _End(Function):
    """Uses results (None among them) without keeping them; all of them have the same gradient."""

    @staticmethod
    def forward(ctx, *results: Tensor | None) -> Tensor:
        ctx.like = results[0].shape, results[0].dtype
        ctx.exist = [x is not None for x in results]
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.like
        gradient = torch.empty(shape, dtype=dtype, device="meta")
        return tuple(gradient if exists else None for exists in ctx.exist)
