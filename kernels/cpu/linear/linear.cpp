// Linear layers over packed matrices. The order of summation of an output is the same for any number of rows or threads.
//
// A matrix [columns, inner] is stored in panels of 16 columns. Within a panel, numbers are in the order in which the kernel
// reads them: bfloat16 as [inner / 2][16 columns][2 neighbours in k]; float32, and int8 for float32 rows, as
// [inner][16 columns]. Coded bfloat16 (coded.h) is decoded into registers or, for many rows, into a buffer in the cache. One
// packed copy serves decode and prefill. pack.cpp writes panels.
//
// out[r, c] = ( sum over k = 0, 1, 2 ... of x[r, k] * w[c, k] ) * scale[c] + bias[c]. Each output has one float32 accumulator
// lane, from the first k to the last; pairs of k go through dot_pairs. So an output's bits depend on its own row and column
// alone. On machines with AMX tiles, bfloat16 uses them for every number of rows: 32 k at a time, in the instruction's order.
// Int8 matrices for bfloat16 rows: linear/int8.cpp. 4-bit matrices: linear/int4.cpp.
#include <vector>

#include "api.h"
#include "coded.h"
#include "linear.h"
#include "row_blocks.h"
#include "tiles.h"

using namespace linear;

namespace {

// Consecutive panels.
struct Stretch {
    const char* panels;
    int64_t panel_bytes;
    int64_t ahead = PREFETCH_BYTES;  // prefetch distance in bytes
    Stretch from(int panel) const { return {panels + panel * panel_bytes, panel_bytes, ahead}; }
};

// Iterator over a panel, STEPS k-steps at a time, front to back. This form: kinds that are multiplied as stored, and INT8.
template <int KIND>
class Panel {
   public:
    static constexpr int STEPS = 1, MOST_TOGETHER = WIDE_PANELS;
    static constexpr bool TAKES_CODED = false;
    Panel(const Matrix&, const Stretch& from) : at_(from.panels), ahead_(from.ahead) {}
    void next(U32 (&steps)[STEPS]) {
        __builtin_prefetch(at_ + ahead_, 0, 2);
        steps[0] = KIND == INT8 ? (U32)widen_i8(at_) : load<U32>(at_);
        at_ += KIND == INT8 ? LANES : sizeof(U32);
    }
    static F32 add(F32 acc, U32 w, uint32_t x) {
        return KIND == BFLOAT16 ? dot_pairs(acc, w, splat_u32(x)) : fma((F32)w, (F32)splat_u32(x), acc);
    }

   private:
    const char* at_;
    const int64_t ahead_;
};

template <>
class Panel<CODED> {
   public:
    static constexpr int STEPS = coded::STEPS, MOST_TOGETHER = 1;
    static constexpr bool TAKES_CODED = true;
    Panel(const Matrix& m, const Stretch& from) : groups_(from.panels, m.panel_bytes, m.inner) {}
    void next(U32 (&steps)[STEPS]) { groups_.next(steps, PREFETCH_BYTES); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return dot_pairs(acc, w, splat_u32(x)); }

   private:
    coded::Panel groups_;
};

// Multiply ROWS rows by the first PANELS panels of `w`, which are the matrix's panels from `panel` on. Only the block's own
// rows are stored. Four rows share an address register: one register per row would be more than the machine has.
template <class P, int ROWS, int PANELS>
void kernel(const Job& job, const Block& block, const Stretch& w, int panel, F32* gates) {
    const int64_t stride = block.stride, places[4] = {0, stride, 2 * stride, 3 * stride};
    const char *x0 = block.x, *x4 = x0 + 4 * stride, *x8 = x4 + 4 * stride, *x12 = x8 + 4 * stride;
    F32 acc[ROWS][PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) acc[r][p] = F32{};
    P one(*job.matrix, w), other(*job.matrix, w.from(PANELS - 1));
    for (int k = 0; k < job.steps; k += P::STEPS) {
        U32 weights[PANELS][P::STEPS];
        one.next(weights[0]);
        if (PANELS == 2) other.next(weights[PANELS - 1]);
#pragma GCC unroll 4
        for (int step = 0; step < P::STEPS; step++)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                uint32_t word;
                std::memcpy(&word, (r < 4 ? x0 : r < 8 ? x4 : r < 12 ? x8 : x12) + places[r % 4] + 4 * step, 4);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++) acc[r][p] = P::add(acc[r][p], weights[p][step], word);
            }
        x0 += 4 * P::STEPS, x4 += 4 * P::STEPS, x8 += 4 * P::STEPS, x12 += 4 * P::STEPS;
        asm("" : "+r"(x0));  // keeps the compiler from one address register per row
        if (ROWS > 4) asm("" : "+r"(x4));
        if (ROWS > 8) asm("" : "+r"(x8));
        if (ROWS > 12) asm("" : "+r"(x12));
    }
    const bool plain = PANELS == 2 && is_plain(job, panel);
    if (plain && job.activation == NO_ACTIVATION && block.rows == ROWS) {
        uint16_t* to = place(job, block.first, panel);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++, to += job.out.stride) store(to, pack_rounded(acc[r][0], acc[r][PANELS - 1]));
        return;
    }
    F32 sums[ROWS][PANELS];  // in memory, so that the code below is not unrolled per row
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) sums[r][p] = acc[r][p];
    if (plain && job.activation != NO_ACTIVATION) return put_gates(job, block.first, panel, block.rows, sums[0]);
#pragma GCC unroll 1
    for (int r = 0; r < block.rows; r++) put_row<PANELS>(job, block.first + r, panel, sums[r], gates[r]);
}

template <class P, int PANELS>
void multiply_block(const Job& job, const Block& block, const Stretch& w, int panel, F32* gates) {
    switch (padded_rows(block.rows)) {
        case 1: return kernel<P, 1, PANELS>(job, block, w, panel, gates);
        case 2: return kernel<P, 2, PANELS>(job, block, w, panel, gates);
        case 4: return kernel<P, 4, PANELS>(job, block, w, panel, gates);
#if defined(__AVX512F__)
        case 6: return kernel<P, 6, PANELS>(job, block, w, panel, gates);
        case 8: return kernel<P, 8, PANELS>(job, block, w, panel, gates);
        case 12: return kernel<P, 12, PANELS>(job, block, w, panel, gates);
        case 16:
            for (int p = 0; p < PANELS; p++) kernel<P, 16, 1>(job, block, w.from(p), panel + p, gates);
#endif
    }
}

// From this many rows on, decoding a stretch once is faster than once per block of rows (measured).
constexpr int DECODED_ROWS = 64;

// Panels from `begin` on, as stored.
Stretch stored(const Matrix& m, int begin) { return {(const char*)m.panels + begin * m.panel_bytes, m.panel_bytes}; }

int64_t decoded_bytes(const Matrix& m) { return m.kind == CODED ? (int64_t)LANES * 2 * m.inner : m.panel_bytes; }

// Panels [begin, end), coded ones decoded to bfloat16 in memory of this thread, valid until its next call.
Stretch decoded(const Matrix& m, int begin, int end) {
    if (m.kind != CODED) return stored(m, begin);
    const int64_t bytes = decoded_bytes(m);
    static thread_local std::vector<U32> memory;
    memory.resize(std::max<size_t>(memory.size(), (end - begin) * bytes / sizeof(U32)));
    U32* to = memory.data();
    for (int panel = begin; panel < end; panel++) {
        coded::Panel groups((const char*)m.panels + panel * m.panel_bytes, m.panel_bytes, m.inner);
        for (int k = 0; k < m.inner; k += coded::INNER_MULTIPLE, to += coded::STEPS) {
            U32 steps[coded::STEPS];
            groups.next(steps, PREFETCH_BYTES);
            std::memcpy(to, &steps, sizeof steps);
        }
    }
    return {(const char*)memory.data(), bytes};
}

template <class P>
void multiply_blocks(const Job& job, const Blocks& x, Threads& threads) {
    const Matrix& m = *job.matrix;
    share_panels(job, threads, P::TAKES_CODED ? m.panel_bytes : decoded_bytes(m), [&](int begin, int end) {
        Stretch stretch = P::TAKES_CODED ? stored(m, begin) : decoded(m, begin, end);
        F32 gates[TALL_ROWS];
        for (int first = 0; first < job.num_rows; first += x.size()) {
            const Block block = x.from(first);
            // The last of several blocks finds its weights in the cache: it prefetches the next stretch.
            if (first && first + x.size() >= job.num_rows && end < num_panels(m))
                stretch.ahead = (int64_t)((uintptr_t)stored(m, end).panels - (uintptr_t)stretch.panels);
            for (int panel = begin; panel < end; panel += 2) {
                const Stretch w = stretch.from(panel - begin);
                if (panel + 1 < end && P::MOST_TOGETHER == 2 && job.num_rows > 1) {  // one row: memory-bound, one stream
                    multiply_block<P, P::MOST_TOGETHER>(job, block, w, panel, gates);
                    continue;
                }
                multiply_block<P, 1>(job, block, w, panel, gates);
                if (panel + 1 < end) multiply_block<P, 1>(job, block, w.from(1), panel + 1, gates);
            }
        }
    });
}

#if defined(TWOSTROKE_TILES)

constexpr int TILE_STEPS = 16;  // k-steps (pairs) per tile: sixteen steps of a panel are one tile as stored

bool by_tiles(const Matrix& m, bool pairs) { return pairs && m.inner % (2 * TILE_STEPS) == 0 && tiles::permitted(); }

// Pack rows of x into tiles [inner / 32][16 rows][64 bytes]; missing rows are zeros.
void pack_tiles(const Rows& x, int first, int steps, char* to) {
    const int rows = std::min(tiles::ROWS, x.rows - first);
    for (int k = 0; k < steps; k += TILE_STEPS)
        for (int r = 0; r < tiles::ROWS; r++, to += tiles::ROW_BYTES) {
            if (r < rows)
                std::memcpy(to, (const char*)x.data + ((int64_t)(first + r) * x.stride + 2 * k) * 2, tiles::ROW_BYTES);
            else
                std::memset(to, 0, tiles::ROW_BYTES);
        }
}

template <int T>
void load_weights(const char* panel, int step) {
    __builtin_prefetch(panel + (int64_t)step * 64 + 8192);
    tiles::load<T>(panel + (int64_t)step * 64);
}

// Store the sums of two panels, or of the first alone.
template <int T, int U>
void put_tiles(const Job& job, int row, int panel, bool second) {
    alignas(64) float one[tiles::ROWS][LANES], other[tiles::ROWS][LANES];
    tiles::save<T>(one), tiles::save<U>(other);
    for (int r = 0; r < std::min(tiles::ROWS, job.num_rows - row); r++) {
        if (job.activation != NO_ACTIVATION) {
            put_gated(job, row + r, panel, load<F32>(one[r]), load<F32>(other[r]));
            continue;
        }
        put_linear(job, row + r, panel, load<F32>(one[r]));
        if (second) put_linear(job, row + r, panel + 1, load<F32>(other[r]));
    }
}

// Multiply one block of 16 rows by up to four panels from `panel` on; for steps that memory bounds. Missing panels repeat the
// last one and are not stored.
void tile_strip(const Job& job, const Stretch& stretch, int row, int panel, int panels) {
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char* w[4];
    for (int p = 0; p < 4; p++) w[p] = stretch.from(std::min(p, panels - 1)).panels;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int k = 0; k < job.steps; k += TILE_STEPS, x += tiles::TILE_BYTES) {
        tiles::load<4>(x);
        load_weights<5>(w[0], k), tiles::dot<0, 4, 5>();
        load_weights<6>(w[1], k), tiles::dot<1, 4, 6>();
        load_weights<7>(w[2], k), tiles::dot<2, 4, 7>();
        load_weights<5>(w[3], k), tiles::dot<3, 4, 5>();
    }
    put_tiles<0, 1>(job, row, panel, panels > 1);
    if (panels > 2) put_tiles<2, 3>(job, row, panel + 2, panels > 3);
}

// Multiply two blocks of 16 rows by two panels; for steps that arithmetic bounds.
void tile_square(const Job& job, const Stretch& stretch, int row, int panel) {
    const char *w = stretch.panels, *other = stretch.from(1).panels;
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char *below = x + (int64_t)tiles::ROWS * job.steps * 4;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int k = 0; k < job.steps; k += TILE_STEPS, x += tiles::TILE_BYTES, below += tiles::TILE_BYTES) {
        tiles::load<4>(x), tiles::load<5>(below);
        load_weights<6>(w, k), load_weights<7>(other, k);
        tiles::dot<0, 4, 6>(), tiles::dot<1, 4, 7>(), tiles::dot<2, 5, 6>(), tiles::dot<3, 5, 7>();
    }
    put_tiles<0, 1>(job, row, panel, true);
    put_tiles<2, 3>(job, row + tiles::ROWS, panel, true);
}

void multiply_tiles(const Job& job, Threads& threads) {
    share_groups(job, threads, 4, [&](int panel, int end) {
        const int panels = end - panel;
        const Stretch s = decoded(*job.matrix, panel, end);
        tiles::begin();
        int row = 0;
        for (; panels == 4 && row + tiles::ROWS < job.num_rows; row += 2 * tiles::ROWS) {
            tile_square(job, s, row, panel);
            tile_square(job, s.from(2), row, panel + 2);
        }
        for (; row < job.num_rows; row += tiles::ROWS) tile_strip(job, s, row, panel, panels);
        tiles::end();
    });
}

#endif

}  // namespace

void linear::multiply(Threads& threads, const Matrix& matrix, const Rows& x, const Rows& out, int activation, int out_columns,
                      uint32_t* scratch, extremes::Search* search) {
    const bool pairs = x.kind == BFLOAT16;
    const int steps = pairs ? matrix.inner / 2 : matrix.inner;
    Job job{&matrix, out, out_columns, scratch, steps, x.rows, activation, search};
    if (matrix.kind == INT8 && pairs) return multiply_int8(job, x, scratch, threads);
    if (matrix.kind == INT4) return multiply_int4(job, x, scratch, threads);
#if defined(TWOSTROKE_TILES)
    if (by_tiles(matrix, pairs)) {
        threads.share((x.rows + tiles::ROWS - 1) / tiles::ROWS, [&](int b) {
            pack_tiles(x, b * tiles::ROWS, steps, (char*)scratch + (int64_t)b * tiles::ROWS * steps * 4);
        });
        return multiply_tiles(job, threads);
    }
#endif
#if defined(TWOSTROKE_AVX2)
    multiply_avx2(job, x, scratch, threads);
#else
    const Blocks blocks(x, steps, (char*)scratch);
    if (matrix.kind == FLOAT32)
        multiply_blocks<Panel<FLOAT32>>(job, blocks, threads);
    else if (matrix.kind == CODED && x.rows < DECODED_ROWS)
        multiply_blocks<Panel<CODED>>(job, blocks, threads);
    else if (matrix.kind == BFLOAT16 || matrix.kind == CODED)
        multiply_blocks<Panel<BFLOAT16>>(job, blocks, threads);
    else
        multiply_blocks<Panel<INT8>>(job, blocks, threads);
#endif
}

extern "C" {

void twostroke_linear(Threads* threads, const Matrix* matrix, const Rows* x, const Rows* out, int32_t activation,
                      int32_t out_columns, uint32_t* scratch) {
    multiply(*threads, *matrix, *x, *out, activation, out_columns, scratch, nullptr);
}

const char* twostroke_level() {
#if defined(TWOSTROKE_TILES)
    if (tiles::permitted()) return "amx-bf16";
#endif
#if defined(__AVX512BF16__)
    return "avx512-bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__FMA__)
    return "avx2";
#elif defined(__aarch64__)
    return "neon";  // dot products of bytes are exact with and without instructions for them
#else
    return "plain";
#endif
}

Threads* twostroke_start_threads(int32_t count) { return new Threads(count); }
void twostroke_stop_threads(Threads* threads) { delete threads; }

}  // extern "C"
