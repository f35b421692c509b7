// Least and greatest number of each row, searched by pieces of columns. Each thread searches the pieces in its own cache.
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

// Extremes of row[first ... end).
inline Found look(const float* row, int first, int end) {
    using namespace simd;
    F32 low = splat(INFINITY), high = splat(-INFINITY);
    SeesNan sees;
    Found found;
    int i = first;
    for (; i + LANES <= end; i += LANES) {
        const F32 v = load<F32>(row + i);
        sees.look(v);
        low = -larger(-v, -low), high = larger(v, high);  // `larger` of a NaN and a number is the number
    }
    found.least = -largest(-low), found.greatest = largest(high), found.any_nan = sees.any();
    for (; i < end; i++) {
        found.least = std::min(found.least, row[i]), found.greatest = std::max(found.greatest, row[i]);
        found.any_nan = found.any_nan || row[i] != row[i];
    }
    return found;
}

// Search over rows of float32 [rows, width]. Call `begin` with the columns of a piece, `look` once per piece, then `settle`.
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
    // Combine the pieces into the answers of twostroke_extremes.
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
            best[r] = (int32_t)std::min<int64_t>(place - row(r), width_ - 1);  // past the end if all numbers are NaN
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
