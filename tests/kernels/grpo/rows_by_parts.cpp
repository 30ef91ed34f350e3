// A row's parts one after the other on a CPU, by the arithmetic of csrc/fused_grpo_cuda.cu. Only
// fp32 logits: the kernel casts others to fp32 first.
#include "fused_grpo_part.h"

constexpr int PACK = 4;  // fp32 logits in 16 bytes
constexpr int THREADS = 256;

// Sums a part in the order of a thread block: every thread its packs, then threads by halves.
static void sum_part(const float* x, int packs, float scale, float origin, PartStatistics* part) {
    float s[THREADS] = {}, u[THREADS] = {};
    for (int i = 0; i < packs * PACK; ++i)
        add_logit(x[i], scale, origin, &s[i / PACK % THREADS], &u[i / PACK % THREADS]);
    for (int half = THREADS / 2; half; half /= 2)
        for (int t = 0; t < half; ++t) {
            s[t] += s[t + half];
            u[t] += u[t + half];
        }
    part->s = s[0];
    part->u = u[0];
}

extern "C" void rows_by_parts(const GrpoArguments* a, int parts) {
    const int packs = (int)(a->v / PACK), per_part = packs_per_part(packs, parts);
    PartStatistics* const sent = new PartStatistics[parts];
    for (int64_t n = 0; n < a->n; ++n) {
        const RowInputs in = row_inputs(a, n);
        const float scale = MR1_LOG2E / in.temperature;
        const float* x = (const float*)a->logits + n * a->stride;
        float* out = (float*)a->out + n * a->out_stride;
        float k = -INFINITY;
        for (int p = 0; p < parts; ++p) {
            const PackRange range = part_range(packs, per_part, p);
            const int64_t begin = (int64_t)range.begin * PACK, end = begin + range.count * PACK;
            float peak = -INFINITY;
            for (int64_t i = begin; i < end; ++i) peak = fmaxf(peak, x[i]);
            sent[p] = {peak * scale, 0.0f, 0.0f, 0.0f};
            sum_part(x + begin, range.count, scale, finite_origin(sent[p].k), &sent[p]);
            if (begin <= in.target && in.target < end) sent[p].x_target = x[in.target];
            k = fmaxf(k, sent[p].k);
        }
        PartStatistics row = {finite_origin(k), 0.0f, 0.0f, 0.0f};
        for (int p = 0; p < parts; ++p) {
            const PartStatistics part = relative_to(sent[p], row.k);
            row = {row.k, row.s + part.s, row.u + part.u, row.x_target + part.x_target};
        }
        const RowGradient gradient = finish_row(a, n, &in, row, 1);
        for (int p = 0; p < parts; ++p) {
            const PackRange range = part_range(packs, per_part, p);
            const int64_t begin = (int64_t)range.begin * PACK, end = begin + range.count * PACK;
            for (int64_t i = begin; i < end; ++i)
                out[i] = i == in.target     ? gradient.target_value
                         : gradient.factor ? column_gradient(x[i], scale, &gradient)
                                           : 0.0f;
        }
    }
    delete[] sent;
}
