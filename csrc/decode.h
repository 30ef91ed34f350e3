// Decode attention: one new token in each of n rows, in one layer (decode_cpu.cpp).
#pragma once
#include <stdint.h>

// Packed in mr1_fast/kernels/decode/attention_native.py, in this order. Strides are a row's, in
// elements.
struct DecodeArguments {
    const void *q, *k, *v;        // (n, heads, d), (n, kv_heads, d) twice; not normed or rotated
    const void *cos, *sin;        // (n, d)
    const void *q_norm, *k_norm;  // (d,), weights of the norms of heads; null without norms
    void *keys, *values, *out;    // (tokens, kv_heads, d) twice; (n, heads, d)
    // Start and length of the prefix; start and length of the row's own tokens.
    const int32_t (*spans)[4];
    int64_t q_stride, k_stride, v_stride, n, heads, kv_heads, d;
    int64_t dtype, threads;
    double scale, eps;
};

enum { DECODE_MAX_D = 256, DECODE_MAX_ROWS = 8 };
enum { DECODE_TILE = 64 };  // tokens whose keys and values stay in L2

// Neighbouring rows that have the same prefix, at most DECODE_MAX_ROWS.
struct DecodeBlock {
    int64_t first;
    int rows;
};

// Computes a block of rows and one of their key heads, with the query heads that share it.
typedef void (*DecodeKernel)(const DecodeArguments* a, const DecodeBlock& block, int64_t kv_head);
