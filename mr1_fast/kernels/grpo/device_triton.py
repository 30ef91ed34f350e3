"""The device functions of the row operations in Triton: what a program computes of its row.

`token_loss` has the equations of `reference.policy_loss_ref` with their derivative. The others sum
over columns, and let the programs of a row share their sums.

Sums are relative to an origin, for which all use y = x·scale − k with scale = log2(e)/T, where k is
max x·scale, rounded. The rounded k is what is handed on, so that sums, the target's log-probability
and the gradient are relative to the very same number, and its rounding cancels. A fused
multiply-add makes y in one instruction, with one rounding.
"""

import torch
import triton
import triton.language as tl

from .objective import BANNED as BANNED_LOGP
from .objective import KL_LOG_RATIO_LIMIT

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run under Triton's interpreter, on a CPU."""
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KL_LIMIT = tl.constexpr(KL_LOG_RATIO_LIMIT)
BANNED = tl.constexpr(BANNED_LOGP)
LOWEST = tl.constexpr(-200.0)
"""Least y: 2^−200 is 0 in fp32, and 0·y is no NaN, which it would be for a banned token's −inf."""
ABSENT = tl.constexpr(-1)
"""A word that was not written yet: all bits are 1, which is a NaN that `word` never yields."""


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
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pair(a, b):
    """Return Σ a and Σ b of two vectors, in one reduction, so that warps meet once."""
    if _INTERPRETED:  # It would reduce pairs in a loop of Python.
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, _add_pairs)


@triton.jit
def origin_of(m, scale):
    """Return k = m·scale, rounded; 0 where all logits are −inf, so that no y is −inf + inf."""
    k = m * scale
    return tl.where(k == -float("inf"), 0.0, k)


@triton.jit
def block_sums(x, k, scale):
    """Return Σ 2^y and Σ 2^y·y over a block of fp32 logits. Logits of −inf contribute 0."""
    y = tl.maximum(tl.fma(x, scale, -k), LOWEST, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(y)
    return sum_pair(p, p * y)


@triton.jit
def _add_block(m, k, s, u, x, scale):
    """Add a block of logits to their maximum m, to k = m·scale, and to the sums relative to k."""
    x = x.to(tl.float32)
    m = tl.maximum(m, tl.max(x, 0))
    origin = origin_of(m, scale)
    block_s, block_u = block_sums(x, origin, scale)
    # k is −inf at first, and 0·−inf would be NaN.
    shift = tl.maximum(k - origin, LOWEST)
    alpha = tl.exp2(shift)
    k = tl.where(m == -float("inf"), m, origin)
    return m, k, alpha * s + block_s, alpha * (u + s * shift) + block_u


@triton.jit
def stream_sums(row, V, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Return m = max x, k, s = Σ 2^y and u = Σ 2^y·y over a row's V columns, read once.

    The sums are scalars: as vectors they would take the registers that keep loads in flight. Only
    the last block is masked.
    """
    m = -float("inf")
    k = -float("inf")
    s = 0.0
    u = 0.0
    inside = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    for begin in tl.range(0, whole, BLOCK, num_stages=STAGES):
        m, k, s, u = _add_block(m, k, s, u, tl.load(row + begin + inside), scale)
    if whole < V:
        columns = whole + inside
        x = tl.load(row + columns, mask=columns < V, other=-float("inf"))
        m, k, s, u = _add_block(m, k, s, u, x, scale)
    return m, k, s, u


@triton.jit
def load_target(row, target, V):
    """Return the target's logit; NaN for a target outside [0, V).

    A launch could not refuse such a target without synchronising.
    """
    inside = (target >= 0) & (target < V)
    x = tl.load(row + tl.where(inside, target, 0)).to(tl.float32)
    return tl.where(inside, x, float("nan"))


@triton.jit
def logprob_entropy(x_target, k, s, u, scale):
    """Return the target's log-probability and the row's entropy, in nats, and log2(s)."""
    log2_s = tl.log2(s)
    return (tl.fma(x_target, scale, -k) - log2_s) * LN2, (log2_s - u / s) * LN2, log2_s


@triton.jit
def word(value):
    """Return the bits of an fp32 value as int32, of any NaN those of one that is not ABSENT."""
    return tl.where(value == value, value, float("nan")).to(tl.int32, bitcast=True)


@triton.jit
def publish(words, part, k, s, u, PARTS: tl.constexpr):
    """Write the sums of this part to the row's words: k of all parts, then s, then u.

    The stores are atomic, though nobody else writes there, so that no reader sees half of one and
    no compiler holds one back.
    """
    tl.atomic_xchg(words + part, word(k), sem="relaxed")
    tl.atomic_xchg(words + PARTS + part, word(s), sem="relaxed")
    tl.atomic_xchg(words + 2 * PARTS + part, word(u), sem="relaxed")


@triton.jit
def _read(words, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """Return k, s and u of all parts, the target's logit (PADDED times), and how many are absent.

    The logit is a vector as the others are, so that one sum over the program counts what is absent,
    and its warps look again together: where there are more than 32 parts, they meet in that sum.
    """
    index = tl.arange(0, PADDED)
    real = index < PARTS
    k = tl.load(words + index, mask=real, other=0, volatile=True)
    s = tl.load(words + PARTS + index, mask=real, other=0, volatile=True)
    u = tl.load(words + 2 * PARTS + index, mask=real, other=0, volatile=True)
    x_target = tl.load(words + 3 * PARTS + index * 0, volatile=True)
    absent = (k == ABSENT) | (s == ABSENT) | (u == ABSENT) | (x_target == ABSENT)
    return k, s, u, x_target, tl.sum(absent.to(tl.int32), 0)


@triton.jit
def gather(words, PARTS: tl.constexpr, PADDED: tl.constexpr, SPINS: tl.constexpr):
    """Wait for the words of all parts of a row; return k, s, u and the target's logit of the row.

    A word is its own flag, so there is no order between words to keep. Programs start in the order
    of their number, so the lowest row that is not finished always has all its parts running, and
    waiting ends. Were a part missing all the same, s is NaN after SPINS looks, and whether all came
    is the fifth result.
    """
    k, s, u, x_target, absent = _read(words, PARTS, PADDED)
    looks = 0
    while (absent > 0) & (looks < SPINS):
        k, s, u, x_target, absent = _read(words, PARTS, PADDED)
        looks += 1
    complete = absent == 0
    ks = k.to(tl.float32, bitcast=True)
    ss = s.to(tl.float32, bitcast=True)
    us = u.to(tl.float32, bitcast=True)
    # The origin is that of parts that are not padding and not banned as a whole. A part whose k has
    # overflowed has s = 0, too: its k = inf makes the row NaN.
    counts = (ss > 0) | (ks == float("inf"))
    origin = tl.max(tl.where(counts, ks, -float("inf")), 0)
    origin = tl.where(origin == -float("inf"), 0.0, origin)
    shift = tl.where(counts, tl.maximum(ks - origin, LOWEST), LOWEST)
    alpha = tl.exp2(shift)
    # NaN of any part stays: NaN > 0 is false, but NaN·0 is NaN.
    total, weighted = sum_pair(ss * alpha, (us + ss * shift) * alpha)
    total = tl.where(complete, total, float("nan"))
    # All of its entries are the same.
    first = tl.arange(0, PADDED) == 0
    target = tl.sum(tl.where(first, x_target.to(tl.float32, bitcast=True), 0.0), 0)
    return origin, total, weighted, target, complete


def interpreted_block(logits: torch.Tensor) -> int:
    """Return the columns of a block under the interpreter, a power of 2.

    A block costs a millisecond there, whatever its size; a row still has several, so that loops run
    and parts wait.
    """
    return min(65536, triton.next_power_of_2(triton.cdiv(logits.shape[1], 2)))
