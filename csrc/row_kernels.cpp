// The sweeps over a row, compiled once per instruction set (setup.py): each object exports
// RowKernels for three dtypes.
//
// A row is read from memory once; the gradient sweep finds it in L2 (152,064 fp32 logits are 608
// KB).
#include <float.h>

#include "row_kernels.h"
#include "simd.h"

#ifndef MR1_ISA
#error "compile with -DMR1_ISA=name"
#endif
#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
#define EXPORT_OF(isa) mr1_row_kernels_##isa
#define EXPORT(isa) EXPORT_OF(isa)

namespace {

constexpr int UNROLL = WIDTH == 16 ? 4 : 2;  // independent chains; AVX2 has registers for two
// Elements whose sums stay in fp32 lanes before they join the row's double.
constexpr int64_t BLOCK = 256 * WIDTH;
constexpr int AHEAD = 4096;                  // bytes
// More would cost the entropy digits, as both terms of log s − u/s would grow.
constexpr float HEADROOM = 1.0f;

template <class T> constexpr int degree();
template <> constexpr int degree<float>() { return 5; }
template <> constexpr int degree<bf16>() { return 3; }
template <> constexpr int degree<fp16>() { return 4; }

// The arithmetic between two loads is too long for the processor to see far enough ahead by itself.
template <class T> inline void prefetch(const T* p) {
    for (int bytes = 0; bytes < (int)(UNROLL * WIDTH * sizeof(T)); bytes += 64)
        __builtin_prefetch((const char*)p + AHEAD + bytes);
}

// Returns y = x·scale − origin, never below SMALLEST; NaN stays.
inline Floats shifted(Floats x, Floats scale, Floats minus_origin) {
    return larger(all(SMALLEST), multiply_add(x, scale, minus_origin));
}

template <class T> inline float maximum(const T* x, int64_t n) {
    Floats best = all(-INFINITY);
    for (int64_t i = 0; i < n; i += WIDTH)
        best = larger(load_up_to(x + i, n - i), best);  // NaN is dropped here
    return largest(best);
}

// Adds Σ 2^y and Σ 2^y·y of a block to s and u; returns its maximum.
template <class T>
inline float add_block(const T* x, int64_t n, float scale, float origin, double* s, double* u) {
    const Floats scales = all(scale), shift = all(-origin);
    Floats ss[UNROLL], us[UNROLL], best[UNROLL];
    for (int k = 0; k < UNROLL; ++k) {
        ss[k] = us[k] = all(0.0f);
        best[k] = all(-INFINITY);
    }
    int64_t i = 0;
    for (; i + UNROLL * WIDTH <= n; i += UNROLL * WIDTH) {
        Floats values[UNROLL];
        prefetch(x + i);
        for (int k = 0; k < UNROLL; k += 2)
            load_pair(x + i + k * WIDTH, &values[k], &values[k + 1]);
        for (int k = 0; k < UNROLL; ++k) {
            best[k] = larger(values[k], best[k]);
            const Floats y = shifted(values[k], scales, shift), p = power_of_two<5>(y);
            ss[k] = add(ss[k], p);
            us[k] = multiply_add(p, y, us[k]);
        }
    }
    for (; i < n; i += WIDTH) {
        const Floats value = load_up_to(x + i, n - i), y = shifted(value, scales, shift),
                     p = power_of_two<5>(y);
        best[0] = larger(value, best[0]);
        ss[0] = add(ss[0], p);
        us[0] = multiply_add(p, y, us[0]);
    }
    for (int k = 0; k < UNROLL; ++k) {
        *s += sum(ss[k]);
        *u += sum(us[k]);
        best[0] = larger(best[k], best[0]);
    }
    return largest(best[0]);
}

// Finite for logits of −FLT_MAX, which often stands for a mask.
inline float origin_of(float peak, float scale) {
    return fmaxf(peak * scale, -FLT_MAX);
}

// The origin need only be near the maximum. So a block is read for its sums and its maximum at
// once, and read again if its maximum is more than HEADROOM (in powers of two) above the origin so
// far, which happens a few times in a row.
template <class T> Statistics statistics(const void* row, int64_t n, float scale) {
    const T* x = (const T*)row;
    Statistics result = {maximum(x, n < BLOCK ? n : BLOCK), 0.0f, 0.0, 0.0};
    if (result.peak > -INFINITY) result.origin = origin_of(result.peak, scale);
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
        double s = result.s, u = result.u;
        const float peak = add_block(x + begin, count, scale, result.origin, &s, &u);
        if (peak > -INFINITY &&
            (result.peak == -INFINITY || peak * scale - result.origin > HEADROOM)) {
            const float origin = origin_of(peak, scale);
            const double shift = (double)result.origin - origin, alpha = exp2(shift);
            u = alpha > 0 ? alpha * (result.u + result.s * shift) : 0.0;
            s = alpha * result.s;
            result.origin = origin;
            add_block(x + begin, count, scale, origin, &s, &u);
        }
        if (peak > result.peak) result.peak = peak;
        result.s = s;
        result.u = u;
    }
    return result;
}

template <class T>
void gradient(const void* row, void* out_row, int64_t n, float scale, float origin, float factor) {
    const T* x = (const T*)row;
    T* out = (T*)out_row;
    const Floats scales = all(scale), shift = all(-origin), factors = all(factor);
    int64_t i = 0;
    for (; i + UNROLL * WIDTH <= n; i += UNROLL * WIDTH) {
        Floats p[UNROLL];
        for (int k = 0; k < UNROLL; k += 2) load_pair(x + i + k * WIDTH, &p[k], &p[k + 1]);
        for (int k = 0; k < UNROLL; ++k)
            p[k] = multiply(factors, power_of_two<degree<T>()>(shifted(p[k], scales, shift)));
        for (int k = 0; k < UNROLL; k += 2) store_pair(out + i + k * WIDTH, p[k], p[k + 1]);
    }
    for (; i < n; i += WIDTH) {
        const Floats y = shifted(load_up_to(x + i, n - i), scales, shift);
        store_up_to(out + i, n - i, multiply(factors, power_of_two<degree<T>()>(y)));
    }
}

template <class T>
void entropy_gradient(const void* row, void* out_row, int64_t n, float scale, float origin,
                      float constant, float slope) {
    const T* x = (const T*)row;
    T* out = (T*)out_row;
    const Floats scales = all(scale), shift = all(-origin);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const Floats y = shifted(load_up_to(x + i, n - i), scales, shift);
        store_up_to(
            out + i, n - i,
            multiply(power_of_two<degree<T>()>(y), multiply_add(y, all(slope), all(constant))));
    }
}

template <class T>
float get(const void* x, int64_t index) {
    return to_float(((const T*)x)[index]);
}
template <class T>
void set(void* out, int64_t index, float value) {
    from_float((T*)out + index, value);
}

template <class T> constexpr RowKernels kernels() {
    return {NAME(MR1_ISA), statistics<T>, gradient<T>, entropy_gradient<T>, get<T>, set<T>};
}

}  // namespace

extern const RowKernels EXPORT(MR1_ISA)[DTYPES];
const RowKernels EXPORT(MR1_ISA)[DTYPES] = {kernels<float>(), kernels<bf16>(), kernels<fp16>()};
