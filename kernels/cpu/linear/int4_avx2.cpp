// linear/int4.cpp for machines with AVX2 and without AVX-512: the same sums in the same order, so the same bits as float32 products
// there. Rows are blocks of float32, as in linear/avx2.cpp.
#include "api.h"
#include "int4.h"

#if defined(TWOSTROKE_AVX2)

#include "avx2_blocks.h"

namespace linear {

namespace {

constexpr int FEW_ROWS = 48;  // up to this many rows, panels are read once for all blocks

struct Int4Weights {
    static constexpr int NUMBERS = LINE_NUMBERS, BYTES = LINE_BYTES;
    TWOSTROKE_INLINE static F32 take(const char* at, int number) { return line_number(load<U32>(at), number); }
};

class Product {
   public:
    Product(const Job& job, const GroupSums& sums)
        : job_(job), layout_(*job.matrix), sums_(sums), x_((const float*)job.packed), of_(job.num_rows) {}

    void multiply(Threads& threads) const {
        share_panels(job_, threads, layout_.panel_bytes, [&](int begin, int end) {
            F32 gates[FEW_ROWS];
            int at = begin;
            if (job_.num_rows == 1) {
                for (; at + 4 <= end; at += 4) one_row<4>(at);
                for (; at + 2 <= end; at += 2) one_row<2>(at);
                if (at < end) one_row<1>(at);
            } else if (job_.num_rows <= FEW_ROWS) {
                for (; at < end; at++)
                    for (int b = 0; b < of_.blocks; b++) {
                        const int64_t part = layout_.panel_bytes / of_.blocks;
                        block_by_panel(b, at, {panel(at + 1) + b * part, LINE_BYTES / of_.blocks}, gates + of_.first(b));
                    }
            } else {
                for (int b = 0; b < of_.blocks; b++)
                    for (at = begin; at < end; at++)
                        block_by_panel(b, at, {panel(at) + layout_.lines_at + 8 * LINE_BYTES, LINE_BYTES}, gates);
            }
        });
    }

   private:
    const char* panel(int i) const { return (const char*)job_.matrix->panels + i * layout_.panel_bytes; }

    // Add the sums of one group to those of a row before it.
    TWOSTROKE_INLINE void add_group(int row, int group, F32 scales, F32 shifts, F32 of_group, F32& sum) const {
        if (layout_.has_zeros) of_group = fma(shifts, splat(sums_.of(row, group)), of_group);
        sum = fma(of_group, scales, sum);
    }

    // One row by panels [first, first + PANELS): their sums do not depend on each other, which hides the products' latency.
    template <int PANELS>
    void one_row(int first) const {
        F32 sums[PANELS] = {};
        const int64_t bytes = layout_.panel_bytes;
        const char *const from = panel(first), *at = from + layout_.lines_at;
        const float* x = x_;
        for (int group = 0; group < layout_.groups; group++) {
            F32 acc[PANELS] = {};
            for (const char* end = at + layout_.group_bytes(); at < end; at += LINE_BYTES, x += LINE_NUMBERS) {
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; p++) __builtin_prefetch(at + p * bytes + PANELS * bytes, 0, 2);
#pragma GCC unroll 8
                for (int number = 0; number < LINE_NUMBERS; number++) {
                    const __m256 one = _mm256_broadcast_ss(x + number);
#pragma GCC unroll 4
                    for (int p = 0; p < PANELS; p++)
                        acc[p] = fma(Int4Weights::take(at + p * bytes, number), {one, one}, acc[p]);
                }
            }
            for (int p = 0; p < PANELS; p++) {
                const char* w = from + p * bytes;
                add_group(0, group, layout_.scales(w, group), layout_.has_zeros ? layout_.shifts(w, group) : F32{}, acc[p], sums[p]);
            }
        }
        F32 gate{};
        for (int p = 0; p < PANELS; p++) put_block(job_, 0, 1, first + p, sums + p, &gate);
    }

    // A block of rows by one panel.
    void block_by_panel(int b, int at, Ahead ahead, F32* gates) const {
        const int rows = of_.size(b), first = of_.first(b);
        const float* x = x_ + (int64_t)first * job_.matrix->inner;
        const char* w = panel(at) + layout_.lines_at;
        const int steps = layout_.group / LINE_NUMBERS;
        F32 sums[WIDE_ROWS] = {};
        for (int group = 0; group < layout_.groups; group++) {
            F32 acc[WIDE_ROWS] = {};
            add_block<Int4Weights>(rows, x, w, steps, ahead, acc);
            const F32 scales = layout_.scales(panel(at), group), shifts = layout_.has_zeros ? layout_.shifts(panel(at), group) : F32{};
            for (int r = 0; r < rows; r++) add_group(first + r, group, scales, shifts, acc[r], sums[r]);
            x += (int64_t)rows * layout_.group, w += layout_.group_bytes(), ahead.at += steps * ahead.step;
        }
        put_block(job_, first, rows, at, sums, gates);
    }

    const Job& job_;
    const Int4Layout layout_;
    const GroupSums& sums_;
    const float* x_;
    const Division of_;
};

}  // namespace

void multiply_int4(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads) {
    const Matrix& m = *job.matrix;
    const Division of(x.rows);
    threads.share(of.blocks, [&](int b) {
        interleave(x, of.first(b), of.size(b), m.inner, m.order, (float*)scratch + (int64_t)of.first(b) * m.inner);
    });
    const GroupSums sums(m, x, m.order, threads);
    Product(job, sums).multiply(threads);
}

}  // namespace linear

#endif
