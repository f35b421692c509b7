// Rows of x in blocks that a kernel keeps in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "avx2.h"

namespace linear {

// Rows and panels of one inner kernel, bounded by the registers.
#if defined(__AVX512F__)
constexpr int WIDE_ROWS = 12, WIDE_PANELS = 2;  // 24 accumulators of 32 registers
constexpr int TALL_ROWS = 16;                   // one panel: a decode batch of 16 reads its weights once
#elif defined(TWOSTROKE_AVX2)
constexpr int WIDE_ROWS = 6, WIDE_PANELS = 1;  // 12 accumulators of eight lanes, of 16 registers
constexpr int TALL_ROWS = 6;
#else
constexpr int WIDE_ROWS = 4, WIDE_PANELS = 1;
constexpr int TALL_ROWS = 4;
#endif

// Rows divided into as few blocks as fit the registers, of nearly equal size.
struct Division {
    int rows, blocks;
    explicit Division(int count) : rows(count), blocks((count + WIDE_ROWS - 1) / WIDE_ROWS) {}
    int first(int block) const { return (int)((int64_t)rows * block / blocks); }
    int size(int block) const { return first(block + 1) - first(block); }
};

// Rows of x as stored, in words of 32 bits: two bfloat16 or one float32.
struct Block {
    const char* x;
    int64_t stride;  // bytes
    int first, rows;
};

// Number of rows that a block is padded to: the next size for which a kernel exists.
inline int padded_rows(int rows) {
    for (int size : {1, 2, 4, 6, 8, 12, 16})
        if (rows <= size) return size;
    return TALL_ROWS;
}

inline int block_rows(int num_rows) { return num_rows <= TALL_ROWS ? TALL_ROWS : WIDE_ROWS; }

// x divided into blocks. Blocks are read in place; an incomplete last block is copied to scratch and padded with zeros.
class Blocks {
   public:
    Blocks(const Rows& x, int steps, char* scratch)
        : x_((const char*)x.data),
          stride_(x.stride * (x.kind == BFLOAT16 ? 2 : 4)),
          bytes_(4 * (int64_t)steps),
          num_rows_(x.rows),
          size_(block_rows(x.rows)) {
        const int rows = (num_rows_ - 1) % size_ + 1, padded = padded_rows(rows);
        if (rows == padded) return;
        filled_up_ = scratch;
        for (int r = 0; r < rows; r++) std::memcpy(scratch + r * bytes_, x_ + (num_rows_ - rows + r) * stride_, bytes_);
        std::memset(scratch + rows * bytes_, 0, (padded - rows) * bytes_);
    }
    int size() const { return size_; }
    Block from(int first) const {
        const int rows = std::min(size_, num_rows_ - first);
        if (filled_up_ && first + rows == num_rows_) return {filled_up_, bytes_, first, rows};
        return {x_ + first * stride_, stride_, first, rows};
    }

   private:
    const char *x_, *filled_up_ = nullptr;
    int64_t stride_, bytes_;
    int num_rows_, size_;
};

}  // namespace linear
