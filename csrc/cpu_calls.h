// What the calls of the CPU library share: the instruction set that was chosen, and threads.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "decode.h"
#include "layers.h"
#include "row_kernels.h"

struct InstructionSet {
    const RowKernels* rows;
    const DecodeKernel* decode;
    const LayerKernels* layers;
    const SampleKernel* sample;
};
extern InstructionSet chosen;

// GOMP_parallel of the OpenMP runtime that torch has loaded. After a torch operation its threads
// stay awake and spin for a while, and threads of our own would compete with them for the cores.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                              unsigned flags);
extern GompParallel gomp_parallel;

// Runs task(0), …, task(count − 1), handed out in order to up to `threads` threads.
template <class Task> void parallel(int64_t count, int threads, const Task& task) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    };
    if (gomp_parallel && threads > 1 && count > 1) {
        gomp_parallel([](void* data) { (*(decltype(work)*)data)(); }, (void*)&work,
                      (unsigned)threads, 0);
        return;
    }
    if (threads > count) threads = (int)count;
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) {
        try {
            others.emplace_back(work);
        } catch (...) {  // no more threads can be started: this one does the rest
            break;
        }
    }
    work();
    for (auto& thread : others) thread.join();
}
