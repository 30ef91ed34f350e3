// Drawing a token of each row of logits, compiled once per instruction set.
//
// A row is read for its largest logit, and again for the sums of groups of tokens, when it comes
// from L2; at last the group that has the token is read once more.
#include <float.h>

#include "layers.h"
#include "row_kernels.h"
#include "simd.h"

#ifndef MR1_ISA
#error "compile with -DMR1_ISA=name"
#endif
#define EXPORT_OF(isa) mr1_sample_kernels_##isa
#define EXPORT(isa) EXPORT_OF(isa)

namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr int GROUP = SAMPLE_GROUP;
constexpr int CHAIN = 16;  // weights that are added up in fp32, in each lane

// The tokens of a row that may be drawn.
template <class T> struct Tokens {
    const T* x;
    int64_t v;
    const int64_t* banned;
    int64_t banned_count;

    // Copies a group's logits as fp32: −inf for banned tokens and past the end of the row.
    void copy(int64_t begin, float* out) const {
        for (int i = 0; i < GROUP; i += WIDTH) {
            const int64_t left = v - begin - i;
            store(out + i, left > 0 ? load_up_to(x + begin + i, left) : all(-INFINITY));
        }
        for (int64_t k = 0; k < banned_count; ++k) {
            const int64_t place = banned[k] - begin;
            if (place >= 0 && place < GROUP) out[place] = -INFINITY;
        }
    }
};

struct Peak {
    float x;        // NaN is dropped
    int64_t begin;  // of the first group that has it
};

template <class T> Peak find_peak(const Tokens<T>& tokens) {
    float x[GROUP];
    Peak peak = {-INFINITY, 0};
    for (int64_t begin = 0; begin < tokens.v; begin += GROUP) {
        tokens.copy(begin, x);
        Floats best = all(-INFINITY);
        for (int i = 0; i < GROUP; i += WIDTH) best = larger(load(x + i), best);
        const float highest = largest(best);
        if (highest > peak.x) peak = {highest, begin};
    }
    return peak;
}

// Returns the first token that has the peak.
template <class T> int64_t first_of(const Tokens<T>& tokens, Peak peak) {
    float x[GROUP];
    tokens.copy(peak.begin, x);
    int i = 0;
    while (i < GROUP - 1 && x[i] != peak.x) ++i;
    return peak.begin + i;
}

// Returns 2^y, and 0 where that is about LEAST or less. No result is subnormal on the way, as these
// take a hundred cycles.
constexpr float LEAST = 0x1p-124f;
inline Floats weight_of(Floats y) {
    const Floats power = power_of_two<5>(larger(all(-125.0f), y));  // NaN stays
    return larger(all(0.0f), add(power, all(-LEAST)));
}

// Writes a group's weights 2^((x − peak)·scale), and returns their sum.
template <class T>
double weigh(const Tokens<T>& tokens, int64_t begin, float peak, float scale, float* weights) {
    double total = 0.0;
    tokens.copy(begin, weights);
    for (int chain = 0; chain < GROUP; chain += CHAIN * WIDTH) {
        Floats weight_sums = all(0.0f);
        for (int i = chain; i < chain + CHAIN * WIDTH; i += WIDTH) {
            const Floats weight =
                weight_of(multiply(add(load(weights + i), all(-peak)), all(scale)));
            weight_sums = add(weight_sums, weight);
            store(weights + i, weight);
        }
        total += sum(weight_sums);
    }
    return total;
}

// Returns the first token of a group at which `before` plus the weights so far exceeds the
// threshold.
int draw(const float* weights, double before, double threshold) {
    int i = 0;
    for (; i < GROUP - WIDTH; i += WIDTH) {
        const double next = before + sum(load(weights + i));
        if (next > threshold) break;
        before = next;
    }
    for (; i < GROUP; ++i) {
        before += weights[i];
        if (before > threshold) return i;
    }
    // The group's sum was rounded upwards, and the threshold lies between: its last token it is.
    do --i;
    while (i > 0 && weights[i] == 0.0f);
    return i;
}

// Returns the natural logarithm of `total` plus the weights of banned tokens, relative to the peak.
template <class T>
double log_of_all(const Tokens<T>& tokens, double total, double peak, double temperature) {
    const auto log_weight = [&](int64_t k) {
        return (to_float(tokens.x[tokens.banned[k]]) - peak) / temperature;
    };
    double highest = 0.0;
    for (int64_t k = 0; k < tokens.banned_count; ++k)
        highest = fmax(log_weight(k), highest);  // NaN is dropped here
    total *= exp(-highest);
    for (int64_t k = 0; k < tokens.banned_count; ++k) total += exp(log_weight(k) - highest);
    return highest + log(total);
}

template <class T>
void sample(const SampleArguments* a, double* sums, int64_t begin, int64_t end) {
    const bool greedy = a->temperature == 0.0;
    const double temperature = greedy ? 1.0 : a->temperature;
    // Neither 0 nor infinite, so that −inf and 0 stay what they are
    const float scale = (float)fmin(fmax(LOG2E / temperature, FLT_MIN), FLT_MAX);
    for (int64_t i = begin; i < end; ++i) {
        const Tokens<T> tokens = {(const T*)a->logits + i * a->stride, a->v, a->banned,
                                  a->banned_count};
        const Peak peak = find_peak(tokens);
        float weights[GROUP];
        double total = 0.0;
        const int64_t groups = (a->v + GROUP - 1) / GROUP;
        for (int64_t g = 0; g < groups; ++g)
            total += sums[g] = weigh(tokens, g * GROUP, peak.x, scale, weights);

        int64_t token = 0;
        if (greedy) {
            token = first_of(tokens, peak);
        } else if (total > 0.0) {
            const double threshold = a->uniform[i] * total;
            double before = 0.0;
            int64_t g = 0;
            while (g < groups - 1 && before + sums[g] <= threshold) before += sums[g++];
            weigh(tokens, g * GROUP, peak.x, scale, weights);
            token = g * GROUP + draw(weights, before, threshold);
        }
        const double log_total = log_of_all(tokens, total, peak.x, temperature);
        const float logp =
            (float)((to_float(tokens.x[token]) - (double)peak.x) / temperature - log_total);
        // Not so with NaN, with +inf, and without a token to draw
        const bool sound = __builtin_isfinite(logp);
        a->tokens[i] = sound ? token : -1;
        a->logp[i] = sound ? logp : NAN;
    }
}

}  // namespace

extern const SampleKernel EXPORT(MR1_ISA)[DTYPES];
const SampleKernel EXPORT(MR1_ISA)[DTYPES] = {sample<float>, sample<bf16>, sample<fp16>};
