// Vectors of WIDTH floats for the instruction set that this file is compiled for. Functions are
// static, so that none compiled for one instruction set is ever linked into the code of another.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bf16;
typedef struct { uint16_t bits; } fp16;

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline uint16_t bf16_bits(float x) {  // round to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);  // NaN stays NaN
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float to_float(fp16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                   mantissa = x.bits & 0x3ff;
    float y;
    if (exponent == 0) {
        y = (float)mantissa * 0x1p-24f;
        return sign ? -y : y;
    }
    const uint32_t bits =
        sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&y, &bits, 4);
    return y;
}
static inline uint16_t fp16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000) {                       // subnormal: steps of 2^-24
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return sign | (uint16_t)(int)nearbyintf(magnitude * 0x1p24f);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}
static inline void from_float(float* out, float x) { *out = x; }
static inline void from_float(bf16* out, float x) { out->bits = bf16_bits(x); }
static inline void from_float(fp16* out, float x) { out->bits = fp16_bits(x); }

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16
typedef __m512 Floats;
static inline Floats all(float x) { return _mm512_set1_ps(x); }
static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline Floats load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
// Adds what makes dropping the lower 16 bits round to nearest, ties to even.
static inline __m512i rounding(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
static inline void store(bf16* p, Floats x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    const __m512i rounded = rounding(_mm512_castps_si512(x));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
static inline void store(fp16* p, Floats x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0));
}
static inline void load_pair(const bf16* p, Floats* even, Floats* odd) {
    const __m512i both = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
}
static inline void store_pair(bf16* p, Floats even, Floats odd) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
#else
    const __m512i low = _mm512_srli_epi32(rounding(_mm512_castps_si512(even)), 16);
    const __m512i high =
        _mm512_and_si512(rounding(_mm512_castps_si512(odd)), _mm512_set1_epi32(0xffff0000));
    _mm512_storeu_si512(p, _mm512_or_si512(low, high));
#endif
}
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Returns the second argument where either is NaN: the order decides whether NaN is kept or
// dropped.
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
static inline double sum(Floats x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high =
        _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
// `swapped` takes lane i from lane i ^ STEP; `mixed` takes lanes whose number has the bit STEP from
// b, others from a.
template <int STEP> static inline Floats swapped(Floats x) {
    if (STEP < 4) return _mm512_permute_ps(x, STEP == 1 ? 0xb1 : 0x4e);
    return _mm512_shuffle_f32x4(x, x, STEP == 4 ? 0xb1 : 0x4e);
}
template <int STEP> static inline Floats mixed(Floats a, Floats b) {
    return _mm512_mask_blend_ps(STEP == 1   ? 0xaaaa
                                : STEP == 2 ? 0xcccc
                                : STEP == 4 ? 0xf0f0
                                            : 0xff00,
                                a, b);
}
static inline Floats fraction(Floats y) { return _mm512_reduce_ps(y, 1); }  // y − floor(y)
// x·2^floor(y); 0 for y at SMALLEST
static inline Floats times_power(Floats x, Floats y) { return _mm512_scalef_ps(x, y); }
#define SMALLEST -200.0f

#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8
typedef __m256 Floats;
static inline Floats all(float x) { return _mm256_set1_ps(x); }
static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Floats load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Floats load(const fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
static inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
// Adds what makes dropping the lower 16 bits round to nearest, ties to even.
static inline __m256i rounding(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
static inline void store(bf16* p, Floats x) {
    const __m256i rounded = rounding(_mm256_castps_si256(x));
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline void store(fp16* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0));
}
static inline void load_pair(const bf16* p, Floats* even, Floats* odd) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}
static inline void store_pair(bf16* p, Floats even, Floats odd) {
    const __m256i low = _mm256_srli_epi32(rounding(_mm256_castps_si256(even)), 16);
    const __m256i high =
        _mm256_and_si256(rounding(_mm256_castps_si256(odd)), _mm256_set1_epi32(0xffff0000));
    _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(low, high));
}
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline float largest(Floats x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
static inline double sum(Floats x) {
    const __m256d d = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d e = _mm_add_pd(_mm256_castpd256_pd128(d), _mm256_extractf128_pd(d, 1));
    return _mm_cvtsd_f64(e) + _mm_cvtsd_f64(_mm_unpackhi_pd(e, e));
}
template <int STEP> static inline Floats swapped(Floats x) {
    return STEP < 4 ? _mm256_permute_ps(x, STEP == 1 ? 0xb1 : 0x4e)
                    : _mm256_permute2f128_ps(x, x, 1);
}
template <int STEP> static inline Floats mixed(Floats a, Floats b) {
    return _mm256_blend_ps(a, b, STEP == 1 ? 0xaa : STEP == 2 ? 0xcc : 0xf0);
}
static inline Floats fraction(Floats y) { return _mm256_sub_ps(y, _mm256_floor_ps(y)); }
static inline Floats times_power(Floats x, Floats y) {
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_floor_ps(y));
    const __m256 power = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
    return _mm256_mul_ps(x, power);
}
#define SMALLEST -127.0f  // its power has the bits of 0

#elif defined(__aarch64__) && !defined(MR1_SCALAR)
#include <arm_neon.h>
#define WIDTH 4
typedef float32x4_t Floats;
static inline Floats all(float x) { return vdupq_n_f32(x); }
static inline Floats load(const float* p) { return vld1q_f32(p); }
static inline Floats load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16));
}
static inline Floats load(const fp16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
static inline void store(float* p, Floats x) { vst1q_f32(p, x); }
static inline void store(bf16* p, Floats x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    vst1_u16((uint16_t*)p, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
}
static inline void store(fp16* p, Floats x) {
    vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
static inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
static inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline Floats larger(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline float largest(Floats x) { return vmaxvq_f32(x); }
static inline double sum(Floats x) {
    return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)));
}
static inline Floats sums(const Floats* x) {
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}
static inline Floats fraction(Floats y) { return vsubq_f32(y, vrndmq_f32(y)); }
static inline Floats times_power(Floats x, Floats y) {
    const int32x4_t exponent = vcvtq_s32_f32(vrndmq_f32(y));
    return vmulq_f32(x,
                     vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23)));
}
#define SMALLEST -127.0f

#else
#define WIDTH 1
typedef float Floats;
static inline Floats all(float x) { return x; }
template <class T> static inline Floats load(const T* p) { return to_float(*p); }
template <class T> static inline void store(T* p, Floats x) { from_float(p, x); }
static inline Floats add(Floats a, Floats b) { return a + b; }
static inline Floats multiply(Floats a, Floats b) { return a * b; }
static inline Floats divide(Floats a, Floats b) { return a / b; }
// Rounds once.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return (float)((double)a * b + c);
}
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline float largest(Floats x) { return x; }
static inline double sum(Floats x) { return x; }
static inline Floats sums(const Floats* x) { return x[0]; }
static inline Floats fraction(Floats y) { return y - floorf(y); }
static inline Floats times_power(Floats x, Floats y) {
    if (y != y) return y;
    const uint32_t bits = (uint32_t)((int32_t)floorf(y) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x * power;
}
#define SMALLEST -127.0f
#endif

#if WIDTH > 4
// Returns the sums of WIDTH vectors, that of x[i] in lane i. Two vectors become one that holds
// partial sums of both, in half as many lanes each.
template <int STEP = 1> static inline Floats sums(const Floats* x) {
    if constexpr (STEP == WIDTH) return *x;
    else {
        const Floats a = sums<2 * STEP>(x), b = sums<2 * STEP>(x + STEP);
        return add(mixed<STEP>(a, b), swapped<STEP>(mixed<STEP>(b, a)));
    }
}
#endif

// Load or store up to WIDTH elements: lanes beyond the last one hold `fill`, and are not stored.
template <class T>
__attribute__((noinline)) static Floats load_part(const T* p, int64_t count, float fill) {
    T padded[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
        if (i < count) padded[i] = p[i];
        else from_float(&padded[i], fill);
    }
    return load(padded);
}
template <class T> __attribute__((noinline)) static void store_part(T* p, int64_t count, Floats x) {
    T padded[WIDTH];
    store(padded, x);
    for (int i = 0; i < count; ++i) p[i] = padded[i];
}
template <class T>
static inline Floats load_up_to(const T* p, int64_t count, float fill = -INFINITY) {
    return count >= WIDTH ? load(p) : load_part(p, count, fill);
}
template <class T> static inline void store_up_to(T* p, int64_t count, Floats x) {
    count >= WIDTH ? store(p, x) : store_part(p, count, x);
}

// Rounds numbers to T.
template <class T> static inline Floats rounded(Floats x) {
    T in_dtype[WIDTH];
    store(in_dtype, x);
    return load(in_dtype);
}
template <> inline Floats rounded<float>(Floats x) { return x; }

// Load 2·WIDTH elements as two vectors, in the order that is cheapest; `store_pair` puts them back
// in place.
template <class T> static inline void load_pair(const T* p, Floats* a, Floats* b) {
    *a = load(p);
    *b = load(p + WIDTH);
}
template <class T> static inline void store_pair(T* p, Floats a, Floats b) {
    store(p, a);
    store(p + WIDTH, b);
}

// Returns 2^y for y up to a hundred: a polynomial on the fraction, minimax in relative error
// (Remez), times a power of two. Relative errors: 7.5e-8 at degree 5, for sums and fp32; 2.6e-6 at
// degree 4, for fp16; 7.5e-5 at degree 3, for bf16, whose half step is 2e-3.
template <int DEGREE> static inline Floats power_of_two(Floats y) {
    const Floats f = fraction(y);
    Floats p;
    if (DEGREE == 5) {
        p = multiply_add(all(0.0018775766948238015f), f, all(0.00898933969438076f));
        p = multiply_add(p, f, all(0.05582631751894951f));
        p = multiply_add(p, f, all(0.24015361070632935f));
        p = multiply_add(p, f, all(0.6931530833244324f));
        p = multiply_add(p, f, all(0.9999999403953552f));
    } else if (DEGREE == 4) {
        p = multiply_add(all(0.013534167781472206f), f, all(0.052011460065841675f));
        p = multiply_add(p, f, all(0.2414427548646927f));
        p = multiply_add(p, f, all(0.6930038332939148f));
        p = multiply_add(p, f, all(1.0000026226043701f));
    } else {
        p = multiply_add(all(0.07802452147006989f), f, all(0.22606715559959412f));
        p = multiply_add(p, f, all(0.6958335638046265f));
        p = multiply_add(p, f, all(0.9999251961708069f));
    }
    return times_power(p, y);
}
