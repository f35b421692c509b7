// Ops on single rows between linear layers: norms, rotation, extremes, and storing keys and values.
//
// A row is computed alone, in float32, with lane sums in one fixed order, and rounded once.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "extremes.h"
#include "lanes.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

namespace {

constexpr int ROWS_PER_PART = 16;

void share_rows(Threads& threads, int rows, const std::function<void(int)>& each) {
    threads.share((rows + ROWS_PER_PART - 1) / ROWS_PER_PART, [&](int part) {
        const int end = std::min(rows, (part + 1) * ROWS_PER_PART);
        for (int r = part * ROWS_PER_PART; r < end; r++) each(r);
    });
}

// Normalise one vector; x, delta and out have one kind.
template <int KIND>
void norm(void* x, int64_t at, const void* delta, int64_t from, const float* weight, float eps, int width, void* out,
          int64_t to) {
    F32 total{};
    for (int i = 0; i < width; i += LANES) {
        F32 v = get(x, KIND, at + i, width - i);
        if (delta) {
            v = v + get(delta, KIND, from + i, width - i);
            if (KIND == BFLOAT16) v = widen(rounded(v));
            put(x, KIND, at + i, width - i, v);
        }
        total = fma(v, v, total);
    }
    const F32 scale = splat(1.0f / __builtin_sqrtf(sum(total) / (float)width + eps));
    for (int i = 0; i < width; i += LANES)
        put(out, KIND, to + i, width - i, get(x, KIND, at + i, width - i) * scale * get(weight, FLOAT32, i, width - i));
}

// Rotate the pairs (i, i + half) of one vector. WHOLE: half is a multiple of 16.
template <int KIND, bool WHOLE>
void rotate(void* x, int64_t at, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += LANES) {
        const int count = WHOLE ? LANES : half - i;
        const F32 cosine = get(cos, FLOAT32, i, count), sine = get(sin, FLOAT32, i, count);
        const F32 a = get(x, KIND, at + i, count), b = get(x, KIND, at + half + i, count);
        put(x, KIND, at + i, count, a * cosine - b * sine);
        put(x, KIND, at + half + i, count, b * cosine + a * sine);
    }
}

constexpr int EXTREMES_COLUMNS = 2048;

}  // namespace

extern "C" {

void twostroke_rms_norm(Threads* threads, const Rows* x, const Rows* delta, const float* weight, float eps,
                        int32_t vectors, int32_t width, const Rows* out) {
    share_rows(*threads, x->rows, [&](int r) {
        for (int n = 0; n < vectors; n++) {
            const int64_t at = r * x->stride + (int64_t)n * width, to = r * out->stride + (int64_t)n * width;
            const int64_t from = delta ? r * delta->stride : 0;
            if (x->kind == BFLOAT16)
                norm<BFLOAT16>(x->data, at, delta ? delta->data : nullptr, from, weight, eps, width, out->data, to);
            else
                norm<FLOAT32>(x->data, at, delta ? delta->data : nullptr, from, weight, eps, width, out->data, to);
        }
    });
}

void twostroke_rotary(Threads* threads, const Rows* x, int32_t heads, int32_t width, const float* cos, const float* sin,
                      int32_t half, int32_t interleaved) {
    const bool whole = half % LANES == 0;
    const auto one = x->kind == BFLOAT16 ? (whole ? rotate<BFLOAT16, true> : rotate<BFLOAT16, false>)
                                         : (whole ? rotate<FLOAT32, true> : rotate<FLOAT32, false>);
    share_rows(*threads, x->rows, [&](int r) {
        const float *c = cos + (int64_t)r * half, *s = sin + (int64_t)r * half;
        for (int h = 0; h < heads; h++) {
            const int64_t at = r * x->stride + (int64_t)h * width;
            if (interleaved) {
                for (int i = 0; i < half; i++) {
                    const int64_t p = at + 2 * i;
                    const float a = x->kind == BFLOAT16 ? to_float(((uint16_t*)x->data)[p]) : ((float*)x->data)[p];
                    const float b =
                        x->kind == BFLOAT16 ? to_float(((uint16_t*)x->data)[p + 1]) : ((float*)x->data)[p + 1];
                    F32 pair{};
                    pair[0] = a * c[i] - b * s[i];
                    pair[1] = b * c[i] + a * s[i];
                    put(x->data, x->kind, p, 2, pair);
                }
                continue;
            }
            one(x->data, at, c, s, half);
        }
    });
}

// Threads share columns, as in the product that wrote them: each finds its own columns in its cache.
void twostroke_extremes(Threads* threads, const Rows* x, int32_t width, float* least, float* greatest, int32_t* best) {
    extremes::Search search(*x, width);
    search.begin(EXTREMES_COLUMNS);
    threads->share(search.pieces(), [&](int piece) { search.look(piece); });
    search.settle(least, greatest, best);
}

}  // extern "C"

namespace {

// Scale byte of a row from the bits of its largest magnitude; see kernels/reference.py: fp8_encode.
int scale_byte(uint32_t amax) {
    const int byte = (int)(amax >> 23) - 8 + ((amax & 0x7FFFFFu) > 0x600000u);
    return amax < 0x7F800000u ? std::min(std::max(byte, 11), 246) : 0;
}

#if defined(__AVX512BW__)
// `encode_fp8` for bfloat16, 32 numbers at a time in integers: scaling changes the exponent, rounding cuts eight bits to four.
bool encode_by_32(const uint16_t* x, int width, uint8_t* payload, uint8_t* scale) {
    const auto all = [](int value) { return _mm512_set1_epi16((short)value); };
    __m512i top = _mm512_setzero_si512();
    for (int i = 0; i < width; i += 32)
        top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(x + i), all(0x7FFF)));
    top = _mm512_max_epu16(top, _mm512_srli_epi32(top, 16));
    const uint32_t amax = (_mm512_reduce_max_epu32(_mm512_and_si512(top, _mm512_set1_epi32(0xFFFF)))) << 16;
    const bool finite = amax < 0x7F800000u;
    *scale = (uint8_t)scale_byte(amax);
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

// Encode a row as e4m3 with a power-of-two scale. False: a number is not finite. Definition: kernels/reference.py: fp8_encode.
bool encode_fp8(const Rows& x, int64_t at, int width, uint8_t* payload, uint8_t* scale) {
#if defined(__AVX512BW__)
    if (x.kind == BFLOAT16 && width % 32 == 0) return encode_by_32((const uint16_t*)x.data + at, width, payload, scale);
#endif
    U32 top{};
    for (int i = 0; i < width; i += LANES)
        top = larger_u32(top, (U32)absolute(get(x.data, x.kind, at + i, width - i)));
    const uint32_t amax = largest_u32(top);
    const bool finite = amax < 0x7F800000u;
    const int byte = scale_byte(amax);
    const uint32_t inverse = (uint32_t)(254 - byte) << 23;
    for (int i = 0; i < width; i += LANES) {
        F32 v = get(x.data, x.kind, at + i, width - i) * (F32)splat_u32(inverse);
        U32 bits = (U32)v, magnitude = bits & 0x7FFFFFFFu;
        I32 normal = (I32)((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - 960;
        normal = (normal & (I32)(normal < 0x7E)) | (0x7E & ~(I32)(normal < 0x7E));
        I32 small = (I32)((U32)((F32)magnitude + splat(16384.0f)) & 0xFFu);
        I32 is_small = (I32)(magnitude < 0x3C800000u);
        I32 code = (small & is_small) | (normal & ~is_small) | (I32)((bits >> 24) & 0x80u);
        if (!finite) code = I32{};
        const U8x16 bytes = low_bytes(code);
        std::memcpy(payload + i, &bytes, std::min(LANES, width - i));
    }
    *scale = (uint8_t)byte;
    return finite;
}

bool encode_plain(const Rows& x, int64_t at, int width, uint8_t* payload, int codec) {
    I32 bad{};
    for (int i = 0; i < width; i += LANES)
        bad |= (I32)((U32)absolute(get(x.data, x.kind, at + i, width - i)) >= 0x7F800000u);
    bool finite = true;
    for (int i = 0; i < LANES; i++) finite = finite && !bad[i];
    for (int i = 0; i < width; i += LANES) {
        F32 v = finite ? get(x.data, x.kind, at + i, width - i) : F32{};
        if (codec == BFLOAT16) {
            const F32 limit = splat(3.3895313892515355e38f);
            v = select(v < limit, v, limit);
            v = select(v > -limit, v, -limit);
        }
        put<narrow>(payload, codec, i, width - i, v);  // `narrow` keeps subnormals, as the definition does
    }
    return finite;
}

}  // namespace

extern "C" {

void twostroke_write(Threads* threads, const StorePart* parts, int32_t num_parts, const int64_t* slots, int32_t rows,
                     int32_t* non_finite) {
    share_rows(*threads, rows, [&](int r) {
        non_finite[r] = 0;
        if (slots[r] < 0) return;
        for (int p = 0; p < num_parts; p++) {
            const StorePart& part = parts[p];
            const int64_t block = slots[r] / part.block_tokens, offset = slots[r] % part.block_tokens;
            const int row_bytes = part.width * (part.codec == FP8 ? 1 : part.codec == BFLOAT16 ? 2 : 4);
            for (int h = 0; h < part.heads; h++) {
                const int64_t place = (block * part.heads + h) * part.block_tokens + offset;
                const int64_t at = r * part.x.stride + (int64_t)h * part.width;
                uint8_t* payload = part.payload + place * row_bytes;
                const bool finite = part.codec == FP8
                                        ? encode_fp8(part.x, at, part.width, payload, part.scales + place)
                                        : encode_plain(part.x, at, part.width, payload, part.codec);
                non_finite[r] += !finite;
            }
        }
    });
}

}  // extern "C"
