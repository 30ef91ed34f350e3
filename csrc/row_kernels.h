// The kernels of one instruction set: sweeps over a row of logits, or over a part of one.
#pragma once
#include <stdint.h>

// With y = x·scale − origin, scale = log2(e)/T:
struct Statistics {
    float peak;    // max x
    // Near max x·scale, but rounded: every sweep over the row must use this very number.
    float origin;
    double s;      // Σ 2^y
    double u;      // Σ 2^y·y
};

struct RowKernels {
    const char* name;
    // Reads the row once.
    struct Statistics (*statistics)(const void* x, int64_t n, float scale);
    // Writes factor·2^y. `out` may be `x`.
    void (*gradient)(const void* x, void* out, int64_t n, float scale, float origin, float factor);
    // Writes 2^y·(constant + slope·y). `out` may be `x`.
    void (*entropy_gradient)(const void* x, void* out, int64_t n, float scale, float origin,
                             float constant, float slope);
    // Read and write a single value, for the target's logit.
    float (*get)(const void* x, int64_t index);
    void (*set)(void* out, int64_t index, float value);
};

enum DType { FP32 = 0, BF16 = 1, FP16 = 2, DTYPES = 3 };
