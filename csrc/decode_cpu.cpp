// Decode attention of a row and a key head, compiled once per instruction set. setup.py keeps the
// compiler from fusing multiplications and additions, so that the rotation rounds as PyTorch's
// does.
//
// The query heads of a group are computed together, so that a key or a value is loaded and widened
// once for all of them. The softmax goes online over tiles of tokens, so that no buffer grows with
// the context.
#include "decode.h"
#include "row_kernels.h"
#include "simd.h"

#ifndef MR1_ISA
#error "compile with -DMR1_ISA=name"
#endif
#define EXPORT_OF(isa) mr1_decode_kernels_##isa
#define EXPORT(isa) EXPORT_OF(isa)

namespace {

constexpr int MOST_HEADS = WIDTH == 16 ? 8 : 4;  // query heads whose sums fit in registers
constexpr int TILE = 64;                         // tokens whose keys and values stay in L1
constexpr int AHEAD = 16;                        // tokens
constexpr float LOG2E = 1.44269504f;
constexpr float NEGLIGIBLE = -120.0f;  // 2^−120 vanishes beside 1; subnormals take a hundred cycles

template <class T> inline Floats rounded(Floats x) {
    T in_dtype[WIDTH];
    store(in_dtype, x);
    return load(in_dtype);
}

// Computes x·cos + cat(−x2, x1)·sin, where x1 and x2 are the halves of x; every operation rounds to
// T, as PyTorch's.
template <class T> void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t count = half - i;
        const auto part = [=](const T* p) { return load_up_to(p + i, count, 0.0f); };
        const auto product = [](Floats a, Floats b) { return rounded<T>(multiply(a, b)); };
        const Floats x1 = part(x), x2 = part(x + half), minus_x2 = multiply(x2, all(-1.0f));
        store_up_to(out + i, count, add(product(x1, part(cos)), product(minus_x2, part(sin))));
        store_up_to(out + half + i, count,
                    add(product(x2, part(cos + half)), product(x1, part(sin + half))));
    }
}

// Loads the columns of a head as vectors, of which pairs are in `load_pair`'s order; columns beyond
// d are 0.
template <class T> void load_head(const T* p, int64_t d, float* out) {
    int64_t c = 0;
    for (; c + 2 * WIDTH <= d; c += 2 * WIDTH) {
        Floats a, b;
        load_pair(p + c, &a, &b);
        store(out + c, a);
        store(out + c + WIDTH, b);
    }
    for (; c < d; c += WIDTH) store(out + c, load_up_to(p + c, d - c, 0.0f));
}
template <class T> void store_head(T* p, int64_t d, const float* x, Floats factor) {
    int64_t c = 0;
    for (; c + 2 * WIDTH <= d; c += 2 * WIDTH)
        store_pair(p + c, multiply(load(x + c), factor), multiply(load(x + c + WIDTH), factor));
    for (; c < d; c += WIDTH) store_up_to(p + c, d - c, multiply(load(x + c), factor));
}

// A row's view of one key head.
template <class T> struct Context {
    T *keys, *values;
    const T *cos, *sin;
    int64_t prefix_start, prefix, own_start, tokens, stride, d;
    float scale;

    int64_t offset(int64_t j) const {
        return stride * (j < prefix ? prefix_start + j : own_start + j - prefix);
    }
};

// Prefetches the row AHEAD tokens further on, as a pool is too big for L2. Past the end of a span,
// that row is not needed, which does no harm.
template <class T> inline void prefetch(const T* row, int64_t stride, int64_t count) {
    const char* p = (const char*)(row + AHEAD * stride);
    for (int64_t bytes = 0; bytes < count * (int64_t)sizeof(T); bytes += 64)
        __builtin_prefetch(p + bytes);
}

// Some heads of a group, after some of the tokens.
template <int HEADS> struct Heads {
    // The rotated query, and Σ weight·value, both in `load_head`'s order.
    float q[HEADS][DECODE_MAX_D], sum[HEADS][DECODE_MAX_D];
    Floats weights[HEADS];      // Σ weight, by lane
    float peak[HEADS];          // of the scores
    float scores[HEADS][TILE];  // of a tile; then its weights
};

template <class T, int HEADS>
inline void score(Heads<HEADS>& g, const Context<T>& context, const int64_t* rows, int n) {
    const int64_t d = context.d;
    for (int j = 0; j < n; j += WIDTH) {
        Floats dots[HEADS][WIDTH];
        for (int i = 0; i < WIDTH; ++i) {
            Floats dot[HEADS];
            for (int h = 0; h < HEADS; ++h) dot[h] = all(0.0f);
            if (j + i < n) {
                const T* key = context.keys + rows[j + i];
                prefetch(key, context.stride, d);
                int64_t c = 0;
                for (; c + 2 * WIDTH <= d; c += 2 * WIDTH) {
                    Floats a, b;
                    load_pair(key + c, &a, &b);
                    for (int h = 0; h < HEADS; ++h) {
                        dot[h] = multiply_add(a, load(g.q[h] + c), dot[h]);
                        dot[h] = multiply_add(b, load(g.q[h] + c + WIDTH), dot[h]);
                    }
                }
                for (; c < d; c += WIDTH) {
                    const Floats a = load_up_to(key + c, d - c, 0.0f);
                    for (int h = 0; h < HEADS; ++h)
                        dot[h] = multiply_add(a, load(g.q[h] + c), dot[h]);
                }
            }
            for (int h = 0; h < HEADS; ++h) dots[h][i] = dot[h];
        }
        for (int h = 0; h < HEADS; ++h) {
            store(g.scores[h] + j, multiply(sums(dots[h]), all(context.scale)));
            for (int i = n; i < j + WIDTH; ++i) g.scores[h][i] = -INFINITY;
        }
    }
}

// Turns scores into weights, relative to the highest score so far; sums from earlier tiles are
// scaled to it.
void soften(float* scores, int n, float& peak, Floats& weights, float* sum, int64_t d) {
    const auto exponential = [](Floats x) {
        return power_of_two<5>(larger(all(NEGLIGIBLE), multiply(x, all(LOG2E))));
    };
    Floats best = all(-INFINITY);
    for (int j = 0; j < n; j += WIDTH)
        best = larger(load(scores + j), best);  // NaN is dropped here
    const float highest = largest(best);
    if (highest > peak) {
        if (peak > -INFINITY) {
            const Floats shrink = exponential(all(peak - highest));
            weights = multiply(weights, shrink);
            for (int64_t c = 0; c < d; c += WIDTH) store(sum + c, multiply(load(sum + c), shrink));
        }
        peak = highest;
    }
    for (int j = 0; j < n; j += WIDTH) {
        const Floats weight = exponential(add(load(scores + j), all(-peak)));
        weights = add(weights, weight);
        store(scores + j, weight);
    }
}

// Adds weights · values to the sums, in VECTORS vectors of columns from c on: pairs, or a last one,
// which may be short.
template <int VECTORS, class T, int HEADS>
inline void add_values(Heads<HEADS>& g, const Context<T>& context, const int64_t* rows, int n,
                       int64_t c) {
    Floats sum[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h)
        for (int k = 0; k < VECTORS; ++k) sum[h][k] = load(g.sum[h] + c + k * WIDTH);
    for (int j = 0; j < n; ++j) {
        const T* row = context.values + rows[j] + c;
        Floats value[VECTORS];
        prefetch(row, context.stride, VECTORS * WIDTH);
        if (VECTORS == 1) value[0] = load_up_to(row, context.d - c, 0.0f);
        for (int k = 0; k + 1 < VECTORS; k += 2)
            load_pair(row + k * WIDTH, &value[k], &value[k + 1]);
        for (int h = 0; h < HEADS; ++h) {
            const Floats weight = all(g.scores[h][j]);
            for (int k = 0; k < VECTORS; ++k) sum[h][k] = multiply_add(weight, value[k], sum[h][k]);
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int k = 0; k < VECTORS; ++k) store(g.sum[h] + c + k * WIDTH, sum[h][k]);
}

template <class T, int HEADS> void attend_heads(const Context<T>& context, const T* q, T* out) {
    const int64_t d = context.d;
    Heads<HEADS> g;
    for (int h = 0; h < HEADS; ++h) {
        T rotated[DECODE_MAX_D];
        rotate(q + h * d, context.cos, context.sin, rotated, d);
        load_head(rotated, d, g.q[h]);
        for (int64_t c = 0; c < d; c += WIDTH) store(g.sum[h] + c, all(0.0f));
        g.weights[h] = all(0.0f);
        g.peak[h] = -INFINITY;
    }
    for (int64_t start = 0; start < context.tokens; start += TILE) {
        const int n = (int)(context.tokens - start < TILE ? context.tokens - start : TILE);
        int64_t rows[TILE];
        for (int j = 0; j < n; ++j) rows[j] = context.offset(start + j);
        score(g, context, rows, n);
        for (int h = 0; h < HEADS; ++h)
            soften(g.scores[h], n, g.peak[h], g.weights[h], g.sum[h], d);
        constexpr int MANY = HEADS > 2 ? 2 : 4;
        int64_t c = 0;
        for (; c + MANY * WIDTH <= d; c += MANY * WIDTH) add_values<MANY>(g, context, rows, n, c);
        for (; c + 2 * WIDTH <= d; c += 2 * WIDTH) add_values<2>(g, context, rows, n, c);
        for (; c < d; c += WIDTH) add_values<1>(g, context, rows, n, c);
    }
    for (int h = 0; h < HEADS; ++h)
        store_head(out + h * d, d, g.sum[h], all((float)(1.0 / sum(g.weights[h]))));
}

// Calls attend_heads<T, heads>, where `heads` is at most HEADS.
template <class T, int HEADS>
inline void attend_up_to(int64_t heads, const Context<T>& context, const T* q, T* out) {
    if constexpr (HEADS > 1)
        if (heads < HEADS) return attend_up_to<T, HEADS - 1>(heads, context, q, out);
    attend_heads<T, HEADS>(context, q, out);
}

template <class T> void attend(const DecodeArguments* a, int64_t row, int64_t kv_head) {
    const int64_t d = a->d, group = a->heads / a->kv_heads;
    const int32_t* span = a->spans[row];
    const Context<T> context = {(T*)a->keys + kv_head * d,
                                (T*)a->values + kv_head * d,
                                (const T*)a->cos + row * d,
                                (const T*)a->sin + row * d,
                                span[0],
                                span[1],
                                span[2],
                                span[1] + (int64_t)span[3],
                                a->kv_heads * d,
                                d,
                                (float)a->scale};
    const int64_t last = context.offset(context.tokens - 1);
    rotate((const T*)a->k + row * a->k_stride + kv_head * d, context.cos, context.sin,
           context.keys + last, d);
    memcpy(context.values + last, (const T*)a->v + row * a->v_stride + kv_head * d, d * sizeof(T));
    const T* q = (const T*)a->q + row * a->q_stride + kv_head * group * d;
    T* out = (T*)a->out + (row * a->heads + kv_head * group) * d;
    for (int64_t h = 0; h < group; h += MOST_HEADS)
        attend_up_to<T, MOST_HEADS>(group - h, context, q + h * d, out + h * d);
}

}  // namespace

extern const DecodeKernel EXPORT(MR1_ISA)[DTYPES];
const DecodeKernel EXPORT(MR1_ISA)[DTYPES] = {attend<float>, attend<bf16>, attend<fp16>};
