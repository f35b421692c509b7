// bfloat16 in twelve bits, nothing lost: the weights of a panel share few exponents, so four bits say which. (That a model's
// exponents hold so little: Zhang et al. 2025, DFloat11. Codes of one length are what can be decoded at memory speed.)
//
// A panel is { its sixteen most frequent exponents, the number of its odd weights, these }, filled up to whole cache lines,
// then groups of four k-steps: 64 bytes of sign and mantissa for two steps, 64 for the other two, 64 of codes (low halves
// of the bytes for the first two steps, high halves for the others). Odd weights, whose exponent is none of the sixteen,
// stand in the list as they are. Of weights spread like a Gauss bell about one in 20,000 is odd.
//
// Within 64 bytes numbers lie so that interleaving two vectors of bytes brings them into order: byte 16 i + 8 s + j
// is number 8 i + j of step s.
#pragma once

#include <cstdint>

#include "simd.h"

namespace coded {

using namespace simd;

constexpr int EXPONENTS = 16, STEPS = 4, STEP_NUMBERS = 2 * LANES, NUMBERS = STEPS * STEP_NUMBERS;
constexpr int GROUP_BYTES = 192, LINE = 64;
constexpr int INNER_MULTIPLE = 2 * STEPS;  // of a matrix that can be held so

struct Odd {
    uint32_t place;  // 32 * step + number in it
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

// Only where registers hold tables of bytes: elsewhere decoding would take longer than reading.
#if defined(__AVX2__)
constexpr bool DECODES = true;
#else
constexpr bool DECODES = false;
#endif

// What a code stands for, as the two bytes of a bfloat16 see it.
struct Tables {
#if defined(__AVX512BW__)
    __m512i low, high;
    explicit Tables(const uint8_t* exponents) {
        const __m512i each = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)exponents));
        low = _mm512_and_si512(_mm512_slli_epi16(each, 7), _mm512_set1_epi8((char)0x80));
        high = _mm512_and_si512(_mm512_srli_epi16(each, 1), _mm512_set1_epi8(0x7F));
    }
#elif defined(__AVX2__)
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
// By the low four bits of bytes, whatever stands above them, of a table that repeats every sixteen bytes.
inline __m512i look_up(__m512i table, __m512i codes) {
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(codes, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(0x0F)));
#endif
}
#endif

// The four k-steps of a group, but for odd weights.
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
#elif defined(__AVX2__)
    union {
        U32 whole;
        __m256i part[2];
    } first, second;
    const __m256i nibble = _mm256_set1_epi8(0x0F), mantissa = _mm256_set1_epi8(0x7F);
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 2; i++) {
            const __m256i codes = load<__m256i>(group + 2 * LINE + 32 * i), rest = load<__m256i>(group + half * LINE + 32 * i);
            const __m256i code = _mm256_and_si256(half ? _mm256_srli_epi16(codes, 4) : codes, nibble);
            const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(tables.low, code), _mm256_and_si256(rest, mantissa));
            const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(tables.high, code), _mm256_andnot_si256(mantissa, rest));
            first.part[i] = _mm256_unpacklo_epi8(low, high), second.part[i] = _mm256_unpackhi_epi8(low, high);
        }
        steps[2 * half] = first.whole, steps[2 * half + 1] = second.whole;
    }
#endif
}

// Walks the groups of a panel, front to back.
class Panel {
   public:
    Panel(const char* panel, int64_t panel_bytes, int inner)
        : at_(panel + panel_bytes - groups_bytes(inner)),
          tables_(((const Header*)panel)->exponents),
          odd_(((const Header*)panel)->odd()),
          end_(odd_ + ((const Header*)panel)->num_odd),
          odd_group_(group_of(odd_, end_)) {}

    // The next group's k-steps. Bytes so far `ahead` are asked for into the second-level cache.
    __attribute__((always_inline)) void next(U32 (&steps)[STEPS], int64_t ahead) {
#pragma GCC unroll 3
        for (int line = 0; line < GROUP_BYTES; line += LINE) __builtin_prefetch(at_ + line + ahead, 0, 2);
        decode(tables_, at_, steps);
        if (__builtin_expect(group_ == odd_group_, 0)) {
            alignas(LINE) uint16_t numbers[NUMBERS];  // so that the four vectors themselves can stay in registers
            std::memcpy(numbers, &steps, sizeof numbers);
            odd_ = put_odd(odd_, end_, numbers);
            odd_group_ = group_of(odd_, end_);
            std::memcpy(&steps, numbers, sizeof numbers);
        }
        at_ += GROUP_BYTES, group_++;
    }

   private:
    static int group_of(const Odd* odd, const Odd* end) { return odd == end ? -1 : (int)(odd->place / NUMBERS); }
    // Those of one group; returns the next one. No method: then the walk itself can stay in registers.
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
