// RMS norm and gating of rows, compiled once per instruction set. setup.py keeps the compiler from
// fusing multiplications and additions, so that they round as PyTorch's do.
#include "layers.h"
#include "row_kernels.h"
#include "simd.h"

#ifndef MR1_ISA
#error "compile with -DMR1_ISA=name"
#endif
#define EXPORT_OF(isa) mr1_layer_kernels_##isa
#define EXPORT(isa) EXPORT_OF(isa)

namespace {

constexpr float LOG2E = 1.44269504f;

// --- norms ---------------------------------------------------------------------------------------

// PyTorch adds up a row on x86 in CHAINS chains of LANES lanes. Every STEP sums, a chain joins that
// of the next level and starts again. In this order the norm has the same bits as PyTorch's, and on
// every instruction set.
constexpr int CHAINS = 4, LANES = 8, PARTIAL = CHAINS * LANES, VECTORS = PARTIAL / WIDTH;
constexpr int LEVELS = 4, LEVEL_BITS = 4, STEP = 1 << LEVEL_BITS;

struct PartialSums {
    Floats of[VECTORS];  // chain after chain
};

template <class T> inline void add_squares(PartialSums& sums, const T* x) {
    for (int k = 0; k < VECTORS; ++k) {
        const Floats value = load(x + k * WIDTH);
        sums.of[k] = add(sums.of[k], multiply(value, value));
    }
}
inline void add_sums(PartialSums& sums, const PartialSums& others) {
    for (int k = 0; k < VECTORS; ++k) sums.of[k] = add(sums.of[k], others.of[k]);
}

template <class T> float sum_of_squares(const T* x, int64_t d) {
    PartialSums none, levels[LEVELS];
    for (int k = 0; k < VECTORS; ++k) none.of[k] = all(0.0f);
    for (PartialSums& level : levels) level = none;
    const int64_t whole = d / PARTIAL;
    int64_t i = 0;
    while (i + STEP <= whole) {
        PartialSums sums = levels[0];
        for (int j = 0; j < STEP; ++j, ++i) add_squares(sums, x + i * PARTIAL);
        levels[0] = sums;
        for (int level = 1; level < LEVELS; ++level) {
            add_sums(levels[level], levels[level - 1]);
            levels[level - 1] = none;
            if (i & (int64_t)(STEP - 1) << level * LEVEL_BITS) break;
        }
    }
    PartialSums sums = levels[0];
    for (; i < whole; ++i) add_squares(sums, x + i * PARTIAL);
    for (int level = 1; level < LEVELS; ++level) add_sums(sums, levels[level]);

    float lanes[PARTIAL], total = 0.0f;
    for (int k = 0; k < VECTORS; ++k) store(lanes + k * WIDTH, sums.of[k]);
    // What is left goes to the first chain, and to the total where it does not fill the lanes.
    const auto square = [=](int64_t c) {
        const float value = to_float(x[c]);
        return value * value;
    };
    int64_t c = whole * PARTIAL;
    for (; c + LANES <= d; c += LANES)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += square(c + lane);
    for (int chain = 1; chain < CHAINS; ++chain)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += lanes[chain * LANES + lane];
    for (; c < d; ++c) total += square(c);
    for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

template <class T>
void scale_row(const T* x, const T* weight, T* out, int64_t d, float inverse_rms) {
    const Floats factor = all(inverse_rms);
    for (int64_t c = 0; c < d; c += WIDTH) {
        const Floats normed = rounded<T>(multiply(load_up_to(x + c, d - c, 0.0f), factor));
        store_up_to(out + c, d - c, multiply(normed, load_up_to(weight + c, d - c, 0.0f)));
    }
}

// Adds an update to a row of x.
template <class T> void add_row(const T* x, const T* update, T* residual, int64_t d) {
    for (int64_t c = 0; c < d; c += WIDTH) {
        const auto part = [=](const T* p) { return load_up_to(p + c, d - c, 0.0f); };
        store_up_to(residual + c, d - c, add(part(x), part(update)));
    }
}

template <class T> void norm(const NormArguments* a, int64_t begin, int64_t end) {
    const int64_t d = a->d;
    for (int64_t i = begin; i < end; ++i) {
        const T* x = (const T*)a->x + i * a->x_stride;
        if (a->update) {
            T* residual = (T*)a->residual + i * d;
            add_row(x, (const T*)a->update + i * a->update_stride, residual, d);
            x = residual;
        }
        const float mean = sum_of_squares(x, d) / (float)d;
        scale_row(x, (const T*)a->weight, (T*)a->out + i * d, d,
                  1.0f / sqrtf(mean + (float)a->eps));
    }
}

// --- gating --------------------------------------------------------------------------------------

// Computes x / (1 + e^−x). The exponential is the square of 2^y, so that it reaches infinity with y
// in the range of `power_of_two`; below 2^−124 it vanishes beside 1.
inline Floats silu(Floats x) {
    const Floats minus_y = larger(all(-100.0f), multiply(x, all(0.5f * LOG2E))),
                 y = larger(all(-62.0f), multiply(minus_y, all(-1.0f))),
                 root = power_of_two<5>(y);
    return divide(x, add(multiply(root, root), all(1.0f)));
}

template <class T> void gate(const GateArguments* a, int64_t begin, int64_t end) {
    const int64_t f = a->f;
    const T* bias = (const T*)a->bias;
    for (int64_t i = begin; i < end; ++i) {
        const T* row = (const T*)a->gate_up + i * a->stride;
        T* out = (T*)a->out + i * f;
        for (int64_t c = 0; c < f; c += WIDTH) {
            Floats gate = load_up_to(row + c, f - c, 0.0f),
                   up = load_up_to(row + f + c, f - c, 0.0f);
            if (bias) {
                gate = rounded<T>(add(gate, load_up_to(bias + c, f - c, 0.0f)));
                up = rounded<T>(add(up, load_up_to(bias + f + c, f - c, 0.0f)));
            }
            store_up_to(out + c, f - c, multiply(rounded<T>(silu(gate)), up));
        }
    }
}

template <class T> constexpr LayerKernels kernels() { return {norm<T>, gate<T>}; }

}  // namespace

extern const LayerKernels EXPORT(MR1_ISA)[DTYPES];
const LayerKernels EXPORT(MR1_ISA)[DTYPES] = {kernels<float>(), kernels<bf16>(), kernels<fp16>()};
