// Encoding of rows of keys and values in the codecs of the cache. Definitions: kernels/reference.py and reference_codecs.py.
#pragma once

#include <algorithm>

#include "api.h"
#include "cache/cache.h"
#include "lanes.h"
#include "simd.h"

namespace encode {

using namespace simd;

// `width` numbers from number `at` of x on.
struct Row {
    const Rows& x;
    int64_t at;
    int width;
    F32 get(int i) const { return simd::get(x.data, x.kind, at + i, width - i); }
};

// Scale byte of a row from the bits of its largest magnitude; 0 if that is not finite.
inline int scale_byte(int codec, uint32_t amax) {
    if (amax >= 0x7F800000u) return 0;
    const int exponent = (int)(amax >> 23);
    const uint32_t mantissa = amax & 0x7FFFFFu;
    if (codec == FP8) return std::min(std::max(exponent - 8 + (mantissa > 0x600000u), 11), 246);
    if (codec == E5M2) return std::min(std::max(exponent - 15 + (mantissa > 0x600000u), 17), 239);
    return std::min(std::max(exponent - 6 + (mantissa > 0x7E0000u), 11), 246);
}

// Round the magnitudes of sixteen scaled numbers to codes of an FP8 format. CUT: mantissa bits of float32 that it lacks. BIAS: what
// its exponents lack, in codes. MOST: its largest code. SMALL: bits of its least normal number; below, numbers are multiples of
// the spacing of float32 at FLOOR.
template <int CUT, int BIAS, int MOST, uint32_t SMALL, int FLOOR>
inline I32 float8(F32 v) {
    const U32 bits = (U32)v, magnitude = bits & 0x7FFFFFFFu;
    I32 normal = (I32)((magnitude + ((1u << (CUT - 1)) - 1) + ((magnitude >> CUT) & 1u)) >> CUT) - BIAS;
    normal = (normal & (I32)(normal < MOST)) | (MOST & ~(I32)(normal < MOST));
    const I32 small = (I32)((U32)((F32)magnitude + splat((float)FLOOR)) & 0xFFu);
    const I32 is_small = (I32)(magnitude < SMALL);
    return (small & is_small) | (normal & ~is_small) | (I32)((bits >> 24) & 0x80u);
}
// Round sixteen scaled numbers to integers from -127 to 127, in the low byte of each lane.
inline I32 integers(F32 v) {
    v = select(v < splat(127.0f), v, splat(127.0f));
    v = select(v > splat(-127.0f), v, splat(-127.0f));
    return (I32)(v + splat(12582912.0f));
}

#if defined(__AVX512BW__)
// `bytes` of FP8 for bfloat16, 32 numbers at a time in integers: scaling changes the exponent, rounding cuts eight bits to four.
inline bool e4m3_by_32(const uint16_t* x, int width, uint8_t* payload, uint8_t* scale) {
    const auto all = [](int value) { return _mm512_set1_epi16((short)value); };
    __m512i top = _mm512_setzero_si512();
    for (int i = 0; i < width; i += 32)
        top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(x + i), all(0x7FFF)));
    top = _mm512_max_epu16(top, _mm512_srli_epi32(top, 16));
    const uint32_t amax = (_mm512_reduce_max_epu32(_mm512_and_si512(top, _mm512_set1_epi32(0xFFFF)))) << 16;
    const bool finite = amax < 0x7F800000u;
    *scale = (uint8_t)scale_byte(FP8, amax);
    if (!finite) return std::memset(payload, 0, width), false;
    const __m512i shift = all((127 - *scale) * 128);
    for (int i = 0; i < width; i += 32) {
        const __m512i bits = _mm512_loadu_si512(x + i);
        const __m512i magnitude = _mm512_add_epi16(_mm512_and_si512(bits, all(0x7FFF)), shift);  // may be negative
        // Round the low four bits to nearest even; 960 moves the exponent's bias from 127 to 7.
        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, 4), all(1));
        __m512i normal = _mm512_srai_epi16(_mm512_add_epi16(_mm512_add_epi16(magnitude, all(7)), odd), 4);
        normal = _mm512_min_epi16(_mm512_sub_epi16(normal, all(960)), all(0x7E));
        // Below 2**-6 codes are multiples of 2**-9: shift the eight significant bits by the missing exponent.
        const __m512i number = _mm512_or_si512(_mm512_and_si512(bits, all(0x7F)), all(0x80));
        const __m512i lacks = _mm512_min_epi16(_mm512_sub_epi16(all(125), _mm512_srai_epi16(magnitude, 7)), all(15));
        odd = _mm512_and_si512(_mm512_srlv_epi16(number, lacks), all(1));
        const __m512i below_half = _mm512_sub_epi16(_mm512_srlv_epi16(_mm512_sllv_epi16(all(1), lacks), all(1)), all(1));
        const __m512i small = _mm512_srlv_epi16(_mm512_add_epi16(_mm512_add_epi16(number, below_half), odd), lacks);
        const __mmask32 is_small = _mm512_cmplt_epi16_mask(magnitude, all(0x3C80));
        const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(bits, 8), all(0x80));
        const __m512i code = _mm512_or_si512(_mm512_mask_blend_epi16(is_small, normal, small), sign);
        _mm256_storeu_si256((__m256i*)(payload + i), _mm512_cvtepi16_epi8(code));
    }
    return true;
}
#endif

// Encode a row with one byte per number and a scale. False: a number is not finite; then zeros are stored, with scale 0.
// factors: null, or powers of two by which the channels are divided before.
inline bool bytes(const Row& row, int codec, const float* factors, uint8_t* payload, uint8_t* scale) {
#if defined(__AVX512BW__)
    if (codec == FP8 && row.x.kind == BFLOAT16 && row.width % 32 == 0)
        return e4m3_by_32((const uint16_t*)row.x.data + row.at, row.width, payload, scale);
#endif
    const bool is_integer = codec == INT8 || codec == CHANNEL;
    // Magnitudes above 2**127 count as 2**127 for integers: their decoded numbers could be infinite.
    const auto divided = [&](int i) {
        F32 v = row.get(i);
        if (!is_integer) return v;
        const F32 most = splat(0x1p127f);
        v = select(v < most, v, most);
        v = select(v > -most, v, -most);
        return factors ? v * (F32)(0x7F000000u - load<U32>(factors + i)) : v;
    };
    U32 top{}, whole{};
    for (int i = 0; i < row.width; i += LANES) {
        whole = larger_u32(whole, (U32)absolute(row.get(i)));
        top = larger_u32(top, (U32)absolute(divided(i)));
    }
    const bool finite = largest_u32(whole) < 0x7F800000u;
    const int byte = finite ? scale_byte(codec, largest_u32(top)) : 0;
    const F32 inverse = (F32)splat_u32((uint32_t)(254 - byte) << 23);
    for (int i = 0; i < row.width; i += LANES) {
        const F32 v = divided(i) * inverse;
        I32 code = is_integer          ? integers(v)
                   : codec == FP8 ? float8<20, 960, 0x7E, 0x3C800000u, 16384>(v)
                                  : float8<21, 448, 0x7B, 0x38800000u, 128>(v);
        if (!finite) code = I32{};
        const U8x16 codes = low_bytes(code);
        std::memcpy(payload + i, &codes, std::min(LANES, row.width - i));
    }
    *scale = (uint8_t)byte;
    return finite;
}

// Store a row as bfloat16 or float32. False: a number is not finite; then zeros are stored.
inline bool plain(const Row& row, uint8_t* payload, int codec) {
    const int width = row.width;
    I32 bad{};
    for (int i = 0; i < width; i += LANES)
        bad |= (I32)((U32)absolute(row.get(i)) >= 0x7F800000u);
    bool finite = true;
    for (int i = 0; i < LANES; i++) finite = finite && !bad[i];
    for (int i = 0; i < width; i += LANES) {
        F32 v = finite ? row.get(i) : F32{};
        if (codec == BFLOAT16) {
            const F32 limit = splat(3.3895313892515355e38f);
            v = select(v < limit, v, limit);
            v = select(v > -limit, v, -limit);
        }
        put<narrow>(payload, codec, i, width - i, v);  // `narrow` keeps subnormals, as the definition does
    }
    return finite;
}

}  // namespace encode
