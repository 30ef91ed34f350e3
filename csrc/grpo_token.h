// The GRPO loss of one token and its derivative by the token's log-probability, for the CPU and the
// CUDA kernels. The equations are those of `policy_loss_ref` in mr1_fast/kernels/grpo/reference.py,
// which names their sources.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define MR1_INLINE __host__ __device__ __forceinline__
#else
#define MR1_INLINE static inline
#endif

#define MR1_KL_LOG_RATIO_LIMIT 20.0f

enum Surrogate { CLIP = 0, CISPO = 1, SAPO = 2 };

struct LossSettings {
    float beta, clip_low, clip_high, delta, tau_positive, tau_negative;
    int surrogate;          // enum Surrogate
    int bias_corrected_kl;  // k3 times the ratio
};

// A call of the fused loss over rows of logits, on a CPU or a GPU, mirrored in
// mr1_fast/kernels/grpo/rows_native.py. old_logp, ref_logp, is_weights and out may be null; out may
// be the logits. Strides are in elements.
struct GrpoArguments {
    const void* logits;
    void* out;
    int64_t stride, out_stride, n, v;
    const int64_t* targets;
    const float *advantages, *token_weights, *old_logp, *ref_logp, *is_weights, *beta, *temperature;
    float *loss, *logp, *entropy, *kl;
    unsigned char *clipped, *kl_limited;
    struct LossSettings settings;  // its beta is read from the pointer above
    int dtype, threads;            // threads: of a CPU; unused on a GPU
};

struct TokenLoss {
    float loss;        // weighted
    float derivative;  // of the loss by logp
    float kl;
    unsigned char clipped, kl_limited;
};

// Computes the loss of a token. old_logp = logp means on-policy; with has_ref = 0, ref_logp is
// ignored.
MR1_INLINE struct TokenLoss grpo_token(const struct LossSettings* settings, float logp,
                                       float old_logp, int has_ref, float ref_logp, float advantage,
                                       float weight, float is_weight) {
    struct TokenLoss result = {0.0f, 0.0f, 0.0f, 0, 0};
    if (weight == 0.0f) return result;  // a token that does not count contributes exactly 0
    const float ratio = expf(logp - old_logp);
    const float low = 1.0f - settings->clip_low, high = 1.0f + settings->clip_high,
                delta = settings->delta;
    float policy, derivative;
    if (settings->surrogate == CLIP) {
        const float bounded = ratio > delta ? delta : ratio;
        const float inside = ratio < low ? low : ratio > high ? high : ratio;
        const float first = bounded * advantage, second = inside * advantage;
        policy = -(second < first ? second : first);
        result.clipped = (ratio < low && advantage < 0) ||
                         (ratio > fminf(delta, high) && advantage > 0) ||
                         (ratio > fmaxf(delta, high) && advantage < 0);
        derivative = result.clipped ? 0.0f : -ratio * advantage;
    } else if (settings->surrogate == CISPO) {
        const float capped = ratio > high ? high : ratio;
        policy = -capped * advantage * logp;
        derivative = -capped * advantage;
        result.clipped = ratio > high && advantage > 0;
    } else {
        const float tau = advantage > 0 ? settings->tau_positive : settings->tau_negative;
        const float gate = 1.0f / (1.0f + expf(-tau * (ratio - 1.0f)));
        policy = -(4.0f / tau) * gate * advantage;
        derivative = -4.0f * gate * (1.0f - gate) * ratio * advantage;
    }
    policy *= is_weight;
    derivative *= is_weight;
    if (has_ref) {
        float d = ref_logp - logp;
        result.kl_limited = fabsf(d) > MR1_KL_LOG_RATIO_LIMIT;
        if (result.kl_limited) d = d > 0 ? MR1_KL_LOG_RATIO_LIMIT : -MR1_KL_LOG_RATIO_LIMIT;
        const float grown = expm1f(d);  // exp(d) − d − 1 cancels to nothing near 0
        float kl = grown - d, kl_derivative = result.kl_limited ? 0.0f : -grown;
        if (settings->bias_corrected_kl) {
            kl_derivative = ratio * (kl_derivative + kl);
            kl *= ratio;
        }
        policy += settings->beta * kl;
        derivative += settings->beta * kl_derivative;
        result.kl = kl;
    }
    result.loss = weight * policy;
    result.derivative = weight * derivative;
    return result;
}
