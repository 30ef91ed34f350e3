"""The operations of layers in PyTorch: their specification, and what runs on a CPU.

On a CPU they are a training run's own code, so they make few passes over memory. A product that
several results need is computed once, and sums over columns or rows are matrix-vector products.
"""

import torch
from torch.nn.functional import gelu, layer_norm, silu

from ..dispatch import statistics_dtype

GELU_SLOPE = 1.702
"""The factor inside the sigmoid by which OpenAI's CLIP approximates GELU."""
GELU_TANH = 0.7978845608028654, 0.044715
"""√(2/π), and the share of x³, in the approximation of GELU by a hyperbolic tangent."""

# --- norms --------------------------------------------------------------------------------------


def norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`operations.norm`, as Qwen2RMSNorm of transformers and layer_norm of PyTorch compute it."""
    if bias is not None:
        return layer_norm(x, weight.shape, weight, bias, eps)
    h = x.float()
    r, buffer = _inverse_rms(h, eps)
    return torch.mul(h, r, out=buffer).to(x.dtype).mul_(weight)


def _inverse_rms(h: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1/√(mean h² + ε), (…, 1), and a buffer of h's shape that is free for other use."""
    squares = h.square()
    return squares.mean(-1, keepdim=True).add_(eps).rsqrt_(), squares


def add_norm_ref(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.add_norm`."""
    residual = x + update
    return residual, norm_ref(residual, weight, bias, eps)


def norm_backward_ref(
    dnormed: torch.Tensor,
    dresidual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    with_normed: bool,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`operations.norm_backward`, with all rows in one part."""
    backward = _rms_norm_backward if bias is None else _layer_norm_backward
    dx, normed, partial = backward(
        dnormed, dresidual, x, weight, bias, eps, with_normed, with_weights
    )
    return (
        dx.to(x.dtype),
        normed if with_normed else x.new_empty(0),
        partial if with_weights else x.new_empty(0, dtype=statistics_dtype(x)),
    )


def _rms_norm_backward(dnormed, dresidual, x, weight, bias, eps, with_normed, with_weights):
    """Compute dx = r·w·dy − x·r³·mean(w·dy·x), with r = 1/√(mean x² + ε), and Σ dy·x·r.

    Rows of x may be (T, D), or heads of tokens, (T, H, D).
    """
    dtype = statistics_dtype(x)
    dy, h, w = dnormed.to(dtype), x.to(dtype), weight.to(dtype)
    r, buffer = _inverse_rms(h, eps)
    products = torch.mul(dy, h, out=buffer)
    slope = (products @ w).unsqueeze(-1).mul_(r.pow(3).div_(-h.shape[-1]))
    partial = None
    if with_weights:
        partial = (r.flatten(0, -2).T @ products.flatten(0, -2)).unsqueeze(0)
    dx = h * slope if dresidual is None else torch.addcmul(dresidual.to(dtype), h, slope)
    dx.addcmul_(torch.mul(dy, w, out=buffer), r)
    if not with_normed or dtype == torch.float64:  # whose r the forward computes in fp32
        return dx, norm_ref(x, weight, None, eps) if with_normed else None, partial
    return dx, torch.mul(h, r, out=buffer).to(x.dtype).mul_(weight), partial


def _layer_norm_backward(dnormed, dresidual, x, weight, bias, eps, with_normed, with_weights):
    """Compute dx and the sums of dweight and dbias by PyTorch's own operator."""
    dtype = statistics_dtype(x)
    dy, h, w, b = (t.to(dtype) for t in (dnormed, x, weight, bias))
    normed, mean, r = torch.native_layer_norm(h, w.shape, w, b, eps)
    needs = [True, with_weights, with_weights]
    dx, *sums = torch.ops.aten.native_layer_norm_backward(dy, h, w.shape, mean, r, w, b, needs)
    if dresidual is not None:
        dx.add_(dresidual)
    return dx, normed.to(x.dtype), torch.stack(sums).unsqueeze(0) if with_weights else None


# --- the rotary embedding -----------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding cos, sin (R, d) to x (R, H, d).

    This is transformers' `apply_rotary_pos_emb`, with its roundings.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)


def rotary_ref(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`operations.rotary`, with the roundings of transformers' `apply_rotary_pos_emb`."""
    if bias is not None:
        qkv = qkv + bias
    tokens, d = cos.shape
    q, k, v = qkv.unflatten(1, (-1, d)).split([heads, kv_heads, kv_heads], dim=1)
    rotated = tuple(qkv.new_empty(tokens, count, d) for count in (heads, kv_heads))
    for x, out in zip((q, k), rotated, strict=True):
        _rotate(x, cos, sin, out)
    return *rotated, v.clone(memory_format=torch.contiguous_format)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Write x·cos + (−x2, x1)·sin of x (T, H, d), with halves x1 and x2, into `out`.

    In fp32 and fp64 the second product is added without a rounding of its own.
    """
    if x.dtype not in (torch.float32, torch.float64) or cos.dtype != x.dtype:
        out.copy_(rotate(x.to(cos.dtype), cos, sin))
        return
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])


def rotary_backward_ref(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`operations.rotary_backward`: the transposed rotation."""
    (tokens, heads, d), kv_heads = dq.shape, dk.shape[1]
    dqkv = dq.new_empty(tokens, heads + 2 * kv_heads, d)
    # The sine moves with the channel that it multiplied
    sin = -sin.roll(d // 2, dims=-1)
    by_q, by_k, by_v = dqkv.split([heads, kv_heads, kv_heads], dim=1)
    _rotate(dq, cos, sin, by_q)
    _rotate(dk, cos, sin, by_k)
    by_v.copy_(dv)
    return dqkv.flatten(1)


def norm_rotary_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.norm_rotary`, with the roundings of transformers' norm and rotation."""
    tokens, d = cos.shape
    q, k, _ = qkv.unflatten(1, (-1, d)).split([heads, kv_heads, kv_heads], dim=1)
    rotated = tuple(qkv.new_empty(tokens, count, d) for count in (heads, kv_heads))
    for x, weight, out in zip((q, k), (q_weight, k_weight), rotated, strict=True):
        _rotate(norm_ref(x, weight, None, eps), cos, sin, out)
    return rotated


def norm_rotary_backward_ref(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.norm_rotary_backward`, with all heads in one part."""
    dtype, (heads, d), kv_heads = statistics_dtype(qkv), dq.shape[1:], dk.shape[1]
    counts = heads, kv_heads, kv_heads
    dqkv = qkv.new_empty(len(qkv), sum(counts), d)
    *by_heads, by_v = dqkv.split(counts, dim=1)
    by_v.copy_(dv)
    *rows, _ = qkv.unflatten(1, (-1, d)).split(counts, dim=1)
    cos, sin = cos.to(dtype), -sin.to(dtype).roll(d // 2, dims=-1)
    sums = []
    for dy, x, weight, out in zip((dq, dk), rows, (q_weight, k_weight), by_heads, strict=True):
        turned = dy.new_empty(dy.shape, dtype=dtype)
        _rotate(dy.to(dtype), cos, sin, turned)
        dx, _, partial = _rms_norm_backward(turned, None, x, weight, None, eps, False, with_weights)
        out.copy_(dx)
        sums.append(partial)
    if not with_weights:
        return dqkv.flatten(1), qkv.new_empty(0, dtype=dtype)
    return dqkv.flatten(1), torch.cat(sums, dim=1)


# --- gating -------------------------------------------------------------------------------------


def silu_mul_ref(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`operations.silu_mul`."""
    gate, up = _gate_and_up(gate_up, bias)
    return silu(gate).mul_(up)


def silu_mul_backward_ref(
    dout: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.silu_mul_backward`."""
    gate, up = _gate_and_up(gate_up, bias)
    dgate_up = gate_up.new_empty(gate_up.shape)
    dgate, dup = dgate_up.chunk(2, dim=1)
    activated = silu(gate)
    torch.mul(dout, activated, out=dup)
    torch.mul(dout, up, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate_up, activated.mul_(up)


def _gate_and_up(
    gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return (gate_up if bias is None else gate_up + bias).chunk(2, dim=1)


def gelu_ref(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`operations.gelu`, as transformers' QuickGELUActivation and GELUTanh compute it."""
    if kind == "tanh":
        return gelu(x, approximate=kind)
    return (GELU_SLOPE * x).sigmoid_().mul_(x)


def gelu_backward_ref(
    dout: torch.Tensor, x: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.gelu_backward`.

    x·sigmoid(a·x) is silu(a·x)/a, so the derivative is silu's at a·x.
    """
    if kind == "tanh":
        return torch.ops.aten.gelu_backward(dout, x, approximate=kind), gelu_ref(x, kind)
    scaled = GELU_SLOPE * x
    dx = torch.ops.aten.silu_backward(dout, scaled)
    return dx, scaled.sigmoid_().mul_(x)
