// Vectors of sixteen float32 lanes and the operations that the kernels need, for AVX-512, AVX2 and any other machine.
//
// Other operations are the compiler's vector arithmetic on these types. Build with -ffp-contract=off: a product and a sum are
// fused only by fma(), so that bits do not depend on inlining.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "api.h"
#include "avx2.h"

namespace simd {

#if !defined(TWOSTROKE_AVX2)
typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
#endif
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef int8_t I8x16 __attribute__((vector_size(16)));

constexpr int LANES = 16;

template <class V>
inline V load(const void* p) {
#if defined(TWOSTROKE_AVX2)
    if constexpr (std::is_class_v<V>)  // each half as a whole: compilers copy a struct through memory
        return {load<typename V::Half>(p), load<typename V::Half>((const char*)p + sizeof(typename V::Half))};
#endif
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store(void* p, V v) {
#if defined(TWOSTROKE_AVX2)
    if constexpr (std::is_class_v<V>) return store(p, v.lo), store((char*)p + sizeof v.lo, v.hi);
#endif
    std::memcpy(p, &v, sizeof v);
}
#if defined(TWOSTROKE_AVX2)
inline F32 splat(float x) {
    const __m256 all = _mm256_set1_ps(x + 0.0f);  // -0 becomes 0, as below
    return {all, all};
}
inline U32 splat_u32(uint32_t x) {
    const U32::Half all = (U32::Half)_mm256_set1_epi32((int)x);
    return {all, all};
}
#else
inline F32 splat(float x) { return F32{} + x; }
inline U32 splat_u32(uint32_t x) { return U32{} + x; }
#endif

#if defined(__aarch64__)
// Sixteen lanes as the four registers of a 64-bit Arm.
template <class R>
class Quarters {
   public:
    template <class V>
    explicit Quarters(const V& v) {
        std::memcpy(parts_, &v, sizeof parts_);
    }
    R& operator[](int i) { return parts_[i]; }
    const R& operator[](int i) const { return parts_[i]; }
    template <class V>
    V whole() const {
        return load<V>(parts_);
    }

   private:
    R parts_[4];
};
#endif

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TWOSTROKE_AVX2)
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
#elif defined(__aarch64__)
    Quarters<float32x4_t> sum(c);
    const Quarters<float32x4_t> x(a), y(b);
    for (int i = 0; i < 4; i++) sum[i] = vfmaq_f32(sum[i], x[i], y[i]);
    return sum.whole<F32>();
#else
    return a * b + c;
#endif
}

inline F32 select(I32 mask, F32 yes, F32 no) {
#if defined(TWOSTROKE_AVX2)
    return {_mm256_blendv_ps(no.lo, yes.lo, (__m256)mask.lo), _mm256_blendv_ps(no.hi, yes.hi, (__m256)mask.hi)};
#else
    return (F32)(((I32)yes & mask) | ((I32)no & ~mask));
#endif
}
inline F32 larger(F32 a, F32 b) {
#if defined(__AVX512F__)
    return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(TWOSTROKE_AVX2)
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
#else
    return select(a > b, a, b);
#endif
}
// Remembers if a number passed to `look` was a NaN.
class SeesNan {
   public:
#if defined(__AVX512F__)
    void look(F32 v) { seen_ |= _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }
    bool any() const { return seen_; }

   private:
    __mmask16 seen_ = 0;
#else
    void look(F32 v) { seen_ |= v != v; }
    bool any() const {
        int32_t all = 0;
        for (int i = 0; i < LANES; i++) all |= seen_[i];
        return all;
    }

   private:
    I32 seen_{};
#endif
};

inline F32 absolute(F32 a) { return (F32)((U32)a & 0x7FFFFFFFu); }

inline U32 larger_u32(U32 a, U32 b) {
#if defined(__AVX512F__)
    return (U32)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(TWOSTROKE_AVX2)
    return {(U32::Half)_mm256_max_epu32((__m256i)a.lo, (__m256i)b.lo), (U32::Half)_mm256_max_epu32((__m256i)a.hi, (__m256i)b.hi)};
#else
    const I32 greater = (I32)(a > b);
    return (U32)(((I32)a & greater) | ((I32)b & ~greater));
#endif
}
inline uint32_t largest_u32(U32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)v);
#else
    uint32_t top = 0;
    for (int i = 0; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// Reduction by a fixed tree: lane 0 with 8, 1 with 9 ..., then 0 with 4 .... Written out, because a compiler may choose another
// tree for its own reductions. The lower lane is the first operand: for a maximum this decides which NaNs survive.
#if defined(__AVX512F__) || defined(TWOSTROKE_AVX2)
template <class EIGHT, class FOUR>
inline float fold(F32 v, const EIGHT& by_eight, const FOUR& by_four) {
#if defined(TWOSTROKE_AVX2)
    const __m256 eight = by_eight(v.lo, v.hi);
#else
    const __m256 eight = by_eight(_mm512_castps512_ps256((__m512)v),
                                  _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#endif
    const __m128 four = by_four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = by_four(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(by_four(two, _mm_movehdup_ps(two)));
}
inline float sum(F32 v) {
    return fold(v, [](__m256 a, __m256 b) { return a + b; }, [](__m128 a, __m128 b) { return a + b; });
}
inline float largest(F32 v) {
    return fold(v, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
inline float sum(F32 v) {
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
inline float largest(F32 v) {
    float x[LANES];
    store(x, v);
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
#endif

// ---------------------------------------------------------------- bfloat16

// Widening by intrinsics where they exist: compilers split GCC's general conversion into single lanes.
inline U32 widen_u16(U16x16 v) {
#if defined(__AVX512F__)
    return (U32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(TWOSTROKE_AVX2)
    const __m256i bits = (__m256i)v;
    return {(U32::Half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits)),
            (U32::Half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1))};
#else
    return __builtin_convertvector(v, U32);
#endif
}
inline F32 widen_i8(const void* p) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(TWOSTROKE_AVX2)
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
#else
    return __builtin_convertvector(__builtin_convertvector(load<I8x16>(p), I32), F32);
#endif
}
// The low sixteen bits of each lane; the others are zeros.
inline U16x16 low_halves(U32 v) {
#if defined(TWOSTROKE_AVX2)
    return (U16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.lo, (__m256i)v.hi), 0xD8);
#else
    return __builtin_convertvector(v, U16x16);
#endif
}
inline F32 widen(U16x16 bits) { return (F32)(widen_u16(bits) << 16); }
inline F32 load_bf16(const uint16_t* p) { return widen(load<U16x16>(p)); }

// Round to nearest even; NaN stays NaN.
inline U16x16 narrow(F32 v) {
#if defined(__AVX512F__)
    __m512i bits = (__m512i)v;
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return (U16x16)_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#else
    U32 bits = (U32)v;
    U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    U32 quiet = (bits >> 16) | 0x40u;
    I32 is_nan = v != v;
    return low_halves((U32)select(is_nan, (F32)quiet, (F32)rounded));
#endif
}
// The same, but subnormals may become zero, as by the CPU's instruction.
inline U16x16 rounded(F32 v) {
#if defined(__AVX512BF16__)
    return (U16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    return narrow(v);
#endif
}
inline void store_bf16(uint16_t* p, F32 v) { store(p, rounded(v)); }

inline float to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// acc[lane] += w[lane].low * x.low + w[lane].high * x.high, for pairs of bfloat16 in 32 bits.
inline F32 dot_pairs(F32 acc, U32 w, U32 x) {
#if defined(__AVX512BF16__)
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    acc = fma((F32)(w << 16), (F32)(x << 16), acc);
    return fma((F32)(w & 0xFFFF0000u), (F32)(x & 0xFFFF0000u), acc);
#endif
}

// Pack two vectors that are exact in bfloat16 into 32 bfloat16: first `low`, then `high`.
inline U32 pack_exact(F32 low, F32 high) {
#if defined(__AVX512BF16__)
    return (U32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#elif defined(TWOSTROKE_AVX2)
    return {(U32::Half)low_halves((U32)low >> 16), (U32::Half)low_halves((U32)high >> 16)};
#else
    typedef uint16_t U16x32 __attribute__((vector_size(64)));
    union {
        U16x16 half[2];
        U16x32 whole;
    } both;
    both.half[0] = low_halves((U32)low >> 16);
    both.half[1] = low_halves((U32)high >> 16);
    return (U32)both.whole;
#endif
}

// Round two vectors to 32 bfloat16: first `low`, then `high`. Subnormals become zero where the CPU's instruction does so.
inline U32 pack_rounded(F32 low, F32 high) {
#if defined(__AVX512BF16__)
    return (U32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#elif defined(TWOSTROKE_AVX2)
    return {(U32::Half)narrow(low), (U32::Half)narrow(high)};
#else
    return pack_exact(widen(narrow(low)), widen(narrow(high)));
#endif
}

// ---------------------------------------------------------------- halves

// Sixteen IEEE halves as float32.
inline F32 load_half(const void* p) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(TWOSTROKE_AVX2)
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
#else
    const U32 bits = widen_u16(load<U16x16>(p)), magnitude = (bits & 0x7FFFu) << 13;
    const U32 value = (U32)((F32)magnitude * splat(0x1p112f));  // a half's bias is 112 below float32's
    const U32 without_end = (U32)((I32)magnitude >= 0x0F800000) & 0x7F800000u;  // infinities and NaNs
    return (F32)(value | without_end | (bits & 0x8000u) << 16);
#endif
}

// ---------------------------------------------------------------- bytes

#if defined(TWOSTROKE_AVX2)
inline __m256i dot_quads(__m256i acc, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    // In pairs of 16 bits, because the instruction for pairs of bytes saturates.
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi32(0x00FF00FF)), odd = _mm256_srli_epi16(w, 8);
    const __m256i by_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), by_odd = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even, by_even), _mm256_madd_epi16(odd, by_odd)));
#endif
}
#endif
// acc[lane] += the sum of four products, unsigned bytes of w by signed bytes of x.
inline I32 dot_quads(I32 acc, U32 w, U32 x) {
#if defined(__AVX512VNNI__)
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(TWOSTROKE_AVX2)
    return {(I32::Half)dot_quads((__m256i)acc.lo, (__m256i)w.lo, (__m256i)x.lo),
            (I32::Half)dot_quads((__m256i)acc.hi, (__m256i)w.hi, (__m256i)x.hi)};
#elif defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)
    Quarters<int32x4_t> sum(acc);
    const Quarters<uint8x16_t> a(w);
    const Quarters<int8x16_t> b(x);
    for (int i = 0; i < 4; i++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        sum[i] = vusdotq_s32(sum[i], a[i], b[i]);
#else
        // Signed by signed alone: w = (w - 128) + 2 * 64.
        const int8x16_t half = vdupq_n_s8(64);
        sum[i] = vdotq_s32(sum[i], vreinterpretq_s8_u8(veorq_u8(a[i], vdupq_n_u8(128))), b[i]);
        sum[i] = vdotq_s32(vdotq_s32(sum[i], half, b[i]), half, b[i]);
#endif
    }
    return sum.whole<I32>();
#else
    for (int j = 0; j < 32; j += 8) acc += (I32)(w >> j & 0xFFu) * ((I32)(x << (24 - j)) >> 24);
    return acc;
#endif
}
#if defined(TWOSTROKE_AVX2)
inline F32 to_floats(I32 v) { return {_mm256_cvtepi32_ps((__m256i)v.lo), _mm256_cvtepi32_ps((__m256i)v.hi)}; }
inline I32 to_integers(F32 v) { return {(I32::Half)_mm256_cvttps_epi32(v.lo), (I32::Half)_mm256_cvttps_epi32(v.hi)}; }
#else
inline F32 to_floats(I32 v) { return __builtin_convertvector(v, F32); }
inline I32 to_integers(F32 v) { return __builtin_convertvector(v, I32); }
#endif
inline int32_t sum_integers(I32 v) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}
// The low byte of each lane.
inline U8x16 low_bytes(I32 v) {
#if defined(__AVX512F__)
    return (U8x16)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(TWOSTROKE_AVX2)
    const __m256i pairs = (__m256i)low_halves((U32)v & 0xFFu);
    return (U8x16)_mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
#else
    return __builtin_convertvector(v, U8x16);
#endif
}
inline void store_bytes(int8_t* p, I32 v) { store(p, low_bytes(v)); }

// ---------------------------------------------------------------- e4m3

inline U32 widen_u8(const void* p) {
#if defined(__AVX512F__)
    return (U32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(TWOSTROKE_AVX2)
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {(U32::Half)_mm256_cvtepu8_epi32(bytes), (U32::Half)_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
#else
    return __builtin_convertvector(load<U8x16>(p), U32);
#endif
}

// Decode sixteen e5m2 codes: the upper bytes of halves.
inline F32 decode_e5m2(U8x16 codes) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16((__m128i)codes), 8));
#elif defined(TWOSTROKE_AVX2)
    const __m256i halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16((__m128i)codes), 8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#else
    U32 wide = __builtin_convertvector(codes, U32);
    F32 value = (F32)(((wide & 0x80u) << 24) | ((wide & 0x7Fu) << 21));
    return value * splat(0x1p112f);  // e5m2's bias is 112 below float32's
#endif
}

// Decode sixteen codes, divided by 256, as halves with another exponent bias. Exact, subnormals included.
inline F32 decode_e4m3_by_256(U8x16 codes) {
#if defined(__AVX512F__) || defined(TWOSTROKE_AVX2)
    __m256i wide = _mm256_cvtepu8_epi16((__m128i)codes);
    __m256i sign = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16((short)0x8000));
    __m256i rest = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3F80));
#if defined(TWOSTROKE_AVX2)
    const __m256i halves = _mm256_or_si256(sign, rest);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#else
    return (F32)_mm512_cvtph_ps(_mm256_or_si256(sign, rest));
#endif
#else
    U32 wide = __builtin_convertvector(codes, U32);
    F32 value = (F32)(((wide & 0x80u) << 24) | ((wide & 0x7Fu) << 20));
    return value * splat(0x1p112f);  // e4m3's bias is 120 below float32's; 112 divides by 2**8
#endif
}

#if defined(TWOSTROKE_AVX2)
// Transpose sixteen bytes of each of sixteen rows: codes[i] holds elements 2i and 2i + 1 of all rows, eight rows per half.
__attribute__((always_inline)) inline void load_byte_columns(const uint8_t* rows, int row_bytes, __m256i (&codes)[8]) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        a[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(rows + j * row_bytes)),
                                       load<__m128i>(rows + (j + 8) * row_bytes), 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        b[j] = _mm256_unpacklo_epi8(a[2 * j], a[2 * j + 1]), b[j + 4] = _mm256_unpackhi_epi8(a[2 * j], a[2 * j + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // elements 0-7, 8-15
        a[0] = _mm256_unpacklo_epi16(b[i], b[i + 1]), a[1] = _mm256_unpackhi_epi16(b[i], b[i + 1]);
        a[2] = _mm256_unpacklo_epi16(b[i + 2], b[i + 3]), a[3] = _mm256_unpackhi_epi16(b[i + 2], b[i + 3]);
        codes[i] = _mm256_unpacklo_epi32(a[0], a[2]), codes[i + 1] = _mm256_unpackhi_epi32(a[0], a[2]);
        codes[i + 2] = _mm256_unpacklo_epi32(a[1], a[3]), codes[i + 3] = _mm256_unpackhi_epi32(a[1], a[3]);
    }
}
// Eight numbers of a codec, whose codes are the upper bytes of eight 16-bit lanes; FP8 divided by 256 as in decode_e4m3_by_256.
template <int CODEC>
__attribute__((always_inline)) inline __m256 decode_upper_bytes(__m128i codes) {
    if constexpr (CODEC == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_srai_epi16(codes, 8)));
    if constexpr (CODEC == FP8) codes = _mm_and_si128(_mm_srai_epi16(codes, 1), _mm_set1_epi16((short)0xBF80));
    return _mm256_cvtph_ps(codes);
}
// Decode the first (ODD: the second) element of all rows, one row per lane.
template <int CODEC, bool ODD>
__attribute__((always_inline)) inline F32 decode_byte_column(__m256i codes) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i upper = ODD ? _mm256_unpackhi_epi8(zero, codes) : _mm256_unpacklo_epi8(zero, codes);
    return {decode_upper_bytes<CODEC>(_mm256_castsi256_si128(upper)), decode_upper_bytes<CODEC>(_mm256_extracti128_si256(upper, 1))};
}
// Decode 32 codes of a row.
template <int CODEC>
__attribute__((always_inline)) inline void decode_32(const void* codes, F32 (&to)[2]) {
    const __m256i zero = _mm256_setzero_si256(), all = load<__m256i>(codes);
    const __m256i low = _mm256_unpacklo_epi8(zero, all), high = _mm256_unpackhi_epi8(zero, all);
    to[0] = {decode_upper_bytes<CODEC>(_mm256_castsi256_si128(low)), decode_upper_bytes<CODEC>(_mm256_castsi256_si128(high))};
    to[1] = {decode_upper_bytes<CODEC>(_mm256_extracti128_si256(low, 1)), decode_upper_bytes<CODEC>(_mm256_extracti128_si256(high, 1))};
}
#endif

// Decode 64 codes of FP8, E5M2 or INT8 into bfloat16 by byte tables. Interleaving the bytes leaves elements 0-7, 16-23, 32-39,
// 48-55 in `low` and the others in `high`.
#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
constexpr bool DECODES_64 = true;

// Low and high byte of the bfloat16 of each magnitude of seven bits. Every code decodes to a finite number.
struct ByteTables {
    alignas(64) uint8_t low[128], high[128];
    explicit ByteTables(float (*value_of)(int)) {
        for (int code = 0; code < 128; code++) {
            const float value = value_of(code);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            low[code] = (uint8_t)(bits >> 16), high[code] = (uint8_t)(bits >> 24);
        }
    }
};
inline const ByteTables E4M3_TABLES([](int code) {
    return (code >> 3) ? (float)(8 + (code & 7)) * __builtin_ldexpf(1.0f, (code >> 3) - 10)
                       : (float)code * __builtin_ldexpf(1.0f, -9);
});
inline const ByteTables E5M2_TABLES([](int code) {
    return (code >> 2) ? (float)(4 + (code & 3)) * __builtin_ldexpf(1.0f, (code >> 2) - 17)
                       : (float)code * __builtin_ldexpf(1.0f, -16);
});
inline const ByteTables INT8_TABLES([](int code) { return (float)code; });

template <int CODEC>
__attribute__((always_inline)) inline void decode_64(U32 codes, U32& low, U32& high) {
    const ByteTables& t = CODEC == INT8 ? INT8_TABLES : CODEC == E5M2 ? E5M2_TABLES : E4M3_TABLES;
    const __m512i code = (__m512i)codes, magnitude = CODEC == INT8 ? _mm512_abs_epi8(code) : code;  // bit 7 is not used
    const __m512i lows = _mm512_permutex2var_epi8(load<__m512i>(t.low), magnitude, load<__m512i>(t.low + 64));
    __m512i highs = _mm512_permutex2var_epi8(load<__m512i>(t.high), magnitude, load<__m512i>(t.high + 64));
    highs = _mm512_ternarylogic_epi32(highs, code, _mm512_set1_epi8((char)0x80), 0xF8);  // the code's sign
    low = (U32)_mm512_unpacklo_epi8(lows, highs);
    high = (U32)_mm512_unpackhi_epi8(lows, highs);
}

// Decode 64 codes of each of two rows into pairs of bfloat16 (one number of each row): columns 0-3, 16-19, 32-35, 48-51
// in the first vector, 4-7 ... in the second, 8-11 ... in the third, 12-15 ... in the fourth.
template <int CODEC>
__attribute__((always_inline)) inline void decode_two_rows(const void* a, const void* b, U32 (&to)[4]) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    const __m512i low = _mm512_unpacklo_epi8(x, y), high = _mm512_unpackhi_epi8(x, y);
    decode_64<CODEC>((U32)low, to[0], to[1]);
    decode_64<CODEC>((U32)high, to[2], to[3]);
}

// Sort four vectors of float32, in the column order of decode_two_rows, by column.
inline void restore_columns(F32 (&v)[4]) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
    const __m512 ab2 = _mm512_shuffle_f32x4(a, b, 0xEE), cd2 = _mm512_shuffle_f32x4(c, d, 0xEE);
    v[0] = (F32)_mm512_shuffle_f32x4(ab, cd, 0x88), v[1] = (F32)_mm512_shuffle_f32x4(ab, cd, 0xDD);
    v[2] = (F32)_mm512_shuffle_f32x4(ab2, cd2, 0x88), v[3] = (F32)_mm512_shuffle_f32x4(ab2, cd2, 0xDD);
}

// Transpose sixteen bytes of each of sixteen rows: codes[i] holds elements 4i to 4i + 3 of all rows, in an order such that
// decode_64 returns the first two elements of every row (one row per lane) in `low` and the last two in `high`.
__attribute__((always_inline)) inline void load_side_by_side(const uint8_t* rows, int row_bytes, U32 (&codes)[4]) {
    __m512i a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const uint8_t* from = rows + j * row_bytes;
        a[j] = _mm512_castsi128_si512(load<__m128i>(from));
        a[j] = _mm512_mask_broadcast_i32x4(a[j], 0x00F0, load<__m128i>(from + 4 * row_bytes));
        a[j] = _mm512_mask_broadcast_i32x4(a[j], 0x0F00, load<__m128i>(from + 8 * row_bytes));
        a[j] = _mm512_mask_broadcast_i32x4(a[j], 0xF000, load<__m128i>(from + 12 * row_bytes));
    }
    const __m512i b0 = _mm512_unpacklo_epi16(a[0], a[1]), b1 = _mm512_unpackhi_epi16(a[0], a[1]);
    const __m512i b2 = _mm512_unpacklo_epi16(a[2], a[3]), b3 = _mm512_unpackhi_epi16(a[2], a[3]);
    codes[0] = (U32)_mm512_unpacklo_epi32(b0, b2), codes[1] = (U32)_mm512_unpackhi_epi32(b0, b2);
    codes[2] = (U32)_mm512_unpacklo_epi32(b1, b3), codes[3] = (U32)_mm512_unpackhi_epi32(b1, b3);
}
#else
constexpr bool DECODES_64 = false;
template <int CODEC>
inline void decode_64(U32, U32&, U32&) {}
template <int CODEC>
inline void decode_two_rows(const void*, const void*, U32 (&)[4]) {}
inline void restore_columns(F32 (&)[4]) {}
inline void load_side_by_side(const uint8_t*, int, U32 (&)[4]) {}
#endif

// ---------------------------------------------------------------- elementary functions

constexpr float LOG2_E = 1.44269504088896341f;

// e**x to about 1 unit in the last place: 2**n * p(r), r = x - n ln 2 in two parts. 0 below -87.3; NaN for NaN.
// Source: the polynomial of Cephes' expf (Moshier 1989).
inline F32 exponential(F32 x) {
    F32 bounded = select(x > splat(88.72283f), splat(88.72283f), x);  // NaN stays
    F32 n = fma(bounded, splat(LOG2_E), splat(12582912.0f)) - splat(12582912.0f);  // nearest integer
    F32 r = fma(n, splat(-0.693359375f), bounded);
    r = fma(n, splat(2.12194440e-4f), r);
    F32 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
#if defined(__AVX512F__)
    F32 scaled = (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    I32 power = to_integers(n);
    I32 first = power >> 1;  // in two factors: 2**128 is no float32
    F32 scaled = p * (F32)((first + 127) << 23) * (F32)((power - first + 127) << 23);
#endif
    return select(x < splat(-87.33654f), splat(0.0f), scaled);
}

// 2**x to about 2 units in the last place, at a third of the cost of `exponential`. May be 0 below -126; infinite from 128 on.
// 2**floor(x) * p(r), r in [0, 1). Source of p: our own minimax fit with p(0) = 1; largest relative error 8.2e-8.
inline F32 power_of_two(F32 x) {
#if defined(__AVX512DQ__)
    const F32 r = (F32)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 for minus infinity
#else
    const F32 bounded = select(x < splat(-200.0f), splat(-200.0f), x);  // NaN stays
    const F32 nearest = (bounded + splat(12582912.0f)) - splat(12582912.0f);
    const F32 floor = select(nearest > bounded, nearest - splat(1.0f), nearest), r = bounded - floor;
#endif
    F32 p = splat(0.0018671300495043397f);
    p = fma(p, r, splat(0.009017030708491802f));
    p = fma(p, r, splat(0.05579991266131401f));
    p = fma(p, r, splat(0.24016444385051727f));
    p = fma(p, r, splat(0.6931512951850891f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512DQ__)
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)x);  // times 2**floor(x)
#else
    const F32 scaled = p * (F32)((to_integers(floor) + 127) << 23);
    return select(x < splat(-126.0f), splat(0.0f), select(x >= splat(128.0f), splat(__builtin_inff()), scaled));
#endif
}

inline F32 hyperbolic_tangent(F32 x) {
    F32 a = absolute(x);
    F32 e = exponential(a * splat(-2.0f));
    F32 wide = (splat(1.0f) - e) / (splat(1.0f) + e);
    F32 square = a * a;  // near zero the quotient cancels; below 0.05 the series is used
    F32 series = fma(square * a, fma(square, splat(2.0f / 15.0f), splat(-1.0f / 3.0f)), a);
    F32 result = select(a < splat(0.05f), series, wide);
    return (F32)((U32)result | ((U32)x & 0x80000000u));
}

// gate * sigmoid(t): t = gate for SiLU; for GELU, (1 + tanh(u)) / 2 = sigmoid(2 u). bfloat16: gate and answer are bfloat16, so a
// cheaper e**-t is used, whose error grows with t to a few units in the last place of float32.
inline F32 activate(F32 gate, int activation, bool bfloat16) {
    F32 t = gate;
    if (activation == GELU_TANH) t = splat(1.5957691216057308f) * fma(splat(0.044715f) * gate * gate, gate, gate);
    const F32 e = bfloat16 ? power_of_two(t * splat(-LOG2_E)) : exponential(-t);
    return gate / (splat(1.0f) + e);
}

// activate(gate) * up; for CLAMPED_SWIGLU gate * sigmoid(1.702 gate) * (up + 1), gate at most 7 and up within -7 and 7.
inline F32 gated(F32 gate, F32 up, int activation, bool bfloat16) {
    if (activation != CLAMPED_SWIGLU) return activate(gate, activation, bfloat16) * up;
    const F32 limit = splat(7.0f);
    gate = select((I32)(gate > limit), limit, gate);
    up = select((I32)(up > limit), limit, select((I32)(up < -limit), -limit, up));
    const F32 t = gate * splat(1.702f), e = bfloat16 ? power_of_two(t * splat(-LOG2_E)) : exponential(-t);
    return gate / (splat(1.0f) + e) * (up + splat(1.0f));
}

// ---------------------------------------------------------------- transposing

#if defined(TWOSTROKE_AVX2)
// Transpose eight rows of eight 32-bit numbers in place.
__attribute__((always_inline)) inline void transpose_quarter(U32::Half (&m)[8]) {
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)m[i], (__m256i)m[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)m[i], (__m256i)m[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        m[i] = (U32::Half)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        m[i + 4] = (U32::Half)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}
#endif

// Transpose sixteen rows of sixteen 32-bit numbers in place.
__attribute__((always_inline)) inline void transpose(U32 (&m)[16]) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)m[i], (__m512i)m[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)m[i], (__m512i)m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[8 * j + i] = _mm512_shuffle_i32x4(b[8 * j + i], b[8 * j + i + 4], 0x88);
            a[8 * j + i + 4] = _mm512_shuffle_i32x4(b[8 * j + i], b[8 * j + i + 4], 0xDD);
        }
    for (int i = 0; i < 8; i++) {
        m[i] = (U32)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        m[i + 8] = (U32)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
    }
#elif defined(TWOSTROKE_AVX2)
    typedef U32::Half Half;
    Half low[8], high[8], below_low[8], below_high[8];  // the four quarters
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) low[i] = m[i].lo, high[i] = m[i].hi, below_low[i] = m[i + 8].lo, below_high[i] = m[i + 8].hi;
    transpose_quarter(low), transpose_quarter(high), transpose_quarter(below_low), transpose_quarter(below_high);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) m[i] = {low[i], below_low[i]}, m[i + 8] = {high[i], below_high[i]};
#else
    for (int i = 0; i < 16; i++)
        for (int j = i + 1; j < 16; j++) {
            uint32_t t = m[i][j];
            m[i][j] = m[j][i];
            m[j][i] = t;
        }
#endif
}

}  // namespace simd
