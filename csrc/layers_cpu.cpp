// RMS norm and gating of rows, compiled once per instruction set. setup.py keeps the compiler from
// fusing multiplications and additions, so that they round as PyTorch's do.
#include "layers.h"
#include "norm.h"
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
        norm_row(x, (const T*)a->weight, (T*)a->out + i * d, d, (float)a->eps);
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
