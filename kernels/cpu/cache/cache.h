// Reads of one component of the cache for attention: rows of sixteen tokens at a time, in any codec.
#pragma once

#include <algorithm>

#include "api.h"
#include "simd.h"

namespace cache {

using namespace simd;

// Positions per tile. Block sizes are multiples of 16 tokens, so 16 rows of a head are always contiguous.
constexpr int TILE = 64, GROUPS = TILE / LANES;
constexpr int ANCHOR_TOKENS = 16;    // rows that share the factors of their channels
constexpr int MOST_CHANNELS = 1024;  // widest row of CHANNEL keys

constexpr bool is_bytes(int codec) { return codec == FP8 || codec == E5M2 || codec == INT8 || codec == CHANNEL; }
constexpr int number_bytes(int codec) { return is_bytes(codec) ? 1 : codec == BFLOAT16 ? 2 : 4; }

// Sixteen numbers of a row from `at` on, without its scale; FP8 numbers are divided by 256, CHANNEL numbers lack the factors of
// their channels. WHOLE: no number is missing.
template <int CODEC, bool WHOLE>
inline F32 numbers(const uint8_t* row, int at, int width) {
    const int count = WHOLE ? LANES : std::min(LANES, width - at);
    if (!WHOLE && count <= 0) return F32{};
    U8x16 codes{};
    U16x16 bits{};
    F32 v{};
    constexpr int size = number_bytes(CODEC);
    void* to = size == 1 ? (void*)&codes : size == 2 ? (void*)&bits : (void*)&v;
    if (WHOLE)
        std::memcpy(to, row + (int64_t)at * size, LANES * size);
    else
        std::memcpy(to, row + (int64_t)at * size, count * size);
    if constexpr (CODEC == FP8) return decode_e4m3_by_256(codes);
    if constexpr (CODEC == E5M2) return decode_e5m2(codes);
    if constexpr (CODEC == INT8 || CODEC == CHANNEL) return widen_i8(&codes);
    return CODEC == BFLOAT16 ? widen(bits) : v;
}

// Call `each` with the codec of a plane, FP8, E5M2 or INT8, as a constant.
template <class Each>
inline void with_codec(int codec, const Each& each) {
    switch (codec) {
        case E5M2: return each(std::integral_constant<int, E5M2>());
        case INT8: return each(std::integral_constant<int, INT8>());
        default: each(std::integral_constant<int, FP8>());
    }
}

// Addresses of the rows of one head and one tile.
struct TileRows {
    const uint8_t* rows[GROUPS];     // of sixteen tokens each; null where the sequence holds none
    const uint8_t* exponents[GROUPS];  // one byte per number: their scales
    int row_bytes;

    TileRows(const Plane& plane, const AttendSpan& span, int head, int tile, int held)
        : row_bytes(plane.width * number_bytes(plane.codec)) {
        for (int g = 0; g < GROUPS; g++) {
            rows[g] = exponents[g] = nullptr;
            if (g * LANES >= held) continue;
            const int position = tile * TILE + g * LANES;
            const int64_t block = span.blocks[position / plane.block_tokens];
            const int64_t place = (block * plane.heads + head) * plane.block_tokens + position % plane.block_tokens;
            rows[g] = plane.payload + place * row_bytes;
            if (is_bytes(plane.codec)) exponents[g] = plane.scales + place;
        }
    }
    // Scales of a group's rows. divided: the numbers were divided by 256, so the scales are multiplied by it.
    F32 scales(int g, bool divided) const {
        if (exponents[g] == nullptr) return splat(1.0f);
        return (F32)((widen_u8(exponents[g]) + (divided ? 8u : 0u)) << 23);
    }
};

// Bits of an integer 0..127 that count: the exponent of its float32.
inline I32 significant_bits(F32 magnitude) {
    const I32 bits = (I32)((U32)magnitude >> 23) - 126;
    return bits & (I32)(bits > 0);
}
// Powers of two [width, padded to 32 by ones] by which the channels of rows 1 to 15 were divided, from the integers of row 0.
// Definition: kernels/reference_codecs.py: channel_exponents.
inline void channel_factors(const uint8_t* anchor, int width, float* factors) {
    int total = 0;
    int8_t partners[MOST_CHANNELS + LANES] = {}, own[MOST_CHANNELS + LANES] = {};
    const int half = width / 2;
    std::memcpy(own, anchor, width);
    std::memcpy(partners + half, anchor, width - half);
    std::memcpy(partners, anchor + width - half, half);
    I32 sums{};
    for (int i = 0; i < width; i += LANES) sums += significant_bits(absolute(widen_i8(own + i)));
    for (int i = 0; i < LANES; i++) total += sums[i];
    const int level = (total + width - 1) / width;
    for (int i = 0; i < (width + 31) / 32 * 32; i += LANES) {
        const F32 a = absolute(widen_i8(own + i)), b = absolute(widen_i8(partners + i));
        I32 exponent = significant_bits(larger(a, b)) - (level + 1);
        exponent = exponent & (I32)(exponent > 0);
        store(factors + i, (F32)((exponent + 127) << 23));
    }
}

// Software prefetch of the next tile, line by line during other work: blocks are scattered, so the hardware prefetcher does
// not find them.
struct Ahead {
    const uint8_t* groups[GROUPS];

    // Where `next` has no rows, `here` is prefetched instead: it is cached already.
    Ahead(const TileRows& next, const TileRows& here) {
        for (int g = 0; g < GROUPS; g++) groups[g] = next.rows[g] ? next.rows[g] : here.rows[0];
    }
    __attribute__((always_inline)) void ask(int group, int at) const { __builtin_prefetch(groups[group] + at, 0, 2); }
};

// Transpose sixteen keys into `to` [steps][16 keys], 32 bits per key and step: two bfloat16 neighbours, or one float32.
// factors: null, or of the channels of rows 1 to 15 (CHANNEL), padded to 32.
template <bool PAIRS, int CODEC, bool WHOLE>
inline void take_keys(const uint8_t* rows, int width, int steps, uint32_t* to, const float* factors = nullptr) {
    const int row_bytes = width * number_bytes(CODEC);
    for (int k = 0; k < steps; k += LANES) {
        U32 m[16];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) {
            const uint8_t* row = rows + j * row_bytes;
            const auto some = [&](int at) {
                const F32 v = numbers<CODEC, WHOLE>(row, at, width);
                return CODEC == CHANNEL && j > 0 ? v * load<F32>(factors + at) : v;
            };
            if (PAIRS)
                m[j] = pack_exact(some(2 * k), some(2 * k + LANES));
            else
                m[j] = (U32)some(k);
        }
        transpose(m);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store(to + (int64_t)(k + j) * LANES, m[j]);
    }
}

// Values of key pairs (PAIRS) or of single keys, decoded on demand: `take` returns 32 bits per column, [step][columns].
template <bool PAIRS, int CODEC, bool WHOLE>
struct Values {
    static constexpr bool READS_SINGLE = true;  // has `one`
    const TileRows& tile;
    int width, held;
    template <int WIDE>
    __attribute__((always_inline)) void take(int step, int column, U32 (&to)[WIDE]) const {
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; c++) {
            if (!PAIRS) {
                to[c] = (U32)get(step, column + c * LANES);
                continue;
            }
            const F32 first = get(2 * step, column + c * LANES), second = one(2 * step + 1, column + c * LANES);
            to[c] = ((U32)first >> 16) | ((U32)second & 0xFFFF0000u);
        }
    }
    // A neighbour beyond the sequence has zero weight; its bytes are arbitrary and are not read.
    F32 one(int j, int column) const { return j < held ? get(j, column) : F32{}; }
    F32 get(int j, int column) const {
        return numbers<CODEC, WHOLE>(tile.rows[j / LANES] + j % LANES * tile.row_bytes, column, width);
    }
};
// The same for FP8, E5M2 and INT8, 64 columns at a time, in another column order (simd.h: restore_columns). Every code decodes to
// a finite number.
template <int CODEC>
struct ValuesBy64 {
    static constexpr bool READS_SINGLE = false;
    const TileRows& tile;
    const Ahead& ahead;
    template <int WIDE>
    __attribute__((always_inline)) void take(int step, int column, U32 (&to)[WIDE]) const {
        const int group = 2 * step / LANES, at = 2 * step % LANES * tile.row_bytes + column;
        const uint8_t* row = tile.rows[group] + at;
        ahead.ask(group, at), ahead.ask(group, at + tile.row_bytes);
        U32 all[4];
        decode_two_rows<CODEC>(row, row + tile.row_bytes, all);
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; c++) to[c] = all[c];  // WIDE is 4 for these rows
    }
};
// Values that were decoded into scratch [steps][columns].
struct ValuesKept {
    static constexpr bool READS_SINGLE = false;
    const uint32_t* values;
    int columns;
    template <int WIDE>
    __attribute__((always_inline)) void take(int step, int column, U32 (&to)[WIDE]) const {
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; c++) to[c] = load<U32>(values + step * columns + column + c * LANES);
    }
};

}  // namespace cache
