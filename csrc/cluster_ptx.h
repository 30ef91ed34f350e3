// Bulk copies, their barriers, and clusters of thread blocks (sm_90 and newer), by the PTX
// instructions that CUDA C++ has no names for. See "Asynchronous copy", "mbarrier" and "st.async"
// in the PTX ISA.
#pragma once
#include <stdint.h>

// The address of shared memory as PTX takes it.
static __device__ __forceinline__ uint32_t address(const void* shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

// An mbarrier of a single phase. One thread arrives and says how many bytes are to come; the phase
// ends when it has arrived and they all have come, in whatever order.
using Barrier = uint64_t;

static __device__ __forceinline__ void init(Barrier* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
}

// Makes initialised barriers visible to bulk copies and to the other blocks of the cluster.
static __device__ __forceinline__ void fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Waits for bytes that bulk copies of this block bring. The hardware ends the wait: a copy that
// cannot be made is an error of the launch.
static __device__ __forceinline__ void wait(Barrier* barrier) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], 0;\n"
            "selp.u32 %0, 1, 0, done; }"
            : "=r"(done)
            : "r"(address(barrier))
            : "memory");
    } while (!done);
}

// Waits for bytes that other blocks of the cluster send. All of its blocks run at once, so that
// this ends, too. The wider scope empties the L1 cache, which `wait` need not.
static __device__ __forceinline__ void wait_for_cluster(Barrier* barrier) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
            "selp.u32 %0, 1, 0, done; }"
            : "=r"(done)
            : "r"(address(barrier))
            : "memory");
    } while (!done);
}

// Copies a multiple of 16 bytes to this block's shared memory; they count towards `barrier`.
static __device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes,
                                                  Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1], %2, [%3];" ::"r"(address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(address(barrier))
        : "memory");
}

static __device__ __forceinline__ int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Says that this thread has come so far. What other blocks need to see of it by then are barriers
// that `fence_init` has released, so that the arrival itself can be relaxed.
static __device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// Waits for the arrival of every thread of the cluster.
static __device__ __forceinline__ void wait_for_arrivals() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Writes 16 bytes to a block's counterpart of `slot`; they count towards its counterpart of
// `barrier`. The block may be the own one.
static __device__ __forceinline__ void send(int block, float4* slot, float4 value,
                                            Barrier* barrier) {
    asm volatile(
        "{ .reg .u32 slot, barrier;\n"
        "mapa.shared::cluster.u32 slot, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        " [slot], {%3, %4, %5, %6}, [barrier]; }" ::"r"(address(slot)),
        "r"(address(barrier)), "r"(block), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
}
