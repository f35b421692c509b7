// Linear layers on machines with AVX2 and without AVX-512: sixteen registers of eight lanes.
//
// Rows are converted to float32 and interleaved, so that a kernel reads one row's number after the other: blocks of up to six
// rows, [inner][rows of the block]. A kernel multiplies a block by one panel with twelve accumulators. Sums have the order of
// linear.cpp: one accumulator per output, from the first k to the last.
//
// Few rows: a panel is read once for all blocks, a piece of k at a time, and the next panel is prefetched meanwhile. Many rows: a
// block of rows is read once for a stretch of panels that stays in the second-level cache.
// Source: blocking for registers and caches as in Goto and van de Geijn 2008.
#include "api.h"
#include "linear.h"

#if defined(TWOSTROKE_AVX2)

#include <vector>

#include "avx2_blocks.h"
#include "coded.h"

namespace linear {

namespace {

constexpr int FEW_ROWS = 48;                // up to this many rows, panels are read once for all blocks (measured)
constexpr int PIECE_GROUPS = 16;            // coded groups that are decoded together: 8 KiB, in the first-level cache
constexpr int64_t ONE_ROW_AHEAD_BYTES = 4096;  // prefetch distance of one row's kernel

struct Bfloat16Weights {
    static constexpr int NUMBERS = 2, BYTES = 64;
    TWOSTROKE_INLINE static F32 take(const char* at, int number) {
        const U32 both = load<U32>(at);
        return (F32)(number ? both & 0xFFFF0000u : both << 16);
    }
};
struct Float32Weights {
    static constexpr int NUMBERS = 1, BYTES = 64;
    TWOSTROKE_INLINE static F32 take(const char* at, int) { return load<F32>(at); }
};
struct Int8Weights {
    static constexpr int NUMBERS = 1, BYTES = 16;
    TWOSTROKE_INLINE static F32 take(const char* at, int) { return widen_i8(at); }
};

class Product {
   public:
    explicit Product(const Job& job) : job_(job), matrix_(*job.matrix), x_((const float*)job.packed), of_(job.num_rows) {}

    const char* panel(int i) const { return (const char*)matrix_.panels + i * matrix_.panel_bytes; }

    // One row, panels [panel, panel + PANELS) at once: their accumulators and their reads are independent of each other.
    template <class W, int PANELS>
    void one_row(int first) const {
        F32 acc[PANELS] = {};
        const char* w = panel(first);
        const float* x = x_;
        for (int step = 0; step < matrix_.inner / W::NUMBERS; step++, x += W::NUMBERS, w += W::BYTES) {
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) {
                __builtin_prefetch(w + p * matrix_.panel_bytes + ONE_ROW_AHEAD_BYTES, 0, 2);
#pragma GCC unroll 2
                for (int number = 0; number < W::NUMBERS; number++) {
                    const __m256 one = _mm256_broadcast_ss(x + number);
                    acc[p] = fma(W::take(w + p * matrix_.panel_bytes, number), {one, one}, acc[p]);
                }
            }
        }
        F32 gate{};
        for (int p = 0; p < PANELS; p++) put_block(job_, 0, 1, first + p, acc + p, &gate);
    }
    template <int PANELS>
    void one_row_coded(int first) const {
        F32 acc[PANELS] = {};
        coded::Panel one(panel(first), matrix_.panel_bytes, matrix_.inner);
        coded::Panel other(panel(first + PANELS - 1), matrix_.panel_bytes, matrix_.inner);
        const float* x = x_;
        for (int k = 0; k < matrix_.inner; k += coded::INNER_MULTIPLE, x += coded::INNER_MULTIPLE) {
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) {
                U32 steps[coded::STEPS];
                (p ? other : one).next(steps, ONE_ROW_AHEAD_BYTES);
#pragma GCC unroll 4
                for (int i = 0; i < coded::STEPS; i++) {
                    const __m256 even = _mm256_broadcast_ss(x + 2 * i), odd = _mm256_broadcast_ss(x + 2 * i + 1);
                    acc[p] = fma((F32)(steps[i] << 16), {even, even}, acc[p]);
                    acc[p] = fma((F32)(steps[i] & 0xFFFF0000u), {odd, odd}, acc[p]);
                }
            }
        }
        F32 gate{};
        for (int p = 0; p < PANELS; p++) put_block(job_, 0, 1, first + p, acc + p, &gate);
    }

    // A panel for few rows. The blocks share the prefetches of the next panel.
    template <class W>
    void few_rows(int at, F32* gates) const {
        const int64_t part = matrix_.panel_bytes / of_.blocks;
        for (int b = 0; b < of_.blocks; b++) {
            F32 sums[WIDE_ROWS] = {};
            const Ahead ahead{panel(at + 1) + b * part, W::BYTES / of_.blocks};
            add_block<W>(of_.size(b), block(b), panel(at), matrix_.inner / W::NUMBERS, ahead, sums);
            put_block(job_, of_.first(b), of_.size(b), at, sums, gates + of_.first(b));
        }
    }
    void few_rows_coded(int at, F32* gates) const {
        constexpr int MOST_STEPS = PIECE_GROUPS * coded::STEPS;
        F32 sums[FEW_ROWS] = {};
        U32 piece[MOST_STEPS];
        coded::Panel groups(panel(at), matrix_.panel_bytes, matrix_.inner);
        const int num_groups = matrix_.inner / coded::INNER_MULTIPLE;
        for (int group = 0; group < num_groups; group += PIECE_GROUPS) {
            const int count = std::min(PIECE_GROUPS, num_groups - group), steps = count * coded::STEPS;
            const char* next = groups.at() + PIECE_GROUPS * coded::GROUP_BYTES;
            for (int i = 0; i < count; i++) groups.next((U32(&)[coded::STEPS])piece[i * coded::STEPS]);
            const int64_t share = PIECE_GROUPS * coded::GROUP_BYTES / of_.blocks;
            for (int b = 0; b < of_.blocks; b++) {
                const float* x = block(b) + (int64_t)group * coded::INNER_MULTIPLE * of_.size(b);
                const Ahead ahead{next + b * share, share / MOST_STEPS};
                add_block<Bfloat16Weights>(of_.size(b), x, (const char*)piece, steps, ahead, sums + of_.first(b));
            }
        }
        put_block(job_, 0, job_.num_rows, at, sums, gates);
    }

    // Panels [begin, end) for many rows; `w`: their weights, one panel every `bytes`.
    template <class W>
    void many_rows(int begin, int end, const char* w, int64_t bytes) const {
        for (int b = 0; b < of_.blocks; b++) {
            F32 gates[WIDE_ROWS];
            for (int at = begin; at < end; at++) {
                F32 sums[WIDE_ROWS] = {};
                const char* from = w + (at - begin) * bytes;
                add_block<W>(of_.size(b), block(b), from, matrix_.inner / W::NUMBERS, {from + W::BYTES * 8, W::BYTES}, sums);
                put_block(job_, of_.first(b), of_.size(b), at, sums, gates);
            }
        }
    }

    template <class W>
    void multiply(Threads& threads) const {
        share_panels(job_, threads, matrix_.panel_bytes, [&](int begin, int end) {
            F32 gates[FEW_ROWS];
            int at = begin;
            if (job_.num_rows == 1) {
                for (; at + 2 <= end; at += 2) one_row<W, 2>(at);
                if (at < end) one_row<W, 1>(at);
            } else if (job_.num_rows <= FEW_ROWS) {
                for (; at < end; at++) few_rows<W>(at, gates);
            } else {
                many_rows<W>(begin, end, panel(begin), matrix_.panel_bytes);
            }
        });
    }
    void multiply_coded(Threads& threads) const {
        const int64_t bytes = (int64_t)LANES * 2 * matrix_.inner;
        const bool many = job_.num_rows > FEW_ROWS;
        share_panels(job_, threads, many ? bytes : matrix_.panel_bytes, [&](int begin, int end) {
            F32 gates[FEW_ROWS];
            int at = begin;
            if (job_.num_rows == 1) {
                for (; at + 2 <= end; at += 2) one_row_coded<2>(at);
                if (at < end) one_row_coded<1>(at);
            } else if (!many) {
                for (; at < end; at++) few_rows_coded(at, gates);
            } else {
                many_rows<Bfloat16Weights>(begin, end, decoded(begin, end), bytes);
            }
        });
    }

   private:
    const float* block(int b) const { return x_ + (int64_t)of_.first(b) * matrix_.inner; }

    // Panels [begin, end), decoded to bfloat16 in memory of this thread that is valid until its next call.
    const char* decoded(int begin, int end) const {
        static thread_local std::vector<U32> memory;
        const int steps = matrix_.inner / 2;
        memory.resize(std::max<size_t>(memory.size(), (int64_t)(end - begin) * steps));
        U32* to = memory.data();
        for (int at = begin; at < end; at++) {
            coded::Panel groups(panel(at), matrix_.panel_bytes, matrix_.inner);
            for (int step = 0; step < steps; step += coded::STEPS, to += coded::STEPS)
                groups.next((U32(&)[coded::STEPS])*to, PREFETCH_BYTES);
        }
        return (const char*)memory.data();
    }

    const Job& job_;
    const Matrix& matrix_;
    const float* x_;
    const Division of_;
};

}  // namespace

void multiply_avx2(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads) {
    const int inner = job.matrix->inner;
    const Division of(x.rows);
    threads.share(of.blocks, [&](int b) {
        interleave(x, of.first(b), of.size(b), inner, nullptr, (float*)scratch + (int64_t)of.first(b) * inner);
    });
    const Product product(job);
    switch (job.matrix->kind) {
        case CODED: return product.multiply_coded(threads);
        case BFLOAT16: return product.multiply<Bfloat16Weights>(threads);
        case INT8: return product.multiply<Int8Weights>(threads);
        default: return product.multiply<Float32Weights>(threads);
    }
}

}  // namespace linear

#endif
