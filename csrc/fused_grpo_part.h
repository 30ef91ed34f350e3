// The arithmetic of fused_grpo_cuda.cu: what a thread block computes of its part of a row, and of
// the whole row once it knows all parts. It compiles for a host, too, where
// tests/kernels/grpo/rows_by_parts.cpp runs it against fp64.
#pragma once
#include "grpo_token.h"

#define MR1_LOG2E 1.4426950408889634f
#define MR1_LN2 0.6931471805599453f
// The least exponent: its power is 0 in fp32, and 0 times it is 0, where 0·(−inf) would be NaN.
#define MR1_SMALLEST -150.0f

// --- which columns ------------------------------------------------------------------------------

// A row is cut in packs of 16 bytes. Parts begin at multiples of 128 bytes, so that no line of
// memory is written by two blocks where rows begin there, too; the last ones may be short or empty.
MR1_INLINE int packs_per_part(int packs, int parts) {
    return ((packs + parts - 1) / parts + 7) / 8 * 8;
}

struct PackRange {
    int begin, count;
};

MR1_INLINE struct PackRange part_range(int packs, int per_part, int part) {
    const int begin = part * per_part < packs ? part * per_part : packs,
              left = packs - begin;
    const struct PackRange range = {begin, left < per_part ? left : per_part};
    return range;
}

// --- a part -------------------------------------------------------------------------------------

// With y = x·scale − k and scale = log2(e)/T: s = Σ 2^y and u = Σ 2^y·y over the part's columns.
// k = max(x)·scale as rounded to fp32; −inf if no logit is above −inf. Published in place of the
// maximum, so that sums, target and gradient refer to the very same origin, whatever its rounding.
// x_target is the target's logit in the part that has it, 0 in the others.
struct PartStatistics {
    float k, s, u, x_target;
};

MR1_INLINE float power_of_two(float y) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    return power;
#else
    return exp2f(y);
#endif
}

// Returns y, but at least MR1_SMALLEST; NaN stays.
MR1_INLINE float bounded_exponent(float y) {
#ifdef __CUDA_ARCH__
    float bounded;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(bounded) : "f"(y), "f"(MR1_SMALLEST));
    return bounded;
#else
    return y < MR1_SMALLEST ? MR1_SMALLEST : y;
#endif
}

// Returns what is subtracted for the origin k; −inf − (−inf) would be NaN.
MR1_INLINE float finite_origin(float k) { return k == -INFINITY ? 0.0f : k; }

MR1_INLINE void add_logit(float x, float scale, float origin, float* s, float* u) {
    const float y = bounded_exponent(fmaf(x, scale, -origin)), p = power_of_two(y);
    *s += p;
    *u = fmaf(p, y, *u);
}

// --- a row --------------------------------------------------------------------------------------

// Returns the statistics of a part relative to the row's origin, ready to be added up.
MR1_INLINE struct PartStatistics relative_to(struct PartStatistics part, float origin) {
    const float d = bounded_exponent(part.k - origin), w = power_of_two(d);
    const struct PartStatistics moved = {origin, w * part.s, w * fmaf(part.s, d, part.u),
                                         part.x_target};
    return moved;
}

// What the loss of a row depends on beside its logits.
struct RowInputs {
    int64_t target;
    float temperature, beta, advantage, token_weight, old_logp, ref_logp, is_weight;
};

MR1_INLINE struct RowInputs row_inputs(const struct GrpoArguments* a, int64_t n) {
    const struct RowInputs in = {a->targets[n],
                                 *a->temperature,
                                 *a->beta,
                                 a->advantages[n],
                                 a->token_weights[n],
                                 a->old_logp ? a->old_logp[n] : 0.0f,
                                 a->ref_logp ? a->ref_logp[n] : 0.0f,
                                 a->is_weights ? a->is_weights[n] : 1.0f};
    return in;
}

// The gradient of a column is factor·2^(x·scale − origin), that of the target's column
// target_value. A factor of 0 means that nothing else need be computed.
struct RowGradient {
    float origin, factor, target_value, unused;
};

// Computes the loss of row n from the sums of its parts, whose k is the row's origin. Stores the
// results if `write`. A target outside [0, V) makes them NaN, and so do NaN logits and +inf; a
// gradient that is not finite is 0.
MR1_INLINE struct RowGradient finish_row(const struct GrpoArguments* a, int64_t n,
                                         const struct RowInputs* in, struct PartStatistics row,
                                         int write) {
    const float scale = MR1_LOG2E / in->temperature, log2_s = log2f(row.s);
    const float x_target = in->target < 0 || in->target >= a->v ? NAN : row.x_target;
    const float y_target = fmaf(x_target, scale, -row.k), logp = (y_target - log2_s) * MR1_LN2;
    struct LossSettings settings = a->settings;
    settings.beta = in->beta;
    const struct TokenLoss token =
        grpo_token(&settings, logp, a->old_logp ? in->old_logp : logp, a->ref_logp != 0,
                   in->ref_logp, in->advantage, in->token_weight, in->is_weight);
    if (write) {
        a->loss[n] = token.loss;
        a->logp[n] = logp;
        a->entropy[n] = (log2_s - row.u / row.s) * MR1_LN2;
        a->kl[n] = token.kl;
        a->clipped[n] = token.clipped;
        a->kl_limited[n] = token.kl_limited;
    }
    const float coefficient = token.derivative / in->temperature;
    struct RowGradient gradient = {row.k, 0.0f, 0.0f, 0.0f};
    if (coefficient != 0.0f && fabsf(coefficient) < INFINITY) {
        gradient.factor = -coefficient / row.s;
        // coefficient·(1 − p), where 1 − p would cancel for a likely target.
        gradient.target_value = -coefficient * expm1f(logp);
    }
    return gradient;
}

MR1_INLINE float column_gradient(float x, float scale, const struct RowGradient* row) {
    return row->factor * power_of_two(fmaf(x, scale, -row->origin));
}
