"""AdamW with 8-bit states on bf16 weights that lose no update, in one pass over a parameter.

Decoupled weight decay (AdamW, arXiv 1711.05101); with gradient g, learning rate η, weight decay λ and step t from 1:

    m = β₁·m + (1−β₁)·g    v = β₂·v + (1−β₂)·g²    w −= η·(m̂/(√v̂ + ε) + λ·w),  m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)

Fused: conversion and clipping of the gradient, decoding, the equations, encoding, the rounding of the weight. Bytes per
parameter: 1 for m, 1 for v, 8/256 for their scales, 2 for the weight, 2 for its remainder. Never stored: fp32 anything.

States (block-wise as in arXiv 2110.02861, with a power instead of a codebook): 256 elements share an fp32 scale, their
largest magnitude. m = scale·sign(c)·(c/127)⁴ with c in −127…127; v = scale·(c/255)⁸, so √v follows a fourth power too
(lower powers were 2 to 10 times further from fp32 where the gradients of a block differ in size). The weight is updated
with m and v as computed, in fp32; they are rounded afterwards, up or down at random so that the mean is right. To
nearest, a v whose gradients have become small would not fall: β₂ = 0.98 changes it by 2 % a step, codes are 3 % apart.

Weights: the fp32 master is bf16 weight + int16 remainder, exactly: w = (bits + 0x8000) >> 16, remainder = bits − (w <<
16). Or, without a remainder, the bf16 weight is the master rounded stochastically. bf16 rounded to nearest would lose
nearly all updates at η = 1e-6, because a weight's neighbours are 2⁻⁸ of its value away. fp32 weights are their own
master.

|m̂|/√v̂ cannot exceed a bound that β₁, β₂ and t give (`largest_ratio`); with states of 8 bits it could, when v is
rounded down and m up. So the ratio is held within it, and √v counts as its block's smallest non-zero code at least.

Random numbers: a 32-bit hash of the element's index and two keys. Every operation is rounded as IEEE 754 says and none
is fused, so PyTorch on a CPU and Triton (adamw_triton.py) give the same bits.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..errors import UserError
from .grpo_loss import use_triton
from .rounding import (
    block_scale,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    more_bits,
    random_bits,
    random_keys,
    round_stochastically,
    sqrt_,
    uniforms,
)

BLOCK = 256
"""Elements that share the scales of their states."""
CHUNK = 2**16
"""Elements that the PyTorch path works on at a time, a multiple of BLOCK: its temporaries stay in the cache."""


class State(NamedTuple):
    """The optimizer's state of one parameter of n elements, flat; all zero at the start."""

    m: torch.Tensor
    """(n,) int8 codes of the mean of gradients."""
    v: torch.Tensor
    """(n,) uint8 codes of the mean of squared gradients."""
    m_scale: torch.Tensor
    """(⌈n/256⌉,) fp32 largest |m| of each block."""
    v_scale: torch.Tensor
    """(⌈n/256⌉,) fp32 largest v of each block."""
    remainder: torch.Tensor | None = None
    """(n,) int16: bits of the fp32 master beyond the bf16 weight's; None: fp32 weights, or stochastic rounding."""

    @classmethod
    def zeros(cls, weight: torch.Tensor, remainder: bool) -> "State":
        """The state before the first step; `remainder` counts for bf16 weights alone."""
        n, blocks = weight.numel(), -(-weight.numel() // BLOCK)
        dtypes = (torch.int8, torch.uint8, torch.float32, torch.float32)
        tensors = [
            torch.zeros(size, dtype=dtype, device=weight.device)
            for size, dtype in zip((n, n, blocks, blocks), dtypes, strict=True)
        ]
        if remainder and weight.dtype == torch.bfloat16:
            tensors.append(torch.zeros(n, dtype=torch.int16, device=weight.device))
        return cls(*tensors)


class Scalars(NamedTuple):
    """What one step multiplies with; rounded to fp32 where it is used."""

    lr: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inverse_correction1: float  # 1/(1 − β₁ᵗ)
    inverse_correction2: float
    eps: float
    limit: float

    @classmethod
    def at(cls, step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> "Scalars":
        """Of step `step`, counted from 1."""
        beta1, beta2 = betas
        corrections = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
        limit = largest_ratio(betas, step)
        values = (lr, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, *corrections, eps, limit)
        return cls(*map(float, values))  # an int would select another kernel


def largest_ratio(betas: Sequence[float], step: int) -> float:
    """The largest |m̂|/√v̂ that any gradients lead to at step `step`: by Cauchy-Schwarz over the two weighted means.

    1 at the first step; in the limit 1.7 for β = (0.9, 0.98) and 7.3 for (0.9, 0.999).
    """
    beta1, beta2 = betas
    decay = beta1**2 / beta2
    total = step if decay == 1 else (1 - decay**step) / (1 - decay)
    return (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2) * total)


# --- reference ----------------------------------------------------------------------------------------------------


def adamw_ref(
    weight: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, scalars: Scalars
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new weight, m and v of whole blocks, (blocks, 256) in fp32, before any rounding."""
    m = m * scalars.beta1 + gradient * scalars.one_minus_beta1
    v = v * scalars.beta2 + gradient * scalars.one_minus_beta2 * gradient
    smallest = decode_v(torch.ones_like(v[:, :1]), block_scale(v))
    denominator = sqrt_(torch.maximum(v, smallest) * scalars.inverse_correction2) + scalars.eps
    ratio = (m * scalars.inverse_correction1 / denominator).clamp_(-scalars.limit, scalars.limit)
    return weight - (weight * scalars.weight_decay + ratio) * scalars.lr, m, v


# --- one step -------------------------------------------------------------------------------------------------------


def adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    grad_scale: torch.Tensor | None = None,
) -> None:
    """One step in place on a contiguous bf16 or fp32 weight of any shape, and on its state.

    The gradient, bf16 or fp32 and finite, counts `grad_scale` times: a 0-d fp32 tensor on its device, not synchronised.
    Use other `keys` at every step and for every parameter.
    """
    weight, gradient = weight.view(-1), gradient.reshape(-1)
    if use_triton(weight):
        from . import adamw_triton

        adamw_triton.adamw_(weight, gradient, state, scalars, keys, grad_scale)
        return
    for first in range(0, len(weight), CHUNK):
        elements, blocks = slice(first, first + CHUNK), slice(first // BLOCK, (first + CHUNK) // BLOCK)
        chunk = State(
            state.m[elements],
            state.v[elements],
            state.m_scale[blocks],
            state.v_scale[blocks],
            None if state.remainder is None else state.remainder[elements],
        )
        _adamw_chunk(weight[elements], gradient[elements], chunk, scalars, keys, grad_scale, first)


def add_stochastic_(accumulator: torch.Tensor, gradient: torch.Tensor, seed: int) -> None:
    """accumulator (bf16, contiguous) += gradient (bf16 or fp32, same shape), the fp32 sum rounded stochastically.

    Rounded to nearest, a term below 2⁻⁹ of the sum would be lost; so, the mean is right. Every call needs another seed.
    """
    accumulator, gradient, keys = accumulator.view(-1), gradient.reshape(-1), random_keys(seed)
    if use_triton(accumulator):
        from . import adamw_triton

        adamw_triton.add_stochastic_(accumulator, gradient, keys)
        return
    for first in range(0, len(accumulator), CHUNK):
        part = accumulator[first : first + CHUNK]
        total = part.float() + gradient[first : first + CHUNK]
        part.copy_(round_stochastically(total, more_bits(random_bits(first, len(part), keys, part.device))))


def master_weight(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 weight, in the shape of the bf16 `weight`, that it and its remainder stand for."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.view(weight.shape)).view(torch.float32)


def _adamw_chunk(weight, gradient, state: State, scalars: Scalars, keys, grad_scale, first: int) -> None:
    n = len(weight)
    whole = lambda x: pad(x, (0, -n % BLOCK)).view(-1, BLOCK)  # noqa: E731
    gradient = whole(gradient.float())
    if grad_scale is not None:
        gradient = gradient * grad_scale
    master = weight if state.remainder is None else master_weight(weight, state.remainder)
    m = decode_m(whole(state.m).float(), state.m_scale[:, None])
    v = decode_v(whole(state.v).float(), state.v_scale[:, None])
    master, m, v = adamw_ref(whole(master.float()), gradient, m, v, scalars)

    bits = random_bits(first, gradient.numel(), keys, weight.device)
    m_uniform, v_uniform = (u.view(-1, BLOCK) for u in uniforms(bits))
    m_scale, v_scale = block_scale(m), block_scale(v)
    state.m.copy_(encode_m(m, m_scale, m_uniform).view(-1)[:n])
    state.v.copy_(encode_v(v, v_scale, v_uniform).view(-1)[:n])
    state.m_scale.copy_(m_scale[:, 0])
    state.v_scale.copy_(v_scale[:, 0])

    master = master.view(-1)[:n]
    if state.remainder is not None:
        master_bits = master.view(torch.int32)
        high = (master_bits + 0x8000) >> 16
        weight.view(torch.int16).copy_(high)
        state.remainder.copy_(master_bits - (high << 16))
    elif weight.dtype == torch.bfloat16:
        weight.copy_(round_stochastically(master, more_bits(bits[:n])))
    else:
        weight.copy_(master)


# --- optimizer -----------------------------------------------------------------------------------------------------


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with 8-bit states, whose update is not lost in bf16 weights.

    `remainder`: 2 bytes per bf16 parameter complete it to an fp32 master, exactly; without, the weight is rounded
    stochastically. fp32 parameters need neither. States exist from the start, so running out of memory shows there.

    A weight that is set from outside keeps its remainder, less than half of bf16's step: load weights first. The caller
    skips steps whose gradients are not finite. Same seed, gradients and settings: same bits, after a resume too.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        remainder: bool = True,
        seed: int = 0,
    ):
        if not (0 <= betas[0] < 1 and 0 < betas[1] < 1 and eps > 0):
            raise ValueError(f"betas {betas} and eps {eps}: expected β₁ in [0, 1), β₂ in (0, 1), ε > 0")
        self.remainder, self.seed = remainder, seed
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, contiguous and in bf16 or fp32, and allocate their state."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.bfloat16, torch.float32) or not p.is_contiguous():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}: contiguous bf16 or fp32 expected"
                )
            state = State.zeros(p, self.remainder)._asdict()
            step = torch.zeros((), dtype=torch.int64)  # on the CPU: read without synchronising
            self.state[p] = {"step": step, **{name: value for name, value in state.items() if value is not None}}

    @torch.no_grad()
    def step(self, grad_scale: torch.Tensor | None = None) -> None:
        """Update the parameters that have a gradient, which counts `grad_scale` times (0-d fp32, on its device)."""
        for index, (group, p) in enumerate(self._parameters()):
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] += 1
            step = state["step"].item()
            scalars = Scalars.at(step, group["lr"], group["betas"], group["eps"], group["weight_decay"])
            tensors = State(**{name: value for name, value in state.items() if name != "step"})
            adamw_(p, p.grad, tensors, scalars, random_keys(self.seed, index, step), grad_scale)

    def load_state_dict(self, state_dict: dict) -> None:
        """Copy a saved state into this one, in its own dtypes; UserError where it is of another optimizer or model."""
        mine, saved = self.state, state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})  # torch's would cast the scales to the weights' dtype
        self.state = mine
        parameters = [p for _, p in self._parameters()]
        if set(saved) != set(range(len(parameters))):
            raise UserError(
                f"the saved optimizer has {len(saved)} parameters and this one {len(parameters)}: "
                "resume with the --model and the --lora of that run."
            )
        for index, p in enumerate(parameters):
            for name in mine[p].keys() | saved[index].keys():
                ours, theirs = mine[p].get(name), saved[index].get(name)
                if not _alike(ours, theirs):
                    raise UserError(
                        f"the saved optimizer's {name} of parameter {index} does not fit this one's: resume with the "
                        "--model and the --optimizer of that run."
                    )
                ours.copy_(theirs)

    def _parameters(self) -> Iterator[tuple[dict, torch.Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"])


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)
