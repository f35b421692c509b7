// Lossless bfloat16 in twelve bits: weights of a panel have few distinct exponents, so a code of four bits selects one.
// Source: DFloat11 (Zhang et al. 2025) for the low entropy of exponents. Codes have one length, so that decoding keeps up
// with memory.
//
// A panel is { the sixteen most frequent exponents, the number of odd weights, the odd weights }, padded to whole cache lines,
// then groups of four k-steps: 64 bytes of sign and mantissa for the first two steps, 64 for the last two, 64 of codes (low
// nibbles for the first two steps, high nibbles for the last two). An odd weight has an exponent that is none of the sixteen;
// the list holds it uncoded. About one of 20,000 normally distributed weights is odd.
//
// The order of numbers within 64 bytes is such that interleaving two vectors of bytes sorts them: byte 16 i + 8 s + j is
// number 8 i + j of step s.
#pragma once

#include <cstdint>

#include "simd.h"

namespace coded {

using namespace simd;

constexpr int EXPONENTS = 16, STEPS = 4, STEP_NUMBERS = 2 * LANES, NUMBERS = STEPS * STEP_NUMBERS;
constexpr int GROUP_BYTES = 192, LINE = 64;
constexpr int INNER_MULTIPLE = 2 * STEPS;  // inner size of a matrix in this form is a multiple

struct Odd {
    uint32_t place;  // 32 * step + number within the step
    uint16_t bits, reserved;
};
struct Header {
    uint8_t exponents[EXPONENTS];
    int32_t num_odd, reserved;
    const Odd* odd() const { return (const Odd*)(this + 1); }
};

inline int64_t header_bytes(int num_odd) {
    return ((int64_t)sizeof(Header) + num_odd * (int64_t)sizeof(Odd) + LINE - 1) / LINE * LINE;
}
inline int64_t groups_bytes(int inner) { return (int64_t)(inner / INNER_MULTIPLE) * GROUP_BYTES; }

inline int byte_of(int step, int number) { return 16 * (number / 8) + 8 * (step % 2) + number % 8; }

// Only with byte-shuffle instructions: without them decoding is slower than reading bfloat16.
#if defined(__AVX512BW__) || defined(TWOSTROKE_AVX2)
constexpr bool DECODES = true;
#else
constexpr bool DECODES = false;
#endif

// The exponent of each code, split into its bits of the low and of the high byte of a bfloat16.
struct Tables {
#if defined(__AVX512BW__)
    __m512i low, high;
    explicit Tables(const uint8_t* exponents) {
        const __m512i each = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)exponents));
        low = _mm512_and_si512(_mm512_slli_epi16(each, 7), _mm512_set1_epi8((char)0x80));
        high = _mm512_and_si512(_mm512_srli_epi16(each, 1), _mm512_set1_epi8(0x7F));
    }
#elif defined(TWOSTROKE_AVX2)
    __m256i low, high;
    explicit Tables(const uint8_t* exponents) {
        const __m256i each = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)exponents));
        low = _mm256_and_si256(_mm256_slli_epi16(each, 7), _mm256_set1_epi8((char)0x80));
        high = _mm256_and_si256(_mm256_srli_epi16(each, 1), _mm256_set1_epi8(0x7F));
    }
#else
    explicit Tables(const uint8_t*) {}
#endif
};

#if defined(__AVX512BW__)
// Look up bytes by their low four bits (the high four are ignored) in a table that repeats every sixteen bytes.
inline __m512i look_up(__m512i table, __m512i codes) {
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(codes, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(0x0F)));
#endif
}
#endif

// Decode the four k-steps of a group, without odd weights.
__attribute__((always_inline)) inline void decode(const Tables& tables, const char* group, U32 (&steps)[STEPS]) {
#if defined(__AVX512BW__)
    const __m512i codes = load<__m512i>(group + 2 * LINE);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i rest = load<__m512i>(group + half * LINE);
        const __m512i code = half ? _mm512_srli_epi16(codes, 4) : codes;
        // table | (rest & mask)
        const __m512i low = _mm512_ternarylogic_epi32(look_up(tables.low, code), rest, _mm512_set1_epi8(0x7F), 0xF8);
        const __m512i high =
            _mm512_ternarylogic_epi32(look_up(tables.high, code), rest, _mm512_set1_epi8((char)0x80), 0xF8);
        steps[2 * half] = (U32)_mm512_unpacklo_epi8(low, high);
        steps[2 * half + 1] = (U32)_mm512_unpackhi_epi8(low, high);
    }
#elif defined(TWOSTROKE_AVX2)
    const __m256i nibble = _mm256_set1_epi8(0x0F), mantissa = _mm256_set1_epi8(0x7F);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m256i first[2], second[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m256i codes = load<__m256i>(group + 2 * LINE + 32 * i), rest = load<__m256i>(group + half * LINE + 32 * i);
            const __m256i code = _mm256_and_si256(half ? _mm256_srli_epi16(codes, 4) : codes, nibble);
            const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(tables.low, code), _mm256_and_si256(rest, mantissa));
            const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(tables.high, code), _mm256_andnot_si256(mantissa, rest));
            first[i] = _mm256_unpacklo_epi8(low, high), second[i] = _mm256_unpackhi_epi8(low, high);
        }
        steps[2 * half] = {(U32::Half)first[0], (U32::Half)first[1]};
        steps[2 * half + 1] = {(U32::Half)second[0], (U32::Half)second[1]};
    }
#endif
}

// Iterates over the groups of a panel, front to back.
class Panel {
   public:
    Panel(const char* panel, int64_t panel_bytes, int inner)
        : at_(panel + panel_bytes - groups_bytes(inner)),
          tables_(((const Header*)panel)->exponents),
          odd_(((const Header*)panel)->odd()),
          end_(odd_ + ((const Header*)panel)->num_odd),
          odd_group_(group_of(odd_, end_)) {}

    const char* at() const { return at_; }  // of the next group

    // Decode the next group's k-steps, and prefetch `ahead` bytes further into the second-level cache.
    __attribute__((always_inline)) void next(U32 (&steps)[STEPS], int64_t ahead) {
#pragma GCC unroll 3
        for (int line = 0; line < GROUP_BYTES; line += LINE) __builtin_prefetch(at_ + line + ahead, 0, 2);
        next(steps);
    }
    __attribute__((always_inline)) void next(U32 (&steps)[STEPS]) {
        decode(tables_, at_, steps);
        if (__builtin_expect(group_ == odd_group_, 0)) {
            alignas(LINE) uint16_t numbers[NUMBERS];  // a copy, so that the four vectors stay in registers
            std::memcpy(numbers, &steps, sizeof numbers);
            odd_ = put_odd(odd_, end_, numbers);
            odd_group_ = group_of(odd_, end_);
            std::memcpy(&steps, numbers, sizeof numbers);
        }
        at_ += GROUP_BYTES, group_++;
    }

   private:
    static int group_of(const Odd* odd, const Odd* end) { return odd == end ? -1 : (int)(odd->place / NUMBERS); }
    // Write the odd weights of one group; returns the next odd weight. Static, so that the iterator stays in registers.
    __attribute__((noinline)) static const Odd* put_odd(const Odd* odd, const Odd* end, uint16_t* numbers) {
        const int group = group_of(odd, end);
        for (; group_of(odd, end) == group; odd++) numbers[odd->place % NUMBERS] = odd->bits;
        return odd;
    }

    const char* at_;
    const Tables tables_;
    const Odd *odd_, *const end_;
    int group_ = 0, odd_group_;
};

}  // namespace coded
