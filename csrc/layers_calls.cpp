// The C interface of the native kernels on rows of a layer and of logits on a CPU: norms and gating
// are those of mr1_fast/kernels/layers/, computed in layers_cpu.cpp; sample_cpu.cpp draws tokens.
#include "cpu_calls.h"

namespace {

// Elements of rows below which starting threads costs more than it saves.
constexpr int64_t ELEMENTS_PER_TEAM = 65536;

// Calls rows(begin, end) on ranges that make up 0, …, n. All threads share them where the work is
// worth it, else this one does it all.
template <class Rows>
void share_rows(int64_t n, int64_t elements_of_row, int64_t threads, const Rows& rows) {
    if (threads < 2 || n * elements_of_row < ELEMENTS_PER_TEAM) return rows(0, n);
    const int64_t ranges = n < 4 * threads ? n : 4 * threads;
    parallel(ranges, (int)threads,
             [&](int64_t i) { rows(n * i / ranges, n * (i + 1) / ranges); });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void mr1_norm(const NormArguments* a) {
    share_rows(a->n, a->d, a->threads, [=](int64_t begin, int64_t end) {
        chosen.layers[a->dtype].norm(a, begin, end);
    });
}

void mr1_silu_mul(const GateArguments* a) {
    share_rows(a->n, a->f, a->threads, [=](int64_t begin, int64_t end) {
        chosen.layers[a->dtype].gate(a, begin, end);
    });
}

void mr1_sample(const SampleArguments* a) {
    share_rows(a->n, a->v, a->threads, [=](int64_t begin, int64_t end) {
        std::vector<double> sums(a->v / SAMPLE_GROUP + 1);
        chosen.sample[a->dtype](a, sums.data(), begin, end);
    });
}

}  // extern "C"
#pragma GCC visibility pop
