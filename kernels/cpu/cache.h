// Reads of one component of the cache for attention: rows of sixteen tokens at a time, in any codec.
#pragma once

#include <algorithm>

#include "api.h"
#include "simd.h"

namespace cache {

using namespace simd;

// Positions per tile. Block sizes are multiples of 16 tokens, so 16 rows of a head are always contiguous.
constexpr int TILE = 64, GROUPS = TILE / LANES;

inline int number_bytes(int codec) { return codec == FP8 ? 1 : codec == BFLOAT16 ? 2 : 4; }

// Sixteen numbers of a row from `at` on, without its scale; fp8 numbers are divided by 256. WHOLE: no number is missing.
template <int CODEC, bool WHOLE>
inline F32 numbers(const uint8_t* row, int at, int width) {
    const int count = WHOLE ? LANES : std::min(LANES, width - at);
    if (!WHOLE && count <= 0) return F32{};
    U8x16 codes{};
    U16x16 bits{};
    F32 v{};
    void* to = CODEC == FP8 ? (void*)&codes : CODEC == BFLOAT16 ? (void*)&bits : (void*)&v;
    const int size = CODEC == FP8 ? 1 : CODEC == BFLOAT16 ? 2 : 4;
    if (WHOLE)
        std::memcpy(to, row + (int64_t)at * size, LANES * size);
    else
        std::memcpy(to, row + (int64_t)at * size, count * size);
    return CODEC == FP8 ? decode_e4m3_by_256(codes) : CODEC == BFLOAT16 ? widen(bits) : v;
}

// Addresses of the rows of one head and one tile.
struct TileRows {
    const uint8_t* rows[GROUPS];     // of sixteen tokens each; null where the sequence holds none
    const uint8_t* exponents[GROUPS];  // fp8: their scales
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
            if (plane.codec == FP8) exponents[g] = plane.scales + place;
        }
    }
    // Scales of a group's rows. divided: the numbers were divided by 256, so the scales are multiplied by it.
    F32 scales(int g, bool divided) const {
        if (exponents[g] == nullptr) return splat(1.0f);
        return (F32)((widen_u8(exponents[g]) + (divided ? 8u : 0u)) << 23);
    }
};

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
template <bool PAIRS, int CODEC, bool WHOLE>
inline void take_keys(const uint8_t* rows, int width, int steps, uint32_t* to) {
    const int row_bytes = width * number_bytes(CODEC);
    for (int k = 0; k < steps; k += LANES) {
        U32 m[16];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) {
            const uint8_t* row = rows + j * row_bytes;
            if (PAIRS)
                m[j] = pack_exact(numbers<CODEC, WHOLE>(row, 2 * k, width), numbers<CODEC, WHOLE>(row, 2 * k + LANES, width));
            else
                m[j] = (U32)numbers<CODEC, WHOLE>(row, k, width);
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
// The same for fp8, 64 columns at a time, in another column order (simd.h: restore_columns). Every code decodes to a finite
// number.
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
        decode_two_rows(row, row + tile.row_bytes, all);
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
