// The least and the greatest number of rows, found piece by piece, by whichever thread has a piece in its cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "api.h"
#include "simd.h"

namespace extremes {

struct Found {
    float least = INFINITY, greatest = -INFINITY;
    bool any_nan = false;
};

// Of row[first ... end).
inline Found look(const float* row, int first, int end) {
    using namespace simd;
    F32 low = splat(INFINITY), high = splat(-INFINITY);
    SeesNan sees;
    Found found;
    int i = first;
    for (; i + LANES <= end; i += LANES) {
        const F32 v = load<F32>(row + i);
        sees.look(v);
        low = -larger(-v, -low), high = larger(v, high);  // of a NaN and another: the other
    }
    found.least = -largest(-low), found.greatest = largest(high), found.any_nan = sees.any();
    for (; i < end; i++) {
        found.least = std::min(found.least, row[i]), found.greatest = std::max(found.greatest, row[i]);
        found.any_nan = found.any_nan || row[i] != row[i];
    }
    return found;
}

// Rows of float32 [rows, width] in pieces of so many columns. `begin`, then `look` once at each piece, then `settle`.
class Search {
   public:
    Search(const Rows& x, int width) : x_(x), width_(width) {}

    void begin(int columns) {
        columns_ = columns, pieces_ = (width_ + columns - 1) / columns;
        found_.resize((int64_t)x_.rows * pieces_);
    }
    int pieces() const { return pieces_; }
    void look(int piece) {
        for (int r = 0; r < x_.rows; r++)
            found_[(int64_t)r * pieces_ + piece] = extremes::look(row(r), piece * columns_, end(piece));
    }
    // Per row: its least number, NaN where it holds one; its greatest, and the first place of that. No promise of the last
    // two with a NaN.
    void settle(float* least, float* greatest, int32_t* best) const {
        for (int r = 0; r < x_.rows; r++) {
            const Found* found = &found_[(int64_t)r * pieces_];
            int at = 0;
            bool any_nan = false;
            float low = INFINITY, high = -INFINITY;
            for (int piece = 0; piece < pieces_; piece++) {
                low = std::min(low, found[piece].least), any_nan = any_nan || found[piece].any_nan;
                if (found[piece].greatest > high) high = found[piece].greatest, at = piece;
            }
            least[r] = any_nan ? NAN : low, greatest[r] = high;
            const float* place = std::find(row(r) + at * columns_, row(r) + end(at), high);
            best[r] = (int32_t)std::min<int64_t>(place - row(r), width_ - 1);  // past the end: nothing but NaN was there
        }
    }

   private:
    const float* row(int r) const { return (const float*)x_.data + r * x_.stride; }
    int end(int piece) const { return std::min(width_, (piece + 1) * columns_); }

    const Rows x_;
    const int width_;
    int columns_ = 0, pieces_ = 0;
    std::vector<Found> found_;  // [rows][pieces]
};

}  // namespace extremes
