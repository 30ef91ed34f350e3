// Operations on the rows of a layer and on a row of logits (layers_cpu.cpp, sample_cpu.cpp).
#pragma once
#include <stdint.h>

// These three are packed in mr1_fast/kernels/, in layers/layers_native.py and
// decode/sample_native.py, in this order. Strides are in elements.

struct NormArguments {
    const void *x, *update, *weight;  // (n, d); (n, d) or null; (d,)
    void *residual, *out;             // (n, d) twice; null without an update
    int64_t x_stride, update_stride, n, d, dtype, threads;
    double eps;
};

struct GateArguments {
    const void *gate_up, *bias;  // (n, 2f), (2f,) or null
    void* out;                   // (n, f)
    int64_t stride, n, f, dtype, threads;
};

struct SampleArguments {
    const void* logits;     // (n, v)
    const float* uniform;   // (n,)
    const int64_t* banned;  // (banned_count,), each once
    int64_t* tokens;        // (n,)
    float* logp;            // (n,)
    int64_t stride, n, v, banned_count, dtype, threads;
    double temperature;
};

// The kernels of one instruction set and dtype. Each computes the rows begin, …, end − 1.
struct LayerKernels {
    void (*norm)(const NormArguments* a, int64_t begin, int64_t end);
    void (*gate)(const GateArguments* a, int64_t begin, int64_t end);
};
// `sums` has room for a number per SAMPLE_GROUP tokens, or a part of as many.
typedef void (*SampleKernel)(const SampleArguments* a, double* sums, int64_t begin, int64_t end);

enum { SAMPLE_GROUP = 256 };
