// linear/int8.cpp for machines with AVX2 and without AVX-512. Sums of integers are exact, so the bits are the same.
//
// The instruction for pairs of bytes saturates, so weights are widened to pairs of 16 bits, whose products are summed in 32 bits
// exactly. Panels of 16 columns hold signed bytes, [inner / 2][16 columns][2 neighbours in k]. Rows are stored widened: blocks of
// up to six rows, per group { scale [rows], pairs [32][rows] }.
#include "api.h"
#include "linear.h"
#include "row_blocks.h"
#include "row_rounding.h"
#include "tiles.h"

#if defined(TWOSTROKE_INT8_AVX2)

namespace linear {

namespace {

constexpr int STEP_BYTES = 2 * LANES;
constexpr int FEW_ROWS = 48;  // up to this many rows, panels are read once for all blocks (measured)

int pairs(int inner) { return (inner + 3) / 4 * 2; }
// 32-bit words of a packed row.
int row_words(int inner) { return pairs(inner) + num_groups(inner); }

// Pack rows [first, first + rows) of x for the kernel.
void pack_block(const Rows& x, int first, int rows, int inner, uint32_t* block) {
    for (int r = 0; r < rows; r++) {
        uint32_t* to = block;
        for (int k = 0; k < inner; k += GROUP) {
            const int steps = pairs(std::min(GROUP, inner - k));
            Rounded group{};
            round_group(x, first + r, k, inner, group);
            std::memcpy(to + r, &group.scale, 4);
            to += rows;
            alignas(64) int16_t wide[GROUP];
            for (int i = 0; i < GROUP; i++) wide[i] = group.numbers[i];
            for (int step = 0; step < steps; step++, to += rows) std::memcpy(to + r, wide + 2 * step, 4);
        }
    }
}

// acc += products of pairs. In assembly, because compilers reorder the additions of a loop until the accumulators no longer fit
// the registers.
TWOSTROKE_INLINE void add_pairs(__m256i& acc, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
    acc = _mm256_dpwssd_avx_epi32(acc, w, x);
#else
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(w, x)));
#endif
}

// Bytes to prefetch during a kernel: `step` bytes further with every step.
struct Ahead {
    const char* at;
    int step;
};

// Add one group's integer sums, scaled, to `sums`: ROWS packed rows by a panel. Not inlined: with more than the accumulators
// alive, compilers keep some of them in memory.
template <int ROWS>
__attribute__((noinline)) void add_group(const uint32_t* x, const char* w, int steps, Ahead ahead, F32* sums) {
    const float* scales = (const float*)x;
    __m256i acc[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    x += ROWS;
    for (int step = 0; step < steps; step++, x += ROWS, w += STEP_BYTES, ahead.at += ahead.step) {
        __builtin_prefetch(ahead.at, 0, 2);
        const __m256i low = _mm256_cvtepi8_epi16(load<__m128i>(w)), high = _mm256_cvtepi8_epi16(load<__m128i>(w + LANES));
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const __m256i pair = _mm256_set1_epi32((int)x[r]);
            add_pairs(acc[r][0], low, pair), add_pairs(acc[r][1], high, pair);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        const __m256 scale = _mm256_broadcast_ss(scales + r);
        sums[r] = fma({_mm256_cvtepi32_ps(acc[r][0]), _mm256_cvtepi32_ps(acc[r][1])}, {scale, scale}, sums[r]);
    }
}

template <int ROWS>
void multiply_panel(const uint32_t* x, const char* w, int inner, Ahead ahead, F32* sums) {
    for (int k = 0; k < inner; k += GROUP) {
        const int steps = pairs(std::min(GROUP, inner - k));
        add_group<ROWS>(x, w, steps, ahead, sums);
        x += (1 + steps) * ROWS, w += steps * STEP_BYTES, ahead.at += steps * ahead.step;
    }
}

// Multiply rows [first, first + rows) by one panel.
void multiply_block(const Job& job, const uint32_t* x, int first, int rows, int panel, Ahead ahead, F32* gates) {
    F32 sums[WIDE_ROWS] = {};
    const int inner = job.matrix->inner;
    const char* w = (const char*)job.matrix->panels + panel * int8_panel_bytes(inner);
    switch (rows) {
        case 1: multiply_panel<1>(x, w, inner, ahead, sums); break;
        case 2: multiply_panel<2>(x, w, inner, ahead, sums); break;
        case 3: multiply_panel<3>(x, w, inner, ahead, sums); break;
        case 4: multiply_panel<4>(x, w, inner, ahead, sums); break;
        case 5: multiply_panel<5>(x, w, inner, ahead, sums); break;
        default: multiply_panel<6>(x, w, inner, ahead, sums);
    }
    for (int r = 0; r < rows; r++) {
        const F32 sum[1] = {sums[r]};
        put_row<1>(job, first + r, panel, sum, gates[r]);
    }
}

}  // namespace

int64_t int8_panel_bytes(int inner) { return (int64_t)pairs(inner) * STEP_BYTES; }

// Missing columns and neighbours are zeros.
void pack_int8(const int8_t* from, int columns, int inner, uint8_t* to) {
    for (int k = 0; k < 2 * pairs(inner); k += 2)
        for (int c = 0; c < LANES; c++)
            for (int j = k; j < k + 2; j++) *to++ = (uint8_t)(c < columns && j < inner ? from[(int64_t)c * inner + j] : 0);
}

void multiply_int8(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads) {
    const int inner = job.matrix->inner;
    const int64_t panel_bytes = int8_panel_bytes(inner);
    const Division of(x.rows);
    const auto packed = [&](int block) { return scratch + (int64_t)of.first(block) * row_words(inner); };
    threads.share(of.blocks, [&](int b) { pack_block(x, of.first(b), of.size(b), inner, packed(b)); });
    share_panels(job, threads, panel_bytes, [&](int begin, int end) {
        F32 gates[FEW_ROWS];
        if (x.rows <= FEW_ROWS) {  // the blocks share the prefetches of the next panel
            const int64_t share = panel_bytes / of.blocks;
            for (int panel = begin; panel < end; panel++)
                for (int b = 0; b < of.blocks; b++) {
                    const char* next = (const char*)job.matrix->panels + (panel + 1) * panel_bytes;
                    const Ahead ahead{next + b * share, STEP_BYTES / of.blocks};
                    multiply_block(job, packed(b), of.first(b), of.size(b), panel, ahead, gates + of.first(b));
                }
            return;
        }
        for (int b = 0; b < of.blocks; b++)
            for (int panel = begin; panel < end; panel++) {
                const char* ahead = (const char*)job.matrix->panels + panel * panel_bytes;
                multiply_block(job, packed(b), of.first(b), of.size(b), panel, {ahead + 256, STEP_BYTES}, gates);
            }
    });
}

}  // namespace linear

#endif
