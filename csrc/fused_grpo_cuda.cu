// The fused GRPO loss on CUDA, an alternative to the Triton kernel; benchmarks/bench_grpo_loss.py
// decides which is the default on an architecture.
//
// On Hopper, a cluster of thread blocks holds a whole row in shared memory (4 × 76 KB for 152,064
// bf16 logits), reduces through distributed shared memory, and writes the gradient from there:
// device memory sees one read and one write, whatever L2 holds. Elsewhere, two kernels go over
// groups of rows that fit in L2, and a row is split over blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "grpo_token.h"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr float FAR = -1e30f;  // a shift whose power is 0; −inf times 0 would be NaN
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// m = max x; with y = (x − m)·scale: s = Σ 2^y, u = Σ 2^y·y.
struct Statistics {
    float m, s, u;
};

__device__ Statistics combine(Statistics a, Statistics b, float scale) {
    const float m = fmaxf(a.m, b.m);
    if (m == -INFINITY) return {m, a.s + b.s, a.u + b.u};
    const float da = a.m == -INFINITY ? 0.0f : fmaxf((a.m - m) * scale, FAR);
    const float db = b.m == -INFINITY ? 0.0f : fmaxf((b.m - m) * scale, FAR);
    const float wa = a.m == -INFINITY ? 0.0f : exp2f(da), wb = b.m == -INFINITY ? 0.0f : exp2f(db);
    return {m, wa * a.s + wb * b.s, wa * (a.u + a.s * da) + wb * (b.u + b.s * db)};
}

// Returns the block's statistics to every thread.
__device__ Statistics reduce_block(Statistics mine, float scale) {
    __shared__ Statistics warps[WARPS];
    for (int offset = 16; offset; offset /= 2) {
        Statistics other;
        other.m = __shfl_xor_sync(~0u, mine.m, offset);
        other.s = __shfl_xor_sync(~0u, mine.s, offset);
        other.u = __shfl_xor_sync(~0u, mine.u, offset);
        mine = combine(mine, other, scale);
    }
    __syncthreads();  // `warps` may still be read from the last call
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = warps[0];
    for (int w = 1; w < WARPS; ++w) mine = combine(mine, warps[w], scale);
    return mine;
}

// 16 bytes of logits.
template <class T> struct Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    union {
        uint4 bits;
        T values[SIZE];
    };
};

// Adds a pack to the statistics. Its maximum comes first, so that there is one exponential per
// element.
template <class T> __device__ void add(Statistics& total, const Pack<T>& pack, float scale) {
    float x[Pack<T>::SIZE], m = total.m;
    for (int k = 0; k < Pack<T>::SIZE; ++k) m = fmaxf(m, x[k] = float(pack.values[k]));
    const float origin = m == -INFINITY ? 0.0f : m;
    if (total.m < m) {
        const float d = total.m == -INFINITY ? 0.0f : fmaxf((total.m - m) * scale, FAR);
        const float w = total.m == -INFINITY ? 0.0f : exp2f(d);
        total = {m, w * total.s, w * (total.u + total.s * d)};
    }
    for (int k = 0; k < Pack<T>::SIZE; ++k) {
        const float y = (x[k] - origin) * scale, p = exp2f(y);
        total.s += p;
        total.u += p > 0 ? p * y : 0.0f;
    }
}

struct Row {
    float coefficient, m, log2_s, temperature;
    int64_t target;
};

// Computes the loss of row n from its statistics; the thread with `write` stores the results.
__device__ Row finish(const GrpoArguments& a, int64_t n, Statistics total, float x_target,
                      float scale, bool write) {
    const float log2_s = log2f(total.s), logp = ((x_target - total.m) * scale - log2_s) * LN2;
    LossSettings settings = a.settings;
    settings.beta = *a.beta;
    const TokenLoss token =
        grpo_token(&settings, logp, a.old_logp ? a.old_logp[n] : logp, a.ref_logp != nullptr,
                   a.ref_logp ? a.ref_logp[n] : 0.0f, a.advantages[n], a.token_weights[n],
                   a.is_weights ? a.is_weights[n] : 1.0f);
    if (write) {
        a.loss[n] = token.loss;
        a.logp[n] = logp;
        a.entropy[n] = (log2_s - total.u / total.s) * LN2;
        a.kl[n] = token.kl;
        a.clipped[n] = token.clipped;
        a.kl_limited[n] = token.kl_limited;
    }
    const float coefficient = token.derivative / *a.temperature;
    return {isfinite(coefficient) ? coefficient : 0.0f, total.m, log2_s, *a.temperature,
            a.targets[n]};
}

template <class T>
__device__ Pack<T> gradient(const Pack<T>& pack, const Row& row, int64_t column, float scale) {
    Pack<T> out;
    for (int k = 0; k < Pack<T>::SIZE; ++k) {
        const float p = row.coefficient == 0
                            ? 0.0f
                            : exp2f((float(pack.values[k]) - row.m) * scale - row.log2_s);
        out.values[k] =
            T((column + k == row.target ? row.coefficient : 0.0f) - row.coefficient * p);
    }
    return out;
}

template <class T> __device__ float target_logit(const GrpoArguments& a, int64_t n) {
    const int64_t target = a.targets[n];
    if (target < 0 || target >= a.v) return NAN;
    return float(((const T*)a.logits)[n * a.stride + target]);
}

// --- Hopper --------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define MR1_CLUSTERS
#endif
}  // namespace
#include <cooperative_groups.h>
namespace {

// grid: n × blocks of a cluster; shared memory: the block's packs.
template <class T> __global__ void __launch_bounds__(THREADS) cluster_kernel(GrpoArguments a) {
#ifdef MR1_CLUSTERS
    extern __shared__ uint4 held[];
    __shared__ Statistics mine;
    const auto cluster = cooperative_groups::this_cluster();
    const int part = cluster.block_rank(), parts = cluster.num_blocks();
    const int64_t n = blockIdx.x / parts, packs = a.v / Pack<T>::SIZE,
                  per_part = (packs + parts - 1) / parts;
    const int64_t begin = min(part * per_part, packs), count = min(per_part, packs - begin);
    const float scale = LOG2E / *a.temperature, x_target = target_logit<T>(a, n);
    const uint4* in = (const uint4*)((const T*)a.logits + n * a.stride) + begin;

    Statistics total = {-INFINITY, 0.0f, 0.0f};
    constexpr int AHEAD = 4;  // 16-byte loads in flight per thread
    for (int64_t i = threadIdx.x; i < count; i += AHEAD * THREADS) {
        Pack<T> pack[AHEAD];
        for (int k = 0; k < AHEAD; ++k)
            if (i + k * THREADS < count) pack[k].bits = __ldcs(in + i + k * THREADS);
        for (int k = 0; k < AHEAD; ++k)
            if (i + k * THREADS < count) {
                held[i + k * THREADS] = pack[k].bits;
                add(total, pack[k], scale);
            }
    }
    total = reduce_block(total, scale);
    if (threadIdx.x == 0) mine = total;
    cluster.sync();  // also: every block has read the target's logit before any block overwrites it
    total = {-INFINITY, 0.0f, 0.0f};
    for (int other = 0; other < parts; ++other)
        total = combine(total, *cluster.map_shared_rank(&mine, other), scale);
    cluster.sync();  // no block may end while its statistics are read

    const Row row = finish(a, n, total, x_target, scale, part == 0 && threadIdx.x == 0);
    if (!a.out) return;
    uint4* out = (uint4*)((T*)a.out + n * a.out_stride) + begin;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) {
        Pack<T> pack;
        pack.bits = held[i];
        __stcs(out + i, gradient(pack, row, (begin + i) * Pack<T>::SIZE, scale).bits);
    }
#endif
}

// --- elsewhere -----------------------------------------------------------------------------------

// grid: (parts, rows of the group)
template <class T>
__global__ void __launch_bounds__(THREADS)
    statistics_kernel(GrpoArguments a, int64_t first, Statistics* partial, float* x_targets) {
    const int64_t n = first + blockIdx.y, packs = a.v / Pack<T>::SIZE;
    const float scale = LOG2E / *a.temperature;
    const uint4* in = (const uint4*)((const T*)a.logits + n * a.stride);
    Statistics total = {-INFINITY, 0.0f, 0.0f};
    for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < packs; i += gridDim.x * THREADS) {
        Pack<T> pack;
        pack.bits = in[i];
        add(total, pack, scale);
    }
    total = reduce_block(total, scale);
    if (threadIdx.x) return;
    partial[blockIdx.y * gridDim.x + blockIdx.x] = total;
    if (blockIdx.x == 0) x_targets[blockIdx.y] = target_logit<T>(a, n);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(GrpoArguments a, int64_t first, const Statistics* partial,
                    const float* x_targets) {
    const int64_t n = first + blockIdx.y, packs = a.v / Pack<T>::SIZE;
    const float scale = LOG2E / *a.temperature;
    Statistics total = {-INFINITY, 0.0f, 0.0f};
    for (int part = 0; part < gridDim.x; ++part)
        total = combine(total, partial[blockIdx.y * gridDim.x + part], scale);
    const Row row =
        finish(a, n, total, x_targets[blockIdx.y], scale, blockIdx.x == 0 && threadIdx.x == 0);
    if (!a.out) return;
    const uint4* in = (const uint4*)((const T*)a.logits + n * a.stride);
    uint4* out = (uint4*)((T*)a.out + n * a.out_stride);
    for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < packs; i += gridDim.x * THREADS) {
        Pack<T> pack;
        if (row.coefficient != 0) pack.bits = in[i];
        __stcs(out + i, gradient(pack, row, i * Pack<T>::SIZE, scale).bits);
    }
}

// --- launching -----------------------------------------------------------------------------------

template <class T> cudaError_t launch_cluster(const GrpoArguments& a, cudaStream_t stream) {
    const int64_t packs = a.v / Pack<T>::SIZE;
    int parts = 1;
    while (parts < 8 && (packs + parts - 1) / parts * 16 > 80 * 1024)
        parts *= 2;  // two blocks or more on an SM
    const size_t shared = (packs + parts - 1) / parts * 16;
    const auto kernel = cluster_kernel<T>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 * 1024);
    if (error) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {(unsigned)parts, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)(a.n * parts));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
}

template <class T>
cudaError_t launch_plain(const GrpoArguments& a, void* scratch, int64_t scratch_rows, int parts,
                         cudaStream_t stream) {
    Statistics* partial = (Statistics*)scratch;
    float* x_targets = (float*)(partial + scratch_rows * parts);
    for (int64_t first = 0; first < a.n; first += scratch_rows) {
        const dim3 grid(parts, (unsigned)min(scratch_rows, a.n - first));
        statistics_kernel<T><<<grid, THREADS, 0, stream>>>(a, first, partial, x_targets);
        gradient_kernel<T><<<grid, THREADS, 0, stream>>>(a, first, partial, x_targets);
        if (const cudaError_t error = cudaGetLastError()) return error;
    }
    return cudaSuccess;
}

template <class T>
cudaError_t launch(const GrpoArguments& a, int clusters, void* scratch, int64_t rows, int parts,
                   cudaStream_t stream) {
    return clusters ? launch_cluster<T>(a, stream)
                    : launch_plain<T>(a, scratch, rows, parts, stream);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Launches on `stream`; returns 0 or a cudaError_t. V and the strides must be multiples of 16
// bytes. With clusters = 0, `scratch` holds (12·parts + 4)·scratch_rows bytes, and scratch_rows
// rows are computed at a time.
EXPORT int mr1_cuda_grpo_rows(const GrpoArguments* a, int clusters, void* scratch,
                              int64_t scratch_rows, int parts, void* stream) {
    if (a->n == 0) return 0;
    if (!clusters && (scratch_rows < 1 || parts < 1)) return cudaErrorInvalidValue;
    const cudaStream_t s = (cudaStream_t)stream;
    if (a->dtype == 0) return launch<float>(*a, clusters, scratch, scratch_rows, parts, s);
    if (a->dtype == 1) return launch<__nv_bfloat16>(*a, clusters, scratch, scratch_rows, parts, s);
    return launch<__half>(*a, clusters, scratch, scratch_rows, parts, s);
}

EXPORT const char* mr1_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }

EXPORT int mr1_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }
