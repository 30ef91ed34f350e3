"""Calls of the operators of layers, beside the same by transformers' modules and in fp64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, silu
from transformers.activations import GELUTanh, QuickGELUActivation
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from mr1_fast.kernels.layers import operators

from .loss import assert_within_bound

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 7]
WIDTHS = [1, 80, 1280, 1536, 3584]
"""Widths D of rows: odd ones, and those of the vision tower and of the 2B and 7B."""
MLP_WIDTHS = [1, 3420, 8960, 18_944]
"""Widths F of an MLP: the vision tower's of Qwen2.5-VL, the 2B's and the 7B's."""
NORMED_HEADS = [(16, 8, 128), (32, 8, 128), (4, 2, 32), (3, 1, 72), (2, 2, 64)]
"""Heads, key heads and channels of those that are normed: of Qwen3-VL's 2B and 4B, and odd ones."""
HEADS = [
    (12, 2, 128, False),
    (28, 4, 128, False),
    (16, 16, 80, True),
    (2, 2, 72, True),
    (3, 1, 16, False),
]
"""Heads, key heads, their channels, and whether the angles are fp32, as in the vision tower."""


class Case(NamedTuple):
    """One operator with the inputs that have gradients, as functions of these."""

    ours: Callable[..., tuple[Tensor, ...]]
    theirs: Callable[..., tuple[Tensor, ...]]
    """The same by transformers' modules."""

    exact: Callable[..., tuple[Tensor, ...]]
    """The equation in the dtype of its inputs, without a rounding to fp32."""

    inputs: tuple[Tensor, ...]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def their_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Norm rows by transformers' Qwen2RMSNorm, or by PyTorch's layer_norm."""
    if bias is not None:
        return layer_norm(x, weight.shape, weight, bias, EPS)
    norm = Qwen2RMSNorm(len(weight), eps=EPS)
    del norm.weight
    norm.weight = weight
    return norm(x)


def norm_case(tokens: int, d: int, dtype: torch.dtype, layer: bool, added: bool) -> Case:
    """RMS norm, or LayerNorm, of rows of D columns, with the addition of an update or without."""
    x = 3 * draw(tokens, d, dtype=dtype) + layer
    weights = tuple(1 + draw(d, dtype=dtype, seed=seed) / 4 for seed in range(1, 2 + layer))
    update = (draw(tokens, d, dtype=dtype, seed=3),) if added else ()

    def by(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def run(x, *rest):
            if not added:
                return (norm(x, rest[0], rest[1] if layer else None),)
            update, weight, *bias = rest
            residual = x + update
            return residual, norm(residual, weight, bias[0] if layer else None)

        return run

    def ours(x, *rest):
        bias = () if layer else (None,)
        if added:
            return operators.add_norm(x, *rest, *bias, EPS)
        return (operators.norm(x, *rest, *bias, EPS),)

    def exact(x, weight, bias):
        if bias is None:
            return rms_norm(x, weight.shape, weight, EPS)
        return layer_norm(x, weight.shape, weight, bias, EPS)

    return Case(ours, by(their_norm), by(exact), (x, *update, *weights))


def cancelling(d: int, layer: bool) -> float:
    """Return the size of the terms that cancel in dx: all do for a single column."""
    if d > 1:
        return 0.0
    return 8 / EPS**0.5 if layer else 8.0


def rotary_case(
    tokens: int, heads: int, kv_heads: int, d: int, vision: bool, dtype: torch.dtype, biased: bool
) -> Case:
    """Rotate queries and keys that lie in the columns of a wider tensor."""
    width = (heads + 2 * kv_heads) * d
    angles = draw(tokens, d, dtype=torch.float32 if vision else dtype, seed=1)
    cos, sin = angles.cos(), angles.sin()
    inputs = (draw(tokens, width + 16, dtype=dtype), draw(width, dtype=dtype, seed=2))

    def split(wide, bias):
        qkv = wide[:, 16:] + bias[0] if biased else wide[:, 16:]
        return qkv.unflatten(1, (-1, d)).split([heads, kv_heads, kv_heads], dim=1)

    def ours(wide, *bias):
        angles = (each.to(wide.device) for each in (cos, sin))
        return operators.rotary(wide[:, 16:], bias[0] if biased else None, *angles, heads, kv_heads)

    def theirs(wide, *bias):
        q, k, v = split(wide, bias)
        if vision:
            return *apply_rotary_pos_emb_vision(q, k, cos, sin), v
        return *apply_rotary_pos_emb(q, k, cos, sin), v

    def exact(wide, *bias):
        q, k, v = split(wide, bias)
        return *apply_rotary_pos_emb(q, k, cos.double(), sin.double()), v

    return Case(ours, theirs, exact, inputs[: 1 + biased])


def norm_rotary_case(tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> Case:
    """Norm and rotate the heads of queries and keys in the columns of a wider tensor."""
    angles = draw(tokens, d, dtype=dtype, seed=1)
    cos, sin = angles.cos(), angles.sin()
    wide = 3 * draw(tokens, (heads + 2 * kv_heads) * d + 16, dtype=dtype)
    weights = (1 + draw(d, dtype=dtype, seed=seed) / 4 for seed in (2, 3))

    def ours(wide, *weights):
        angles = (each.to(wide.device) for each in (cos, sin))
        return operators.norm_rotary(wide[:, 16:], *weights, EPS, *angles, heads, kv_heads)

    def by(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def run(wide, q_weight, k_weight):
            heads_of = wide[:, 16:].unflatten(1, (-1, d))
            q, k, v = heads_of.split([heads, kv_heads, kv_heads], dim=1)
            normed = norm(q, q_weight, None), norm(k, k_weight, None)
            return *apply_rotary_pos_emb(*normed, cos.to(wide.dtype), sin.to(wide.dtype)), v

        return run

    def exact(x, weight, bias):
        return rms_norm(x, weight.shape, weight, EPS)

    return Case(ours, by(their_norm), by(exact), (wide, *weights))


def gate_case(tokens: int, f: int, dtype: torch.dtype, biased: bool) -> Case:
    """Gate an MLP of width F."""
    inputs = 2 * draw(tokens, 2 * f, dtype=dtype), draw(2 * f, dtype=dtype, seed=1)

    def ours(gate_up, *bias):
        return (operators.silu_mul(gate_up, bias[0] if biased else None),)

    def theirs(gate_up, *bias):
        gate, up = (gate_up + bias[0] if biased else gate_up).chunk(2, dim=1)
        return (silu(gate) * up,)

    return Case(ours, theirs, theirs, inputs[: 1 + biased])


def gelu_case(tokens: int, f: int, dtype: torch.dtype, kind: str) -> Case:
    """Activate an MLP of width F by an approximation of GELU."""
    theirs = {"quick": QuickGELUActivation, "tanh": GELUTanh}[kind]()
    return Case(
        lambda x: (operators.gelu(x, kind),),
        lambda x: (theirs(x),),
        lambda x: (theirs(x),),
        (2 * draw(tokens, f, dtype=dtype),),
    )


def run(function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return a function's outputs and the gradients by its inputs, on the CPU.

    The incoming gradients have the outputs' dtype, and, but for the channels of a head or the
    columns of a row, the strides of tensors whose first two axes were swapped.
    """
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    incoming = []
    for i, output in enumerate(outputs):
        gradient = draw(*output.shape, dtype=inputs[0].dtype, seed=10 + i).to(output)
        if gradient.ndim == 3:
            gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)
        incoming.append(gradient)
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    return [each.detach().cpu() for each in (*outputs, *gradients)]


def check_case(case: Case, device: str = "cpu", scale: float = 0.0) -> None:
    """Assert that no result is further from fp64 than twice transformers' own.

    `scale` is the size of the terms whose sum a result is, where they cancel.
    """
    ours = run(case.ours, tuple(x.to(device) for x in case.inputs))
    theirs = run(case.theirs, case.inputs)
    exact = run(case.exact, tuple(x.double() for x in case.inputs))
    for i, values in enumerate(zip(ours, theirs, exact, strict=True)):
        assert values[0].dtype == values[1].dtype
        assert_within_bound(*values, f"result {i}", scale)
