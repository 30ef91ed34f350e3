// The fused GRPO loss on GPUs with thread block clusters (sm_90 and newer), an alternative to the
// Triton kernel; benchmarks/bench_grpo_loss.py decides which is the default on an architecture.
//
// A cluster of thread blocks holds a row in its shared memory, a part in each block. A block
//   1. fetches its part by a few bulk copies, and takes the maximum of each as it arrives;
//   2. sums 2^y and 2^y·y over the part in one sweep relative to that exact maximum;
//   3. sends the sums to every block of the cluster, and waits for theirs;
//   4. writes the gradient from shared memory.
// So device memory sees one read and one write, whatever L2 holds and whether in place or not.
//
// Steps overlap between the blocks of a multiprocessor: see BLOCKS_PER_SM. An element costs 12
// instructions, two of them exponentials. For 8,192 × 151,936 bf16 on an H100 that is 0.5 ms of
// issue, and 0.7 ms at 16 exponentials a clock and multiprocessor, beside 1.6 ms for a copy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cluster_ptx.h"
#include "fused_grpo_part.h"
#include "sources.h"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PIECES = 4;        // bulk copies per part
constexpr int MOST_BLOCKS = 16;  // of a cluster; not every GPU runs more than 8

// Blocks that a multiprocessor's shared memory should have room for: one loads, one computes, one
// waits for its cluster, one stores. So 8 blocks hold a row of 151,936 bf16 logits on an sm_90,
// 37.1 KiB each. With 1 KiB for the system and 0.4 for `Shared`, 5 of them fit in its 228 KiB: 186
// KiB in flight, where a copy moves 23 KB in a µs, about the latency. In the 100 KiB of an sm_120
// two fit, as its clusters have at most 8 blocks, beside 10 KB in a µs.
constexpr int BLOCKS_PER_SM = 4;
constexpr int RESIDENT = 5;  // blocks that registers must leave room for: 48 a thread

// --- packs of 16 bytes, of pairs of logits -------------------------------------------------------

template <class Pair> struct Pack {
    static constexpr int PAIRS = 16 / sizeof(Pair), SIZE = 2 * PAIRS;
    union {
        uint4 bits;
        Pair pairs[PAIRS];
    };
};

__device__ float2 floats(float2 x) { return x; }
__device__ float2 floats(__nv_bfloat162 x) {
    // __bfloat1622float2 takes an instruction more.
    const uint32_t bits = *(const uint32_t*)&x;
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ float2 floats(__half2 x) { return __half22float2(x); }

// The larger one of each; NaN is dropped.
__device__ float2 larger(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
__device__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }

template <class Pair> __device__ Pair rounded(float x, float y);
template <> __device__ float2 rounded(float x, float y) { return {x, y}; }
template <> __device__ __nv_bfloat162 rounded(float x, float y) {
    return __floats2bfloat162_rn(x, y);
}
template <> __device__ __half2 rounded(float x, float y) { return __floats2half2_rn(x, y); }

// --- the kernel ----------------------------------------------------------------------------------

__device__ float sum_over_warp(float x) {
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

__device__ float maximum_over_warp(float x) {
    for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

// A block's shared memory beside its part.
struct __align__(16) Shared {
    PartStatistics parts[MOST_BLOCKS];  // sent by the blocks of the cluster, this one too
    RowGradient row;
    float2 sums[WARPS];
    float peaks[WARPS];
    Barrier arrived[PIECES], exchanged;
};

// Starts the copies of the block's part, and prepares all barriers. By one thread.
__device__ void fetch(const uint4* part, int count, int piece, int blocks, uint4* held,
                      Shared& shared) {
    for (int j = 0; j < PIECES; ++j) init(&shared.arrived[j]);
    init(&shared.exchanged);
    fence_init();
    for (int j = 0; j < PIECES; ++j) {
        const int begin = min(j * piece, count), packs = min(begin + piece, count) - begin;
        // Where nothing is to come, as in a short or empty part, the phase ends at once.
        arrive_and_expect(&shared.arrived[j], 16 * packs);
        if (packs) copy_async(held + begin, part + begin, 16 * packs, &shared.arrived[j]);
    }
    arrive_and_expect(&shared.exchanged, blocks * (int)sizeof(PartStatistics));
}

// Returns the maximum of the part to every thread, taken piece by piece as they arrive.
template <class Pair>
__device__ float maximum_of_part(const uint4* held, int count, int piece, Shared& shared) {
    Pair largest = rounded<Pair>(-INFINITY, -INFINITY);
    int i = threadIdx.x;
#pragma unroll 1
    for (int j = 0; j < PIECES; ++j) {
        wait(&shared.arrived[j]);
        for (const int end = min((j + 1) * piece, count); i < end; i += THREADS) {
            Pack<Pair> pack;
            pack.bits = held[i];
            for (int k = 0; k < Pack<Pair>::PAIRS; ++k) largest = larger(largest, pack.pairs[k]);
        }
    }
    const float2 two = floats(largest);
    float peak = maximum_over_warp(fmaxf(two.x, two.y));
    if (threadIdx.x % 32 == 0) shared.peaks[threadIdx.x / 32] = peak;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, shared.peaks[w]);
    return peak;
}

// Leaves Σ 2^y and Σ 2^y·y of each warp in `shared`.
template <class Pair>
__device__ void sum_part(const uint4* held, int count, float scale, float origin, Shared& shared) {
    float s = 0.0f, u = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x; i < count; i += THREADS) {
        Pack<Pair> pack;
        pack.bits = held[i];
        for (int j = 0; j < Pack<Pair>::PAIRS; ++j) {
            const float2 x = floats(pack.pairs[j]);
            add_logit(x.x, scale, origin, &s, &u);
            add_logit(x.y, scale, origin, &s, &u);
        }
    }
    s = sum_over_warp(s);
    u = sum_over_warp(u);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = {s, u};
}

// Sends the part's statistics to all blocks of the cluster, waits for theirs, and computes the
// row's loss; leaves its gradient in `shared`. By the whole of warp 0.
__device__ void exchange(const GrpoArguments& a, int64_t n, const RowInputs& in, float k,
                         float x_target, int blocks, Shared& shared) {
    const int lane = threadIdx.x, rank = rank_in_cluster();
    float s = 0.0f, u = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        s += shared.sums[w].x;
        u += shared.sums[w].y;
    }
    if (lane < blocks)
        send(lane, (float4*)&shared.parts[rank], {k, s, u, x_target}, &shared.exchanged);
    wait_for_cluster(&shared.exchanged);
    PartStatistics part = {-INFINITY, 0.0f, 0.0f, 0.0f};
    if (lane < blocks) part = shared.parts[lane];
    const float origin = finite_origin(maximum_over_warp(part.k));
    part = relative_to(part, origin);
    const PartStatistics row = {origin, sum_over_warp(part.s), sum_over_warp(part.u),
                                sum_over_warp(part.x_target)};
    if (lane == 0) shared.row = finish_row(&a, n, &in, row, rank == 0);
}

template <class Pair>
__device__ void write_gradient(uint4* out, const uint4* held, int count, float scale,
                               RowGradient row) {
    if (row.factor == 0.0f) {
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += THREADS) __stcs(out + i, make_uint4(0, 0, 0, 0));
        return;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < count; i += THREADS) {
        Pack<Pair> pack;
        pack.bits = held[i];
        for (int j = 0; j < Pack<Pair>::PAIRS; ++j) {
            const float2 x = floats(pack.pairs[j]);
            pack.pairs[j] = rounded<Pair>(column_gradient(x.x, scale, &row),
                                          column_gradient(x.y, scale, &row));
        }
        __stcs(out + i, pack.bits);
    }
}

// grid: rows × blocks of a cluster; dynamic shared memory: `per_part` packs.
template <class Pair>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    cluster_kernel(const __grid_constant__ GrpoArguments a, int per_part, int log2_blocks) {
    extern __shared__ uint4 held[];
    __shared__ Shared shared;
    constexpr int SIZE = Pack<Pair>::SIZE;
    using Element = decltype(Pair::x);
    const int thread = threadIdx.x, blocks = 1 << log2_blocks;
    // Not from %clusterid, which is computed in fp32 and wrong beyond 2^24 blocks.
    const int64_t n = blockIdx.x >> log2_blocks;
    const PackRange part = part_range((int)(a.v / SIZE), per_part, rank_in_cluster());
    const uint4* const in = (const uint4*)((const Element*)a.logits + n * a.stride) + part.begin;
    // Pieces are whole rounds of the block, so that only the last round of a part is ragged.
    const int piece = (per_part + PIECES * THREADS - 1) / (PIECES * THREADS) * THREADS;

    if (thread == 0) fetch(in, part.count, piece, blocks, held, shared);
    __syncthreads();      // the barriers are there for this block,
    arrive_at_cluster();  // and for the others as soon as these have waited for this arrival

    RowInputs inputs = {};
    if (thread < 32) inputs = row_inputs(&a, n);  // now, since device memory is far
    const float scale = MR1_LOG2E / *a.temperature;
    // The target's column in this part; −1 if it is in another one or in none.
    const uint64_t column = (uint64_t)a.targets[n] - (uint64_t)part.begin * SIZE;
    const int target = column < (uint64_t)part.count * SIZE ? (int)column : -1;

    const float k = maximum_of_part<Pair>(held, part.count, piece, shared) * scale;
    sum_part<Pair>(held, part.count, scale, finite_origin(k), shared);
    wait_for_arrivals();  // long past: all blocks of a cluster start together
    __syncthreads();
    if (thread < 32) {
        const float2 pair = floats(((const Pair*)held)[max(target, 0) / 2]);
        const float x_target = target < 0 ? 0.0f : target % 2 ? pair.y : pair.x;
        exchange(a, n, inputs, k, x_target, blocks, shared);
    }
    // A block may not end while others write to its shared memory; it has waited for all that they
    // send. As no bulk copy follows, none can overtake the reads of `held`: a kernel that fetched
    // another row from here on would need fence.proxy.async first.
    __syncthreads();

    if (!a.out) return;
    Element* const out = (Element*)a.out + n * a.out_stride + (int64_t)part.begin * SIZE;
    write_gradient<Pair>((uint4*)out, held, part.count, scale, shared.row);
    // By the thread that has just written the target's pack, so that this comes after it.
    if (target >= 0 && target / SIZE % THREADS == thread)
        out[target] = rounded<Pair>(shared.row.target_value, 0.0f).x;
}

// --- launching -----------------------------------------------------------------------------------

using Kernel = void (*)(GrpoArguments, int, int);

struct Dtype {
    Kernel kernel;
    int bytes;  // of a logit
};

// By the numbers of mr1_fast/kernels/native.py.
const Dtype DTYPES[] = {{cluster_kernel<float2>, 4},
                        {cluster_kernel<__nv_bfloat162>, 2},
                        {cluster_kernel<__half2>, 2}};

// The launch of a row of `packs` on a cluster of `blocks`.
struct Launch {
    int per_part;
    cudaLaunchAttribute cluster{};
    cudaLaunchConfig_t config{};

    Launch(int64_t n, int packs, int blocks, cudaStream_t stream)
        : per_part(packs_per_part(packs, blocks)) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {(unsigned)blocks, 1, 1};
        config.gridDim = dim3((unsigned)(n * blocks));
        config.blockDim = dim3(THREADS);
        config.dynamicSmemBytes = 16 * (size_t)per_part;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    Launch(const Launch&) = delete;  // config points into it
    // Allows what this launch needs beyond the default, on the current device; all of its shared
    // memory, as another thread may launch with more meanwhile.
    cudaError_t allow(Kernel kernel, int most_shared) const {
        cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
        if (!error)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        if (!error && cluster.val.clusterDim.x > 8)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        return error;
    }
};

// What the current device has; bytes of shared memory.
struct Limits {
    int clusters = 0, most_shared = 0, all_shared = 0, reserved = 0;
    cudaError_t error;

    Limits() {
        int device;
        error = cudaGetDevice(&device);
        const auto ask = [&](int* value, cudaDeviceAttr attribute) {
            if (!error) error = cudaDeviceGetAttribute(value, attribute, device);
        };
        ask(&clusters, cudaDevAttrClusterLaunch);
        ask(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        ask(&all_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        ask(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
        most_shared -= sizeof(Shared);  // what is left for a part
        reserved += sizeof(Shared);
    }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* mr1_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }

// Chooses how many blocks of the current device hold a row of `v` logits: the fewest whose parts
// have at most `part_bytes` (0: so many that BLOCKS_PER_SM blocks fit on a multiprocessor), or else
// as many as can run. That is 0 where no cluster can hold the row, as on a GPU without clusters.
// Returns 0 or a cudaError_t.
EXPORT int mr1_cuda_grpo_blocks(int dtype, int64_t v, int64_t part_bytes, int* blocks) {
    const Kernel kernel = DTYPES[dtype].kernel;
    const int64_t row_bytes = v * DTYPES[dtype].bytes;
    const Limits limits;
    *blocks = 0;
    if (limits.error || !limits.clusters) return limits.error;
    if (row_bytes == 0 || row_bytes % 16 || row_bytes / MOST_BLOCKS > limits.most_shared) return 0;
    if (!part_bytes) part_bytes = limits.all_shared / BLOCKS_PER_SM - limits.reserved;
    for (int candidate = 1; candidate <= MOST_BLOCKS; candidate *= 2) {
        const Launch launch(1, (int)(row_bytes / 16), candidate, nullptr);
        const int64_t bytes = (int64_t)launch.config.dynamicSmemBytes;
        int running = 0;
        if (bytes > limits.most_shared || launch.allow(kernel, limits.most_shared) ||
            cudaOccupancyMaxActiveClusters(&running, kernel, &launch.config) || running < 1)
            continue;  // such as 16 blocks on an sm_120
        *blocks = candidate;
        if (bytes <= part_bytes) break;
    }
    cudaGetLastError();  // a refused candidate is no error
    return 0;
}

// Launches on `stream`, with as many blocks per row as mr1_cuda_grpo_blocks chose; returns 0 or a
// cudaError_t. Rows of logits and of `out` must begin and end at multiples of 16 bytes.
EXPORT int mr1_cuda_grpo_rows(const GrpoArguments* a, int blocks, void* stream) {
    const Dtype& dtype = DTYPES[a->dtype];
    const int64_t places =
        (int64_t)a->logits | (int64_t)a->out | (a->v | a->stride | a->out_stride) * dtype.bytes;
    if (a->n == 0) return 0;
    if (places % 16) return cudaErrorMisalignedAddress;
    int log2_blocks = 0;
    while (1 << log2_blocks < blocks) ++log2_blocks;
    if (1 << log2_blocks != blocks || blocks > MOST_BLOCKS || a->n > INT32_MAX / blocks)
        return cudaErrorInvalidConfiguration;
    const Limits limits;
    if (limits.error) return limits.error;
    const Launch launch(a->n, (int)(a->v * dtype.bytes / 16), blocks, (cudaStream_t)stream);
    if (const cudaError_t error = launch.allow(dtype.kernel, limits.most_shared)) return error;
    return cudaLaunchKernelEx(&launch.config, dtype.kernel, *a, launch.per_part, log2_blocks);
}
