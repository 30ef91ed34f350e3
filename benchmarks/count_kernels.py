"""Count what a computation would launch on a GPU, by kind and with its bytes, without any GPU.

The computation runs on torch's meta device, whose tensors have shapes and no data, while every
operator that PyTorch dispatches is recorded, in the backward pass, too, with the sums that autograd
makes of gradients. Views and allocations are left out. Also recorded are launches of Triton
kernels, which then do nothing, and what the memory plan's stand-ins stand for: attention, the
gathering of keys, and bitsandbytes' products.

A launch has the bytes of its inputs and of its outputs, each once; what is changed in place is read
and written. Numbers of launches are lower bounds, as a few operators launch two kernels
(slice_backward zeros and copies) and cuBLAS may add one to a product: on a GPU, torch's profiler
has the number of kernels.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.model import four_bits
from mr1_fast.plan import stand_ins

GEMM, ATTENTION, FUSED = "matrix products", "attention", "fused"
ELEMENTWISE, COPY, REDUCTION = "element-wise", "copies and casts", "reductions"
GATHER, DEQUANTISE = "gathers", "dequantisation"
KINDS = (GEMM, ATTENTION, FUSED, ELEMENTWISE, COPY, REDUCTION, GATHER, DEQUANTISE)
"""The kinds of launches. "fused" are operators of mr1_fast and all Triton kernels."""

NAMES = {
    GEMM: "mm addmm addmm_ bmm baddbmm baddbmm_",
    COPY: "_to_copy _foreach_copy_ clone copy_ cat stack repeat slice_backward select_backward "
    "fill_ zero_ zeros zeros_like new_zeros full full_like new_full ones ones_like "
    "constant_pad_nd",
    REDUCTION: "sum mean amax var_mean linalg_vector_norm native_layer_norm "
    "native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward _softmax "
    "_softmax_backward_data",
    GATHER: "index index_select gather embedding embedding_dense_backward _embedding_bag index_add "
    "index_add_ index_put index_put_ scatter_add masked_scatter",
}
"""Operators of PyTorch by kind; one that is not named is element-wise."""
KIND = {name: kind for kind, names in NAMES.items() for name in names.split()}
NO_LAUNCH = {"_unsafe_view", "resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_"}
"""Operators that launch nothing, beside views and what begins with "empty" or "new_empty"."""
WRITE_ONLY = {"copy_", "fill_", "zero_"}
"""Operators in place that do not read what they change."""
IN_PLACE = {"_triton_rope": ("q_ptr", "k_ptr"), "_swiglu_backward_kernel": ("a_ptr", "b_ptr")}
"""Arguments that Liger's kernels both read and write; every other tensor is moved once."""
PER_SCALE = 64
"""Numbers of 4 bits that share a scale, which is a byte."""


class Product(NamedTuple):
    """A matrix product (m, k) · (k, n), `count` of them at once."""

    m: int
    k: int
    n: int
    dtype: torch.dtype
    count: int = 1
    transposed: tuple[bool, bool] = (False, False)
    """Whether each of the factors is the transpose of a matrix in memory."""

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> "Product":
        """The product a · b of matrices or of batches of them."""
        transposed = a.stride(-1) != 1, b.stride(-1) != 1
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        return cls(m, k, n, a.dtype, math.prod(a.shape[:-2]), transposed)

    @property
    def flop(self) -> int:
        """Floating-point operations."""
        return 2 * self.count * self.m * self.k * self.n


class Launch(NamedTuple):
    """A kernel that a GPU would run."""

    name: str
    kind: str
    nbytes: int
    """Bytes read and written."""
    shape: tuple[int, ...]
    """The shape of the largest tensor."""
    product: Product | None = None
    """The sizes of a matrix product."""


class Totals(NamedTuple):
    """What some launches are together."""

    launches: int
    nbytes: int
    """Bytes of all but products and attention."""
    alone: int
    """Launches that are element-wise, or a copy, on all tokens of at least a hidden state's size:
    what should be part of another kernel."""
    kinds: dict[str, tuple[int, int]]
    """Launches and bytes of each kind."""
    flop: int
    """Floating-point operations of the matrix products."""

    @classmethod
    def of(cls, launches: list[Launch], tokens: int, width: int) -> "Totals":
        """Sum up launches of a layer on hidden states of `tokens` · `width` numbers."""
        kinds = {}
        for kind in KINDS:
            sizes = [each.nbytes for each in launches if each.kind == kind]
            if sizes:
                kinds[kind] = len(sizes), sum(sizes)
        other = sum(size for kind, (_, size) in kinds.items() if kind not in (GEMM, ATTENTION))
        alone = sum(
            each.kind in (ELEMENTWISE, COPY)
            and tokens in each.shape
            and math.prod(each.shape) >= tokens * width
            for each in launches
        )
        flop = sum(each.product.flop for each in launches if each.product)
        return cls(len(launches), other, alone, kinds, flop)


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """Record the launches of all that runs inside on the meta device; yield them, as they come."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for function, name, describe in STAND_INS:
            recorded = _recorded(getattr(function, name), describe, launches)
            stack.enter_context(mock.patch.object(function, name, staticmethod(recorded)))
        recorded = _recorded_dequantisation(four_bits.dequantise, launches)
        stack.enter_context(mock.patch.object(four_bits, "dequantise", recorded))
        if find_spec("triton"):
            from triton.runtime.jit import JITFunction

            def run(kernel, *args, grid, warmup, **options):
                launches.append(_triton_launch(kernel, args, options))

            stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(_Operators(launches))
        yield launches


# --- operators ------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Context manager that adds operators to `launches`."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if _launches(function):
            self.launches.append(_operator_launch(function, args, kwargs, result))
        return result


def _launches(function: OpOverload) -> bool:
    """Whether an operator would launch a kernel: it is neither a view nor an allocation."""
    name = _name(function)
    if name in NO_LAUNCH or name.startswith(("empty", "new_empty")) or function.namespace == "prim":
        return False
    aliases = [each.alias_info for each in function._schema.returns]
    return not aliases or any(alias is None or alias.is_write for alias in aliases)


def _operator_launch(function: OpOverload, args: tuple, kwargs: dict, result) -> Launch:
    namespace, name = function.namespace, _name(function)
    names = [argument.name for argument in function._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    mutated = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
    read = [x for each, x in values.items() if not (each in mutated and _only_written(name, each))]
    # An operator in place returns what it has changed.
    written = {id(x): x for x in _tensors([result, *(values.get(each) for each in mutated)])}
    if namespace == "mr1_fast":
        kind = FUSED
    elif namespace == "bitsandbytes":
        kind = DEQUANTISE
    else:
        kind = ATTENTION if "attention" in name else KIND.get(name, ELEMENTWISE)
    product = Product.of(*_tensors(read)[-2:]) if kind == GEMM else None
    return _launch(f"{namespace}::{name}", kind, [read, list(written.values())], product)


def _only_written(operator: str, argument: str) -> bool:
    """Whether an operator overwrites one of its arguments without reading it."""
    return operator in WRITE_ONLY or argument.startswith("out")


def _name(function: OpOverload) -> str:
    return function._schema.name.partition("::")[2]


def _launch(name: str, kind: str, values: object, product: Product | None = None) -> Launch:
    """A launch that moves every tensor in `values`, a tree, once."""
    tensors = _tensors(values)
    shapes = [tuple(x.shape) for x in tensors]
    return Launch(
        name, kind, sum(map(moved, tensors)), max(shapes, key=math.prod, default=()), product
    )


def _tensors(values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def moved(x: Tensor) -> int:
    """Bytes of a tensor's numbers, those that an expanded dimension repeats once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.itemsize * math.prod(size for size, stride in sizes if stride or not size)


# --- Triton kernels -------------------------------------------------------------------------------


def _triton_launch(kernel, args: tuple, options: dict) -> Launch:
    names = list(inspect.signature(kernel.fn).parameters)
    values = {**dict(zip(names, args, strict=False)), **options}
    name = kernel.fn.__name__
    twice = [values[each] for each in IN_PLACE.get(name, ())]
    return _launch(f"triton::{name.strip('_')}", FUSED, [list(values.values()), twice])


# --- the memory plan's stand-ins ------------------------------------------------------------------


def _recorded(function: Callable, describe: Callable, launches: list[Launch]) -> Callable:
    """The forward or backward of an autograd function, which also records what it stands for."""

    def run(ctx, *args):
        result = function(ctx, *args)
        launches.extend(describe(ctx, args, result))
        return result

    return run


def _attention(ctx, args: tuple, result) -> list[Launch]:
    return [_launch("attention", ATTENTION, [args, result])]


def _attention_backward(ctx, args: tuple, result) -> list[Launch]:
    # Read are the output and its gradient, and query, key and value, whose gradients are written.
    return [_launch("attention_backward", ATTENTION, [args, args, result, result])]


def _gather(ctx, args: tuple, result) -> list[Launch]:
    return [_launch("gather", GATHER, [args, result])]


def _four_bit_product(ctx, args: tuple, result) -> list[Launch]:
    """Launches of bitsandbytes for a product with more rows than its own kernel takes.

    It dequantises the weight, and calls cuBLAS.
    """
    x, result = args[0], _tensors(result)[0]
    weight = x.new_empty(x.shape[-1], result.shape[-1])
    product = Product.of(x.flatten(0, -2), weight)
    return [*_dequantisation(weight), _launch("product", GEMM, [x, weight, result], product)]


def _recorded_dequantisation(function: Callable, launches: list[Launch]) -> Callable:
    """`dequantise` of kernels/four_bit, which also records its launch."""

    def run(weights: Sequence[FourBitWeight], dtype: torch.dtype) -> Tensor:
        result = function(weights, dtype)
        stored = [[each.packed, each.absmax, each.absmax_scale] for each in weights]
        launches.append(_launch("dequantise", DEQUANTISE, [stored, result]))
        return result

    return run


def _dequantisation(weight: Tensor) -> list[Launch]:
    """Launches of bitsandbytes that dequantise the scales, add their offset, and make a weight."""
    count = weight.numel()
    scales = count // PER_SCALE
    sizes = {"scales": 5 * scales, "offset": 8 * scales}
    sizes["weight"] = count // 2 + 4 * scales + weight.nbytes
    return [
        Launch(f"dequantise {name}", DEQUANTISE, size, tuple(weight.shape))
        for name, size in sizes.items()
    ]


STAND_INS = (
    (stand_ins._VariableLengths, "forward", _attention),
    (stand_ins._VariableLengths, "backward", _attention_backward),
    (stand_ins._Rows, "forward", _gather),
    (stand_ins._Rows, "backward", _gather),
    (stand_ins._FourBitProduct, "forward", _four_bit_product),
    (stand_ins._FourBitProduct, "backward", _four_bit_product),
)
"""Autograd functions of the plan, their methods, and what each of these stands for."""
