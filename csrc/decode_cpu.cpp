// Decode attention of some rows and a key head, compiled once per instruction set. setup.py keeps
// the compiler from fusing multiplications and additions, so that norms and the rotation round as
// PyTorch's do.
//
// The query heads of a group are computed together, so that a key or a value is loaded and widened
// once for all of them. The softmax goes online over tiles of tokens, so that no buffer grows with
// the context. Rows that share a prefix take turns at each of its tiles, so that the tile comes from
// memory once; what a row computes, and in which order, is the same as without the others.
#include "decode.h"
#include "norm.h"
#include "row_kernels.h"
#include "simd.h"

#ifndef MR1_ISA
#error "compile with -DMR1_ISA=name"
#endif
#define EXPORT_OF(isa) mr1_decode_kernels_##isa
#define EXPORT(isa) EXPORT_OF(isa)

namespace {

constexpr int MOST_HEADS = WIDTH == 16 ? 8 : 4;  // query heads whose sums fit in registers
constexpr int TILE = DECODE_TILE;
constexpr int AHEAD = 16;                        // tokens
constexpr float LOG2E = 1.44269504f;
constexpr float NEGLIGIBLE = -120.0f;  // 2^−120 vanishes beside 1; subnormals take a hundred cycles

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

// Rotates a head after its norm, if it has a weight.
template <class T>
void prepare(const DecodeArguments* a, const T* head, const T* weight, int64_t row, T* out) {
    T normed[DECODE_MAX_D];
    if (weight) {
        norm_row(head, weight, normed, a->d, (float)a->eps);
        head = normed;
    }
    rotate(head, (const T*)a->cos + row * a->d, (const T*)a->sin + row * a->d, out, a->d);
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

// What the rows of a call have in common, for one key head.
template <class T> struct Pool {
    T *keys, *values;
    int64_t stride, d;
    float scale;
};

// Some of a row's tokens, by their offsets in the pool.
struct Tile {
    int64_t offsets[TILE];
    int n;

    // The span's tokens from `start` on.
    Tile(const int32_t* span, int64_t start, int64_t stride) {
        const int64_t prefix = span[1], left = prefix + span[3] - start;
        n = (int)(left < TILE ? left : TILE);
        for (int j = 0; j < n; ++j) {
            const int64_t token = start + j;
            offsets[j] = stride * (token < prefix ? span[0] + token : span[2] + token - prefix);
        }
    }
};

// Prefetches of keys or values further on, as a pool is too big for L2. Past the end of a span what
// they fetch is not needed, which does no harm. They are inlined, as compilers drop calls of a
// function that does nothing else.
#define INLINE __attribute__((always_inline)) inline

template <class T> INLINE void fetch(const T* p, int64_t count) {
    for (int64_t bytes = 0; bytes < count * (int64_t)sizeof(T); bytes += 64)
        __builtin_prefetch((const char*)p + bytes);
}

// At each token of a row by itself.
struct FromRow {
    template <class T> INLINE void operator()(const T* p, int, int64_t stride, int64_t n) const {
        fetch(p + AHEAD * stride, n);
    }
};

// From the next of the tiles that rows share; at each token it is the turn of one of them.
struct FromTile {
    unsigned turns = 0;  // of eight tokens

    FromTile(int rows, int row) {
        for (int j = 0; j < 8; ++j) turns |= (unsigned)(j * rows / 8 == row) << j;
    }
    template <class T> INLINE void operator()(const T* p, int j, int64_t stride, int64_t n) const {
        if (turns >> j % 8u & 1) fetch(p + TILE * stride, n);
    }
};

// Some heads of a row, after some of its tokens.
template <int HEADS> struct Heads {
    // The rotated query, and Σ weight·value, both in `load_head`'s order.
    float q[HEADS][DECODE_MAX_D], sum[HEADS][DECODE_MAX_D];
    Floats weights[HEADS];      // Σ weight, by lane
    float peak[HEADS];          // of the scores
    float scores[HEADS][TILE];  // of a tile; then its weights
};

template <class T, int HEADS, class Prefetch>
inline void score(Heads<HEADS>& g, const Pool<T>& pool, const Tile& tile,
                  const Prefetch& prefetch) {
    const int64_t d = pool.d;
    for (int j = 0; j < tile.n; j += WIDTH) {
        Floats dots[HEADS][WIDTH];
        for (int i = 0; i < WIDTH; ++i) {
            Floats dot[HEADS];
            for (int h = 0; h < HEADS; ++h) dot[h] = all(0.0f);
            if (j + i < tile.n) {
                const T* key = pool.keys + tile.offsets[j + i];
                prefetch(key, j + i, pool.stride, d);
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
            store(g.scores[h] + j, multiply(sums(dots[h]), all(pool.scale)));
            for (int i = tile.n; i < j + WIDTH; ++i) g.scores[h][i] = -INFINITY;
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
template <int VECTORS, class T, int HEADS, class Prefetch>
inline void add_values(Heads<HEADS>& g, const Pool<T>& pool, const Tile& tile,
                       const Prefetch& prefetch, int64_t c) {
    Floats sum[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h)
        for (int k = 0; k < VECTORS; ++k) sum[h][k] = load(g.sum[h] + c + k * WIDTH);
    for (int j = 0; j < tile.n; ++j) {
        const T* row = pool.values + tile.offsets[j] + c;
        Floats value[VECTORS];
        prefetch(row, j, pool.stride, VECTORS * WIDTH);
        if (VECTORS == 1) value[0] = load_up_to(row, pool.d - c, 0.0f);
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

template <class T, int HEADS, class Prefetch>
inline void add_tile(Heads<HEADS>& g, const Pool<T>& pool, const Tile& tile,
                     const Prefetch& prefetch) {
    const int64_t d = pool.d;
    for (int h = 0; h < HEADS; ++h)
        soften(g.scores[h], tile.n, g.peak[h], g.weights[h], g.sum[h], d);
    constexpr int MANY = HEADS > 2 ? 2 : 4;
    int64_t c = 0;
    for (; c + MANY * WIDTH <= d; c += MANY * WIDTH)
        add_values<MANY>(g, pool, tile, prefetch, c);
    for (; c + 2 * WIDTH <= d; c += 2 * WIDTH) add_values<2>(g, pool, tile, prefetch, c);
    for (; c < d; c += WIDTH) add_values<1>(g, pool, tile, prefetch, c);
}

template <class T, int HEADS>
void begin(Heads<HEADS>& g, const DecodeArguments* a, int64_t row, int64_t head) {
    const int64_t d = a->d;
    const T* q = (const T*)a->q + row * a->q_stride + head * d;
    for (int h = 0; h < HEADS; ++h) {
        T rotated[DECODE_MAX_D];
        prepare(a, q + h * d, (const T*)a->q_norm, row, rotated);
        load_head(rotated, d, g.q[h]);
        for (int64_t c = 0; c < d; c += WIDTH) store(g.sum[h] + c, all(0.0f));
        g.weights[h] = all(0.0f);
        g.peak[h] = -INFINITY;
    }
}

// Attends with HEADS query heads, from `head` on, of each row of a block of at most ROWS rows. A row
// by itself has a function of its own, in which all is inlined.
template <class T, int HEADS, int ROWS>
void attend_heads(const DecodeArguments* a, const DecodeBlock& block, const Pool<T>& pool,
                  int64_t head) {
    Heads<HEADS> g[ROWS];
    const int32_t(*spans)[4] = a->spans + block.first;
    const int rows = ROWS > 1 ? block.rows : 1;
    for (int r = 0; r < rows; ++r) begin<T>(g[r], a, block.first + r, head);

    // Only whole tiles of the prefix are shared, so that the tiles are those of a row by itself.
    int64_t shared = 0;
    if constexpr (ROWS > 1) {
        shared = spans[0][1] / TILE * TILE;
        for (int64_t start = 0; start < shared; start += TILE) {
            const Tile tile(spans[0], start, pool.stride);
            for (int r = 0; r < rows; ++r) score(g[r], pool, tile, FromTile(rows, r));
            for (int r = 0; r < rows; ++r) add_tile(g[r], pool, tile, FromTile(rows, r));
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int64_t start = shared; start < spans[r][1] + (int64_t)spans[r][3]; start += TILE) {
            const Tile tile(spans[r], start, pool.stride);
            score(g[r], pool, tile, FromRow());
            add_tile(g[r], pool, tile, FromRow());
        }
        T* out = (T*)a->out + ((block.first + r) * a->heads + head) * a->d;
        for (int h = 0; h < HEADS; ++h)
            store_head(out + h * a->d, a->d, g[r].sum[h], all((float)(1.0 / sum(g[r].weights[h]))));
    }
}

// Calls attend_heads<T, heads>, where `heads` is at most HEADS.
template <class T, int HEADS>
inline void attend_up_to(int64_t heads, const DecodeArguments* a, const DecodeBlock& block,
                         const Pool<T>& pool, int64_t head) {
    if constexpr (HEADS > 1)
        if (heads < HEADS) return attend_up_to<T, HEADS - 1>(heads, a, block, pool, head);
    if (block.rows == 1) return attend_heads<T, HEADS, 1>(a, block, pool, head);
    attend_heads<T, HEADS, DECODE_MAX_ROWS>(a, block, pool, head);
}

template <class T>
void attend(const DecodeArguments* a, const DecodeBlock& block, int64_t kv_head) {
    const int64_t d = a->d, group = a->heads / a->kv_heads, stride = a->kv_heads * d;
    const Pool<T> pool = {(T*)a->keys + kv_head * d, (T*)a->values + kv_head * d, stride, d,
                          (float)a->scale};
    for (int64_t row = block.first; row < block.first + block.rows; ++row) {
        const int64_t last = stride * ((int64_t)a->spans[row][2] + a->spans[row][3] - 1);
        const T* k = (const T*)a->k + row * a->k_stride + kv_head * d;
        prepare(a, k, (const T*)a->k_norm, row, pool.keys + last);
        memcpy(pool.values + last, (const T*)a->v + row * a->v_stride + kv_head * d,
               d * sizeof(T));
    }
    for (int64_t h = 0; h < group; h += MOST_HEADS)
        attend_up_to<T, MOST_HEADS>(group - h, a, block, pool, kv_head * group + h);
}

}  // namespace

extern const DecodeKernel EXPORT(MR1_ISA)[DTYPES];
const DecodeKernel EXPORT(MR1_ISA)[DTYPES] = {attend<float>, attend<bf16>, attend<fp16>};
