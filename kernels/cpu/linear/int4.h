// Layout of 4-bit matrices with a scale per group of neighbours in k, and what their kernels share.
//
//   out[r, c] = sum over groups g of ( sum over k in g of x[r, k] * (q[c, k] - 8) - (zero[c, g] - 8) * sum over k in g of x[r, k] )
//               * scale[c, g] + bias[c]
// x is not rounded; q - 8 is exact in every kind of number, so weights are exact too. Within a group an output has one float32
// lane, from its first k to its last; groups are added from the first to the last. So an output's bits depend on its row and column
// alone, for any number of rows or threads. Without zero points the second term is left out.
//
// A panel of 16 columns is { scales [groups][16], zero points [groups][16] bytes }, padded to whole cache lines, then lines of 64
// bytes: eight neighbours in k. A line has 32 bits per column: of its eight numbers the even ones in the low half, the odd ones
// in the high half, the first in the lowest bits. So a shift brings two neighbours in k to the low bits of both halves. Numbers
// are stored as q - 8, signed, so that a shift to the left and one to the right make them integers.
#pragma once

#include <cstdint>
#include <vector>

#include "lanes.h"
#include "linear.h"

namespace linear {

constexpr int LINE_BYTES = 64, LINE_NUMBERS = 8, LINE_PAIRS = LINE_NUMBERS / 2;
constexpr int CENTRE = 8;  // subtracted from numbers and zero points

// Number `number` of a line.
inline F32 line_number(U32 line, int number) {
    const int shift = 4 * (number / 2) + 16 * (number % 2);
    return to_floats((I32)(line << (28 - shift)) >> 28);
}

inline int scale_bytes(int kind) { return kind == FLOAT32 ? 4 : 2; }

// Places within the panels of an INT4 matrix.
struct Int4Layout {
    int group, groups, scale_kind;
    bool has_zeros;
    int64_t zeros_at, lines_at, panel_bytes;
    Int4Layout(int inner, int group, int scale_kind, bool has_zeros)
        : group(group), groups(inner / group), scale_kind(scale_kind), has_zeros(has_zeros) {
        zeros_at = (int64_t)groups * LANES * scale_bytes(scale_kind);
        const int64_t end = zeros_at + (has_zeros ? (int64_t)groups * LANES : 0);
        lines_at = (end + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
        panel_bytes = lines_at + (int64_t)inner / LINE_NUMBERS * LINE_BYTES;
    }
    explicit Int4Layout(const Matrix& m) : Int4Layout(m.inner, m.group, m.scale_kind, m.has_zeros) {}

    int group_bytes() const { return group / LINE_NUMBERS * LINE_BYTES; }

    // Scales of one group of a panel.
    F32 scales(const char* panel, int at) const {
        const char* from = panel + (int64_t)at * LANES * scale_bytes(scale_kind);
        return scale_kind == FLOAT32 ? load<F32>(from) : scale_kind == BFLOAT16 ? load_bf16((const uint16_t*)from) : load_half(from);
    }
    // CENTRE minus the zero points of one group of a panel.
    F32 shifts(const char* panel, int at) const {
        const I32 zeros = (I32)widen_u8(panel + zeros_at + (int64_t)at * LANES);
        return to_floats((I32)splat_u32(CENTRE) - zeros);
    }
};

// Sums of each row's groups, [rows][groups]; needed with zero points only. `order`: null, or as in Matrix.
class GroupSums {
   public:
    GroupSums(const Matrix& m, const Rows& x, const int32_t* order, Threads& threads) {
        if (!m.has_zeros) return;
        groups_ = m.inner / m.group;
        sums_.resize((size_t)x.rows * groups_);
        threads.share(x.rows, [&](int row) {
            for (int g = 0; g < groups_; g++) sums_[(size_t)row * groups_ + g] = of_group(x, row, g * m.group, m.group, order);
        });
    }
    float of(int row, int group) const { return sums_[(size_t)row * groups_ + group]; }

   private:
    static float of_group(const Rows& x, int row, int first, int count, const int32_t* order) {
        F32 sum{};
        for (int k = 0; k < count; k += LANES) sum = sum + some(x, row * x.stride, first + k, std::min(LANES, count - k), order);
        return simd::sum(sum);
    }
    static F32 some(const Rows& x, int64_t row, int k, int count, const int32_t* order) {
        if (!order) return get(x.data, x.kind, row + k, count);
        F32 v{};
        for (int i = 0; i < count; i++) v[i] = number(x, row + order[k + i]);
        return v;
    }
    std::vector<float> sums_;
    int groups_ = 0;
};

}  // namespace linear
