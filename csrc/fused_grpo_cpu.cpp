// The native kernels on a CPU: a plain C interface, threads, and the choice of the instruction set.
// The row operations are those of mr1_fast/kernels/grpo/rows.py, computed in row_kernels.cpp;
// attention is that of mr1_fast/kernels/decode/, computed in decode_cpu.cpp.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_calls.h"
#include "decode_blocks.h"
#include "grpo_token.h"
#include "sources.h"

// setup.py defines MR1_HAS_… for every instruction set that the compiler knows.
extern const RowKernels mr1_row_kernels_avx512bf16[DTYPES], mr1_row_kernels_avx512[DTYPES],
    mr1_row_kernels_avx2[DTYPES], mr1_row_kernels_neon[DTYPES], mr1_row_kernels_scalar[DTYPES];
extern const DecodeKernel mr1_decode_kernels_avx512bf16[DTYPES], mr1_decode_kernels_avx512[DTYPES],
    mr1_decode_kernels_avx2[DTYPES], mr1_decode_kernels_neon[DTYPES],
    mr1_decode_kernels_scalar[DTYPES];
extern const LayerKernels mr1_layer_kernels_avx512bf16[DTYPES], mr1_layer_kernels_avx512[DTYPES],
    mr1_layer_kernels_avx2[DTYPES], mr1_layer_kernels_neon[DTYPES],
    mr1_layer_kernels_scalar[DTYPES];
extern const SampleKernel mr1_sample_kernels_avx512bf16[DTYPES], mr1_sample_kernels_avx512[DTYPES],
    mr1_sample_kernels_avx2[DTYPES], mr1_sample_kernels_neon[DTYPES],
    mr1_sample_kernels_scalar[DTYPES];

namespace {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
// Work below which starting threads costs more than it saves, in logits, and in products of queries
// and keys.
constexpr int64_t ELEMENTS_PER_THREAD = 32768, PRODUCTS_PER_TEAM = 262144;

#define MR1_SET(isa)                                                           \
    {mr1_row_kernels_##isa, mr1_decode_kernels_##isa, mr1_layer_kernels_##isa, \
     mr1_sample_kernels_##isa}

// Returns the instruction sets that this machine can run, from the best to the plainest.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    (void)avx512;
#ifdef MR1_HAS_avx512bf16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(MR1_SET(avx512bf16));
#endif
#ifdef MR1_HAS_avx512
    if (avx512) found.push_back(MR1_SET(avx512));
#endif
#ifdef MR1_HAS_avx2
    if (avx2) found.push_back(MR1_SET(avx2));
#endif
#endif
#ifdef MR1_HAS_neon
    found.push_back(MR1_SET(neon));
#endif
    found.push_back(MR1_SET(scalar));
    return found;
}

}  // namespace

InstructionSet chosen = supported().front();
GompParallel gomp_parallel = nullptr;

namespace {

struct Rows {
    const char* logits;
    char* out;  // may be null, may be the logits
    int64_t stride, out_stride, n, v;
    int dtype, threads, parts;
    bool masked;
    std::vector<int64_t> counting;  // the rows that are read, if `masked`

    // Rows of weight 0 are left out; without weights, none is.
    Rows(const void* logits, int64_t stride, void* out, int64_t out_stride, int64_t n, int64_t v,
         int dtype, int threads, const float* weights = nullptr)
        : logits((const char*)logits),
          out((char*)out),
          stride(stride * size(dtype)),
          out_stride(out_stride * size(dtype)),
          n(n),
          v(v),
          dtype(dtype),
          masked(weights != nullptr) {
        this->threads = useful(n, threads);
        // Independent of the weights, since splitting a row changes how its sums are rounded.
        parts = n < this->threads && n > 0 ? (int)((this->threads + n - 1) / n) : 1;
        if (!masked) return;
        for (int64_t i = 0; i < n; ++i)
            if (weights[i] != 0.0f) counting.push_back(i);
        this->threads = useful(count(), threads);
    }
    // Returns how many of the threads have enough to do with so many rows.
    int useful(int64_t rows, int threads) const {
        const int64_t most = rows * v / ELEMENTS_PER_THREAD + 1;
        return (int)(most < threads ? most : threads);
    }
    // The rows that are read are index(0), …, index(count() − 1).
    int64_t count() const { return masked ? (int64_t)counting.size() : n; }
    int64_t index(int64_t k) const { return masked ? counting[k] : k; }
    static int64_t size(int dtype) { return dtype == FP32 ? 4 : 2; }
    const char* row(int64_t i) const { return logits + i * stride; }
    char* out_row(int64_t i) const { return out + i * out_stride; }
    // Returns NaN for a target outside [0, v), as the GPU kernels do.
    float logit(int64_t i, int64_t target) const {
        return target < 0 || target >= v ? NAN : chosen.rows[dtype].get(row(i), target);
    }
    // Returns the first column of a part, a multiple of 64, so that no two threads write the same
    // cache line.
    int64_t begin(int64_t part) const { return part >= parts ? v : v / parts * part / 64 * 64; }
};

// Calls use(i, statistics) for each row that is read. Rows are split into parts where there are
// fewer rows than threads.
template <class Use> void for_each_row(const Rows& rows, float scale, const Use& use) {
    const RowKernels& kernels = chosen.rows[rows.dtype];
    if (rows.parts == 1) {
        parallel(rows.count(), rows.threads, [&](int64_t k) {
            const int64_t i = rows.index(k);
            use(i, kernels.statistics(rows.row(i), rows.v, scale));
        });
        return;
    }
    std::vector<Statistics> partial(rows.count() * rows.parts);
    parallel((int64_t)partial.size(), rows.threads, [&](int64_t task) {
        const int64_t begin = rows.begin(task % rows.parts),
                      end = rows.begin(task % rows.parts + 1);
        const char* row = rows.row(rows.index(task / rows.parts)) + begin * Rows::size(rows.dtype);
        partial[task] = kernels.statistics(row, end - begin, scale);
    });
    for (int64_t k = 0; k < rows.count(); ++k) {
        Statistics total = partial[k * rows.parts];
        for (int part = 1; part < rows.parts; ++part) {
            const Statistics& other = partial[k * rows.parts + part];
            const bool higher = other.peak > total.peak;
            Statistics low = higher ? total : other;
            if (higher) total = other;
            if (low.peak == -INFINITY && low.s == 0) continue;
            const double shift = (double)low.origin - total.origin, alpha = exp2(shift);
            total.u += alpha * (low.u + low.s * shift);
            total.s += alpha * low.s;
        }
        use(rows.index(k), total);
    }
}

// Calls sweep(x, out, columns) on every part of row i.
template <class Sweep> void sweep_row(const Rows& rows, int64_t i, const Sweep& sweep) {
    parallel(rows.parts, rows.threads, [&](int64_t part) {
        const int64_t begin = rows.begin(part), offset = begin * Rows::size(rows.dtype);
        sweep(rows.row(i) + offset, rows.out_row(i) + offset, rows.begin(part + 1) - begin);
    });
}

struct Target {
    float logp, entropy;
};

// Returns log p of the target and the entropy, from the rounded origin that every sweep uses.
// NaN where the origin overflowed, as for a row whose logits all are the lowest number of fp32.
Target target_of(const Statistics& statistics, float x, float scale) {
    if (!(statistics.s > 0) || !std::isfinite(statistics.origin)) return {NAN, NAN};
    const double log2_s = std::log2(statistics.s), y = (double)x * scale - statistics.origin;
    return {(float)((y - log2_s) * LN2), (float)((log2_s - statistics.u / statistics.s) * LN2)};
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void mr1_grpo_rows(const GrpoArguments* a) {
    const Rows rows(a->logits, a->stride, a->out, a->out_stride, a->n, a->v, a->dtype, a->threads);
    const RowKernels& kernels = chosen.rows[a->dtype];
    const float temperature = *a->temperature, scale = (float)(LOG2E / temperature);
    LossSettings settings = a->settings;
    settings.beta = *a->beta;
    for_each_row(rows, scale, [&](int64_t i, const Statistics& statistics) {
        const int64_t target = a->targets[i];
        const Target t = target_of(statistics, rows.logit(i, target), scale);
        const float old_logp = a->old_logp ? a->old_logp[i] : t.logp;
        const TokenLoss token =
            grpo_token(&settings, t.logp, old_logp, a->ref_logp != nullptr,
                       a->ref_logp ? a->ref_logp[i] : 0.0f, a->advantages[i], a->token_weights[i],
                       a->is_weights ? a->is_weights[i] : 1.0f);
        a->loss[i] = token.loss;
        a->logp[i] = t.logp;
        a->entropy[i] = t.entropy;
        a->kl[i] = token.kl;
        a->clipped[i] = token.clipped;
        a->kl_limited[i] = token.kl_limited;
        if (!a->out) return;
        const float coefficient = token.derivative / temperature,
                    factor = -coefficient / (float)statistics.s;
        if (coefficient == 0.0f || !std::isfinite(coefficient)) {
            memset(rows.out_row(i), 0, rows.v * Rows::size(rows.dtype));
            return;
        }
        const float at_target = -coefficient * expm1f(t.logp);
        sweep_row(rows, i, [&](const char* x, char* out, int64_t columns) {
            kernels.gradient(x, out, columns, scale, statistics.origin, factor);
        });
        kernels.set(rows.out_row(i), target, at_target);
    });
}

// `weights` may be null; a row of weight 0 is not read, and all of its results are 0.
void mr1_logprob_rows(const void* logits, int64_t stride, int64_t n, int64_t v, int dtype,
                      const int64_t* targets, const float* temperature, const float* weights,
                      float* logp, float* entropy, float* peak, float* log_sum, int threads) {
    const Rows rows(logits, stride, nullptr, 0, n, v, dtype, threads, weights);
    const float scale = (float)(LOG2E / *temperature);
    if (weights)
        for (float* results : {logp, entropy, peak, log_sum})
            memset(results, 0, n * sizeof(float));
    for_each_row(rows, scale, [&](int64_t i, const Statistics& statistics) {
        const Target t = target_of(statistics, rows.logit(i, targets[i]), scale);
        logp[i] = t.logp;
        entropy[i] = t.entropy;
        peak[i] = statistics.peak;
        // relative to the exact maximum, not to the rounded origin
        log_sum[i] = (float)((std::log2(statistics.s) + statistics.origin -
                              (double)statistics.peak * scale) *
                             LN2);
    });
}

void mr1_logprob_rows_backward(const void* logits, int64_t stride, void* out, int64_t out_stride,
                               int64_t n, int64_t v, int dtype, const int64_t* targets,
                               const float* temperature, const float* entropy, const float* peak,
                               const float* log_sum, const float* grad_logp,
                               const float* grad_entropy, int threads) {
    const Rows rows(logits, stride, out, out_stride, n, v, dtype, threads);
    const RowKernels& kernels = chosen.rows[dtype];
    const float scale = (float)(LOG2E / *temperature);
    const auto row = [&](int64_t i) {
        const bool outside = targets[i] < 0 || targets[i] >= v;
        if (outside || (grad_logp[i] == 0.0f && grad_entropy[i] == 0.0f) ||
            !std::isfinite(log_sum[i])) {
            memset(rows.out_row(i), 0, rows.v * Rows::size(dtype));
            return;
        }
        const float origin = peak[i] * scale;
        // log p = y·ln 2 − log_s; the origin is rounded, log_sum is not
        const double log_s = log_sum[i] - (origin - (double)peak[i] * scale) * LN2;
        const double factor = -exp(-log_s) / *temperature;
        // −p·(grad_logp + grad_entropy·(log p + entropy))/T as 2^y·(constant + slope·y)
        const float slope = (float)(factor * grad_entropy[i] * LN2);
        const float constant =
            (float)(factor * (grad_logp[i] + grad_entropy[i] * (entropy[i] - log_s)));
        const float x = rows.logit(i, targets[i]);
        const double logp = ((double)x * scale - origin) * LN2 - log_s;
        const double by_entropy =
            exp(logp) == 0.0 ? 0.0 : exp(logp) * (logp + entropy[i]) * grad_entropy[i];
        const double at_target = (grad_logp[i] * -expm1(logp) - by_entropy) / *temperature;
        sweep_row(rows, i, [&](const char* in, char* to, int64_t columns) {
            if (slope == 0.0f) kernels.gradient(in, to, columns, scale, origin, constant);
            else kernels.entropy_gradient(in, to, columns, scale, origin, constant, slope);
        });
        kernels.set(rows.out_row(i), targets[i], (float)at_target);
    };
    if (rows.parts > 1) {
        for (int64_t i = 0; i < n; ++i) row(i);
    } else {
        parallel(n, rows.threads, row);
    }
}

void mr1_decode(const DecodeArguments* a) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < a->n; ++i) tokens += a->spans[i][1] + a->spans[i][3];
    // All threads or one: libgomp ends threads that a smaller team leaves out, and torch would
    // start them again.
    const int threads = tokens * a->heads * a->d < PRODUCTS_PER_TEAM ? 1 : (int)a->threads;
    const std::vector<DecodeBlock> blocks = blocks_of(a, threads);
    parallel((int64_t)blocks.size() * a->kv_heads, threads, [&](int64_t task) {
        chosen.decode[a->dtype](a, blocks[task / a->kv_heads], task % a->kv_heads);
    });
}

void mr1_use_openmp(void* function) { gomp_parallel = (GompParallel)function; }

const char* mr1_instruction_set() { return chosen.rows->name; }

// Switches to an instruction set; returns 0 if this machine can run it, else 1.
int mr1_use_instruction_set(const char* name) {
    for (const InstructionSet& set : supported())
        if (!strcmp(set.rows->name, name)) {
            chosen = set;
            return 0;
        }
    return 1;
}

}  // extern "C"
#pragma GCC visibility pop
