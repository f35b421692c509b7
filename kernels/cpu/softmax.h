// Online softmax over tiles of keys: the state of rows between tiles, and the conversion of scores into weights.
//
//     m' = max(m, max_j s_j)      l = l * 2**(m - m') + sum_j 2**(s_j - m')      shrink = 2**(m - m')
// Sixteen rows computed together have the bits of a row computed alone: lanes are reduced by the same tree.
// Source: Milakov and Gimelshein 2018.
#pragma once

#include <algorithm>
#include <cmath>

#include "cache/cache.h"
#include "simd.h"

namespace softmax {

using namespace simd;
using cache::GROUPS, cache::TILE;

constexpr int MOST_ROWS = 192;
constexpr float NEVER = -INFINITY;

// Parameters of one tile.
struct Tile {
    int start, window;   // its first position; keys that a row sees at most, or 0: all
    float softcap;       // 0: none
    F32 scales[GROUPS];  // scales of the values; weights are multiplied by them
};

// Scores [rows][TILE] become weights in place. PAIRS: weights are pairs of bfloat16 in the first half of each row.
template <bool PAIRS>
class Softmax {
   public:
    float top[MOST_ROWS], total[MOST_ROWS], shrink[MOST_ROWS];
    int position[MOST_ROWS];  // of each row, which is the last key that it sees
    alignas(64) float scores[MOST_ROWS * TILE];

    void begin(int rows) {
        std::fill(top, top + rows, NEVER);
        std::fill(total, total + rows, 0.0f);
    }

    // Compute the weights of rows [row, end).
    void weigh(int row, int end, const Tile& tile) {
#if defined(__AVX512F__)
        for (; row + LANES <= end; row += LANES) weigh_sixteen(row, tile);
#endif
        for (; row < end; row++) weigh_one(row, tile);
    }

   private:
    inline static const I32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    void weigh_one(int row, const Tile& tile) {
        const float greatest = larger(splat(top[row]), splat(largest(see(row, tile))))[0];
        if (greatest == NEVER) {
            shrink[row] = 1.0f;
            std::fill(scores + row * TILE, scores + (row + 1) * TILE, 0.0f);
            return;
        }
        shrink[row] = power_of_two(splat(top[row] - greatest))[0];
        top[row] = greatest;
        total[row] = total[row] * shrink[row] + sum(raise(row, greatest, tile));
    }

#if defined(__AVX512F__)
    void weigh_sixteen(int row, const Tile& tile) {
        U32 lanes[LANES];
#pragma GCC unroll 1
        for (int r = 0; r < LANES; r++) lanes[r] = (U32)see(row + r, tile);
        const F32 before = load<F32>(top + row), greatest = larger(before, across<larger>(lanes));
        const I32 none = (I32)(greatest == splat(NEVER));
        const F32 shrunk = select(none, splat(1.0f), power_of_two(before - greatest));
        float base[LANES];
        store(base, select(none, splat(0.0f), greatest));
        store(top + row, greatest), store(shrink + row, shrunk);
#pragma GCC unroll 1
        for (int r = 0; r < LANES; r++) lanes[r] = (U32)raise(row + r, base[r], tile);
        store(total + row, load<F32>(total + row) * shrunk + across<plus>(lanes));
    }
    static F32 plus(F32 a, F32 b) { return a + b; }
    // Reduce the lanes of each of sixteen vectors, in the order of `sum`.
    template <F32 (*BOTH)(F32, F32)>
    static F32 across(U32 (&lanes)[LANES]) {
        transpose(lanes);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lanes[i] = (U32)BOTH((F32)lanes[i], (F32)lanes[i + half]);
        return (F32)lanes[0];
    }
#endif

    // Cap a row's scores, and set those of keys that it does not see to NEVER. Returns the largest score of each lane.
    F32 see(int row, const Tile& tile) {
        float* at = scores + row * TILE;
        const int last = position[row] - tile.start;                  // the last key that the row sees
        const int first = tile.window ? last - tile.window + 1 : -1;  // the first key that the row sees
        const bool some = last < TILE - 1 || first > 0;
        F32 score[GROUPS];
        for (int g = 0; g < GROUPS; g++) score[g] = load<F32>(at + g * LANES);
        if (tile.softcap != 0.0f || some) {
            for (int g = 0; g < GROUPS; g++) {
                if (tile.softcap != 0.0f)
                    score[g] = splat(tile.softcap * LOG2_E) * hyperbolic_tangent(score[g] / splat(tile.softcap));
                const I32 key = COUNT + g * LANES;
                if (some) score[g] = select((I32)(key <= last) & (I32)(key >= first), score[g], splat(NEVER));
                store(at + g * LANES, score[g]);
            }
        }
        return larger(larger(score[0], score[1]), larger(score[2], score[3]));
    }

    // Turn a row's scores into weights. Returns their sums per lane, before scaling and rounding.
    F32 raise(int row, float base, const Tile& tile) {
        float* at = scores + row * TILE;
        F32 weight[GROUPS];
        for (int g = 0; g < GROUPS; g++) weight[g] = power_of_two(load<F32>(at + g * LANES) - splat(base));
        const F32 sums = (weight[0] + weight[1]) + (weight[2] + weight[3]);
        for (int g = 0; g < GROUPS; g++) weight[g] = weight[g] * tile.scales[g];
        for (int g = 0; g < GROUPS; g += PAIRS ? 2 : 1) {
            if (PAIRS)
                store(at + g / 2 * LANES, pack_rounded(weight[g], weight[g + 1]));
            else
                store(at + g * LANES, weight[g]);
        }
        return sums;
    }
};

}  // namespace softmax
