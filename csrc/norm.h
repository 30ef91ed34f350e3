// The RMS norm of a row, for the instruction set that a file is compiled for. Such a file must keep
// the compiler from fusing multiplications and additions, so that they round as PyTorch's do.
#pragma once
#include "simd.h"

namespace {

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

// Norms a row over its d elements, and multiplies it with the weight. `out` may be `x`.
template <class T> void norm_row(const T* x, const T* weight, T* out, int64_t d, float eps) {
    const float mean = sum_of_squares(x, d) / (float)d;
    scale_row(x, weight, out, d, 1.0f / sqrtf(mean + eps));
}

}  // namespace
