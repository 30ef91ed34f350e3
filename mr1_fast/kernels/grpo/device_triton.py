"""The device functions of the row operations in Triton: what a program computes of its row.

`token_loss` has the equations of `reference.policy_loss_ref` with their derivative. The others read
a row's columns, share what the parts of a split row know, and write the gradient.
"""

import triton
import triton.language as tl

from .objective import BANNED as BANNED_LOGP
from .objective import KL_LOG_RATIO_LIMIT

LN2 = tl.constexpr(0.6931471805599453)
KL_LIMIT = tl.constexpr(KL_LOG_RATIO_LIMIT)
BANNED = tl.constexpr(BANNED_LOGP)
SPIN_LIMIT = tl.constexpr(1 << 20)
"""How often a program looks whether the other parts of its row have arrived."""


@triton.jit
def token_loss(
    logp, advantage, weight, old_logp, ref_logp, is_weight,
    beta, clip_low, clip_high, delta, tau_positive, tau_negative,
    SURROGATE: tl.constexpr, HAS_REF: tl.constexpr, BIAS_CORRECTED: tl.constexpr,
):  # fmt: skip
    """Return the loss of one token, its derivative by logp, k3, clipped and kl_limited.

    The equations are those of `policy_loss_ref`. tl.minimum and tl.maximum drop NaN, which must
    show in the loss: it is put back.
    """
    ratio = tl.exp(logp - old_logp)
    low = 1 - clip_low
    high = 1 + clip_high
    clipped = False
    if SURROGATE == "clip":
        bounded = tl.minimum(ratio, delta)
        inside = tl.minimum(tl.maximum(ratio, low), high)
        first = bounded * advantage
        policy = -tl.minimum(first, inside * advantage)
        policy = tl.where(first == first, policy, float("nan"))  # ∞·0 is NaN too
        below = (ratio < low) & (advantage < 0)
        above = (ratio > tl.minimum(delta, high)) & (advantage > 0)
        beyond = (ratio > tl.maximum(delta, high)) & (advantage < 0)
        clipped = below | above | beyond
        derivative = tl.where(clipped, 0.0, -ratio * advantage)
    elif SURROGATE == "cispo":
        capped = tl.minimum(ratio, high)
        policy = -capped * advantage * logp
        derivative = -capped * advantage
        clipped = (ratio > high) & (advantage > 0)
    else:
        tau = tl.where(advantage > 0, tau_positive, tau_negative)
        gate = tl.sigmoid(tau * (ratio - 1))
        policy = -(4 / tau) * gate * advantage
        derivative = -4 * gate * (1 - gate) * ratio * advantage
    policy = tl.where(ratio == ratio, policy, ratio) * is_weight
    derivative = tl.where(ratio == ratio, derivative, ratio) * is_weight

    kl = 0.0
    kl_limited = False
    if HAS_REF:
        difference = ref_logp - logp
        kl_limited = tl.abs(difference) > KL_LIMIT
        d = tl.minimum(tl.maximum(difference, -KL_LIMIT), KL_LIMIT)
        # Near 0, exp(d) − d − 1 cancels to nothing in fp32; its series does not.
        series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
        kl = tl.where(tl.abs(d) < 0.25, series, tl.exp(d) - d - 1)
        kl_derivative = tl.where(kl_limited, 0.0, -(kl + d))
        kl = tl.where(difference == difference, kl, difference)
        kl_derivative = tl.where(difference == difference, kl_derivative, difference)
        if BIAS_CORRECTED:
            kl_derivative = ratio * (kl_derivative + kl)
            kl *= ratio
        derivative += beta * kl_derivative
        policy += beta * kl
    counts = weight != 0
    loss = tl.where(counts, weight * policy, 0.0)
    derivative = tl.where(counts, weight * derivative, 0.0)
    return loss, derivative, tl.where(counts, kl, 0.0), clipped & counts, kl_limited & counts


@triton.jit
def statistics(row, start, stop, scale, BLOCK: tl.constexpr):
    """Return m = max x, s = Σ 2^y and u = Σ 2^y·y over columns start … stop.

    y = (x − m)·scale with scale = log2(e)/T. Sums stay vectors until the end; only the maximum is
    reduced at every block.
    """
    m = -float("inf")
    s = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(start, stop, BLOCK, num_stages=3):
        columns = begin + tl.arange(0, BLOCK)
        x = tl.load(
            row + columns, mask=columns < stop, other=-float("inf"), eviction_policy="evict_last"
        )
        x = x.to(tl.float32)
        new_m = tl.maximum(m, tl.max(x, 0))
        # A block may hold banned tokens alone, with logits of −inf.
        origin = tl.where(new_m == -float("inf"), 0.0, new_m)
        y = (x - origin) * scale
        p = tl.exp2(y)
        # At least BANNED, as 0·−inf would be NaN.
        shift = tl.where(m == -float("inf"), 0.0, tl.maximum((m - origin) * scale, BANNED))
        alpha = tl.where(m == -float("inf"), 0.0, tl.exp2(shift))
        u = alpha * (u + s * shift) + tl.where(p > 0, p * y, 0.0)
        s = alpha * s + p
        m = new_m
    return m, tl.sum(s, 0), tl.sum(u, 0)


@triton.jit
def logprob_entropy(x_target, m, s, u, scale):
    """Return logp, the entropy in nats, and log2(s)."""
    log2_s = tl.log2(s)
    return ((x_target - m) * scale - log2_s) * LN2, (log2_s - u / s) * LN2, log2_s


@triton.jit
def load_target(row, target, V):
    """Return the target's logit; NaN for a target outside [0, V).

    A launch could not refuse such a target without synchronising.
    """
    inside = (target >= 0) & (target < V)
    x = tl.load(row + tl.where(inside, target, 0)).to(tl.float32)
    return tl.where(inside, x, float("nan"))


@triton.jit
def write_gradient(
    row, out, target, start, stop, scale, m, log2_s, coefficient, BLOCK: tl.constexpr
):
    """Write coefficient·(onehot − p) to columns start … stop; 0 needs no second read."""
    if coefficient == 0:
        for begin in tl.range(start, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            tl.store(
                out + columns,
                tl.zeros((BLOCK,), tl.float32).to(out.dtype.element_ty),
                mask=columns < stop,
            )
    else:
        for begin in tl.range(start, stop, BLOCK, num_stages=3):
            columns = begin + tl.arange(0, BLOCK)
            mask = columns < stop
            x = tl.load(
                row + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first"
            )
            p = tl.exp2((x.to(tl.float32) - m) * scale - log2_s)
            gradient = tl.where(columns == target, coefficient, 0.0) - coefficient * p
            tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_parts(
    parts, x_target, part, arrived, m, s, u, scale,
    PARTS: tl.constexpr, PADDED: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Share the sums of this part and wait for the others'.

    Returns x_target, m, s and u of the row, and whether all parts came.

    Programs start in the order of their number, so the lowest row that is not finished always has
    all its parts running, and waiting ends. Where programs cannot wait for each other, PHASE 1 and
    PHASE 2 are launches of their own.
    """
    if PHASE != 2:
        tl.store(parts + part * 4, m)
        tl.store(parts + part * 4 + 1, s)
        tl.store(parts + part * 4 + 2, u)
        tl.store(parts + part * 4 + 3, x_target)
    complete = True
    if PHASE == 0:
        tl.debug_barrier()
        seen = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") + 1
        tries = 0
        while (seen < PARTS) & (tries < SPIN_LIMIT):
            seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
            tries += 1
        tl.debug_barrier()
        complete = seen >= PARTS
    index = tl.arange(0, PADDED)
    mask = index < PARTS
    ms = tl.load(parts + index * 4, mask=mask, other=-float("inf"), cache_modifier=".cg")
    ss = tl.load(parts + index * 4 + 1, mask=mask, other=0.0, cache_modifier=".cg")
    us = tl.load(parts + index * 4 + 2, mask=mask, other=0.0, cache_modifier=".cg")
    # The logit itself may hold its gradient by now.
    x_target = tl.load(parts + 3, cache_modifier=".cg")
    m = tl.max(ms, 0)
    shift = tl.where(ms == -float("inf"), 0.0, tl.maximum((ms - m) * scale, BANNED))
    alpha = tl.where(ms == -float("inf"), 0.0, tl.exp2(shift))
    # A part that did not come must show: the sum would be wrong without a word.
    s = tl.where(complete, tl.sum(ss * alpha, 0), float("nan"))
    return x_target, m, s, tl.sum((us + ss * shift) * alpha, 0), complete
