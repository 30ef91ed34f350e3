"""LoRA adapters of linear layers that take the same input, all of them at once.

    t = s·x·[A₁; A₂ …]ᵀ              forward, (T, D) → (T, Σr)
    y = [t₁·B₁ᵀ  t₂·B₂ᵀ …]           (T, ΣN), to which the product with the weights is added
    dt = s·[dy₁·B₁  dy₂·B₂ …]        backward
    dx = dt·[A₁; A₂ …],  dA = dtᵀ·x,  dBᵢ = dyᵢᵀ·tᵢ

peft's modules hold A (r, D) and B (N, r), mostly in fp32, and compute in fp32 with a copy of x.
Here they are cast to the dtype of x, those of a transformer layer by one kernel each time that it
runs; products add up in fp32, and the gradients of A and B come out in their own dtype.

The adapters' product comes first and the large one is added to it, not the other way round: then y
is rounded once, and the addition is part of the large product, which hides its reads. Layers with
as many outputs (a key and a value, or a gate and an up) are one batched product. All layers could
be one, with the Bᵢ as blocks on the diagonal of one matrix, but each block would have to be filled
by a launch of its own, and most of what is multiplied would be zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ..kernels.decode.layer import Adapter


def base_and_adapter(module: nn.Module) -> tuple[nn.Module, Adapter | None] | None:
    """Take a LoRA layer of peft apart, as it is now: the layer under it, and its active adapter.

    The adapter is None where none is active, and for a module without any. Returns None if the
    layer computes anything but one adapter in its plain form.
    """
    if not hasattr(module, "lora_A"):
        return module, None
    if module.disable_adapters and module.merged:
        return None  # peft takes the adapter out of the weights at its next call
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return module.base_layer, None
    name = active[0]
    if len(active) > 1 or not _is_plain(module, name):
        return None
    a, b = (part[name].weight for part in (module.lora_A, module.lora_B))
    return module.base_layer, Adapter(a, b, module.scaling[name])


def _is_plain(module: nn.Module, name: str) -> bool:
    """Tell whether an adapter has no dropout, no bias, and no variant such as DoRA."""
    parts = module.lora_A[name], module.lora_B[name]
    if any(type(part) is not nn.Linear or part.bias is not None for part in parts):
        return False
    dropout = module.lora_dropout[name]
    drops = getattr(dropout, "p", 0) > 0 and dropout.training
    return not (
        drops
        or name in getattr(module, "lora_variant", ())
        or getattr(module, "use_dora", {}).get(name)
        or getattr(module, "fan_in_fan_out", False)
    )


class Adapters:
    """The adapters of layers on the same input, which have one scale."""

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype):
        self.dtype, self.scale = dtype, adapters[0].scale
        self._a = tuple(adapter.a for adapter in adapters)
        self._b = tuple(adapter.b for adapter in adapters)
        self._cast: tuple[Tensor, list[Tensor]] | None = None
        runs = [list(run) for _, run in groupby(self._b, key=lambda b: b.shape)]
        self._runs = [(len(run), *run[0].shape) for run in runs]
        """(layers, N, r) of each run of layers whose B have the same shape."""

    @classmethod
    def of(cls, adapters: Sequence[Adapter], dtype: torch.dtype) -> Adapters | None:
        """Put adapters together, to be computed in `dtype`; None if they differ in their scale."""
        first = adapters[0]
        is_alike = all(
            (each.scale, each.a.dtype, each.b.dtype) == (first.scale, first.a.dtype, first.b.dtype)
            for each in adapters
        )
        return cls(adapters, dtype) if is_alike else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All A and then all B: what `gradients` returns gradients of."""
        return *self._a, *self._b

    @property
    def cast(self) -> tuple[Tensor, list[Tensor]]:
        """All A below one another (Σr, D), and the B of each run (layers, N, r), in `dtype`.

        They are kept until `forget_casts`.
        """
        if self._cast is None:
            cast_adapters([self])
        return self._cast

    def product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute y (T, ΣN) and t (T, Σr) of x (T, D)."""
        t, (_, b) = self.inner(x), self.cast
        y = x.new_empty(len(x), sum(count * length for count, length, _ in self._runs))
        for out, part, matrices in zip(self._outputs(y), self._inners(t), b, strict=True):
            torch.bmm(part, matrices.mT, out=out)
        return y, t

    def inner(self, x: Tensor) -> Tensor:
        """Compute t (T, Σr) of x (T, D)."""
        a, _ = self.cast
        return x.new_empty(len(x), len(a)).addmm_(x, a.t(), beta=0, alpha=self.scale)

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Compute dx (T, D) and dt (T, Σr) of dy (T, ΣN)."""
        dt = self.inner_gradient(dy)
        return dt @ self.cast[0], dt

    def inner_gradient(self, dy: Tensor) -> Tensor:
        """Compute dt (T, Σr) of dy (T, ΣN)."""
        a, b = self.cast
        dt = dy.new_empty(len(dy), len(a))
        for out, part, matrices in zip(self._inners(dt), self._outputs(dy), b, strict=True):
            out.baddbmm_(part, matrices, beta=0, alpha=self.scale)
        return dt

    def gradients(
        self, dy: Tensor, x: Tensor, needed: Sequence[bool], t: Tensor, dt: Tensor
    ) -> list[Tensor | None]:
        """Compute the gradient of each of `tensors`, where it is needed, in its dtype."""
        count = len(self._a)
        da: Sequence[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        if any(needed[:count]):
            da = _product(dt.t(), x, self._a[0].dtype).split([len(a) for a in self._a])
        if any(needed[count:]):
            parts = zip(self._outputs(dy), self._inners(t), strict=True)
            db = [b for dy, t in parts for b in _product(dy.mT, t, self._b[0].dtype)]
        return [each if want else None for each, want in zip((*da, *db), needed, strict=True)]

    def _outputs(self, y: Tensor) -> list[Tensor]:
        """View (T, ΣN) as (layers, T, N) for each run."""
        return _by_run(y, [(count, length) for count, length, _ in self._runs])

    def _inners(self, t: Tensor) -> list[Tensor]:
        """View (T, Σr) as (layers, T, r) for each run."""
        return _by_run(t, [(count, rank) for count, _, rank in self._runs])


def _by_run(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """View the columns of x (T, Σ layers·width) as (layers, T, width) for each of `shapes`."""
    parts = x.split([count * width for count, width in shapes], dim=1)
    pairs = zip(parts, shapes, strict=True)
    return [part.unflatten(1, shape).transpose(0, 1) for part, shape in pairs]


def forget_casts(all_adapters: Iterable[Adapters | None]) -> None:
    """Free the copies of A and B; whoever needs them again makes them again."""
    for adapters in all_adapters:
        if adapters is not None:
            adapters._cast = None


@torch.no_grad()
def cast_adapters(all_adapters: Iterable[Adapters | None]) -> None:
    """Copy A and B of several groups, in the dtype of their products, unless there are copies.

    One kernel copies dozens of matrices.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for adapters in all_adapters:
        if adapters is None or adapters._cast is not None:
            continue
        first, dtype = adapters._a[0], adapters.dtype
        a = first.new_empty(sum(map(len, adapters._a)), first.shape[1], dtype=dtype)
        b = [first.new_empty(run, dtype=dtype) for run in adapters._runs]
        adapters._cast = a, b
        targets += a.split([len(each) for each in adapters._a])
        targets += [matrix for run in b for matrix in run]
        sources += adapters.tensors
    if targets:
        torch._foreach_copy_(targets, sources)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute x·y, of matrices or of batches of them, in `dtype`."""
    multiply = torch.mm if x.ndim == 2 else torch.bmm
    is_gpu = x.device.type in ("cuda", "meta")  # without data, for the plan of a GPU
    if is_gpu and x.element_size() == 2 and dtype == torch.float32:
        return multiply(x, y, out_dtype=dtype)
    return multiply(x, y).to(dtype)
