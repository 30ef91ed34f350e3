import torch, torch.nn.functional as F


def _rms(x, w, eps):
    h = x.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * n.to(x.dtype)


class _AN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, w, b, eps):
        r = x + u
        ctx.save_for_backward(r, w)
        ctx.b, ctx.eps = b, eps
        return r, norm(r, w, b, eps)

    @staticmethod
    def backward(ctx, dr, dn):
        r, w = ctx.saved_tensors
        dx, _, p = norm_backward(dn, dr, r, w, ctx.b, ctx.eps, False, True)
        p = p.sum(0).to(w.dtype)
        return dx, dx, p[0], None if ctx.b is None else p[1], None


def add_norm(x, u, w, b, eps):
    return _AN.apply(x, u, w, b, eps)


def norm(x, w, b, eps):
    return _rms(x, w, eps) if b is None else F.layer_norm(x, x.shape[-1:], w, b, eps)


def norm_backward(dn, dr, x, w, b, eps, with_n, with_w):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        w = w.detach().requires_grad_()
        b = None if b is None else b.detach().requires_grad_()
        y = norm(x, w, b, eps)
        g = torch.autograd.grad(y, [t for t in (x, w, b) if t is not None], dn)
    dx = g[0] if dr is None else g[0] + dr
    return dx, y.detach(), torch.stack(g[1:])[None] if with_w else x.new_empty(0)


def _rot(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _rotT(x):
    a, b = x.chunk(2, -1)
    return torch.cat((b, -a), -1)


def rotary(qkv, bias, cos, sin, H, K):
    if bias is not None:
        qkv = qkv + bias
    d = cos.shape[-1]
    q, k, v = qkv.unflatten(-1, (-1, d)).split([H, K, K], 1)
    c, s = cos[:, None], sin[:, None]
    t = cos.dtype
    return *((x.to(t) * c + _rot(x.to(t)) * s).to(qkv.dtype) for x in (q, k)), v.clone()


def rotary_backward(dq, dk, dv, cos, sin):
    c, s = cos[:, None], sin[:, None]
    t = cos.dtype
    p = [(x.to(t) * c + _rotT(x.to(t) * s)).to(dq.dtype) for x in (dq, dk)]
    return torch.cat([*p, dv], 1).flatten(1)


def silu_mul(gu, b):
    if b is not None:
        gu = gu + b
    g, u = gu.chunk(2, -1)
    return F.silu(g) * u


def silu_mul_backward(d, gu, b):
    with torch.enable_grad():
        gu = gu.detach().requires_grad_()
        y = silu_mul(gu, b)
        (g,) = torch.autograd.grad(y, gu, d)
    return g, y.detach()


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def quick_gelu_backward(d, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = quick_gelu(x)
        (g,) = torch.autograd.grad(y, x, d)
    return g, y.detach()
