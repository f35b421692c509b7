// Blocks of rows in float32, and their products with a panel, for machines with AVX2 and without AVX-512: linear/avx2.cpp says how
// they are used.
#pragma once

#include "api.h"
#include "linear.h"

#if defined(TWOSTROKE_AVX2)

#include "row_blocks.h"

namespace linear {

// Bytes to prefetch during a kernel: `step` bytes further with every k-step.
struct Ahead {
    const char* at;
    int64_t step;
};

// ---------------------------------------------------------------- rows

inline __m256 eight_numbers(const Rows& x, int64_t at) {
    if (x.kind != BFLOAT16) return _mm256_loadu_ps((const float*)x.data + at);
    const __m128i bits = _mm_loadu_si128((const __m128i*)((const uint16_t*)x.data + at));
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
// Convert rows [first, first + rows) to float32 [inner][rows]. `order`: null, or as in Matrix.
inline void interleave(const Rows& x, int first, int rows, int inner, const int32_t* order, float* to) {
    const int64_t begin = first * x.stride;
    int k = 0;
    for (; k + 8 <= inner && !order; k += 8) {
        U32::Half m[8] = {};
        for (int r = 0; r < rows; r++) m[r] = (U32::Half)eight_numbers(x, begin + r * x.stride + k);
        transpose_quarter(m);
        for (int i = 0; i < 8; i++, to += rows) {
            if (k + i + 8 <= inner)  // the numbers past `rows` are overwritten next
                store(to, m[i]);
            else
                std::memcpy(to, &m[i], 4 * rows);
        }
    }
    for (; k < inner; k++)
        for (int r = 0; r < rows; r++) *to++ = number(x, begin + r * x.stride + (order ? order[k] : k));
}

// Add the products of `steps` k-steps of ROWS rows to `sums` [ROWS]. W::take gives a weight of each column, as float32: number
// `number` of W::NUMBERS neighbours in k, which take W::BYTES bytes of a panel.
template <class W, int ROWS>
void add_steps(const float* x, const char* w, int steps, Ahead ahead, F32* sums) {
    F32 acc[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) acc[r] = sums[r];
    for (int step = 0; step < steps; step++, w += W::BYTES, x += W::NUMBERS * ROWS, ahead.at += ahead.step) {
        __builtin_prefetch(ahead.at, 0, 2);
#pragma GCC unroll 8
        for (int number = 0; number < W::NUMBERS; number++) {
            const F32 weight = W::take(w, number);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const __m256 one = _mm256_broadcast_ss(x + number * ROWS + r);
                acc[r] = fma(weight, {one, one}, acc[r]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) sums[r] = acc[r];
}

template <class W>
void add_block(int rows, const float* x, const char* w, int steps, const Ahead& ahead, F32* sums) {
    switch (rows) {
        case 1: return add_steps<W, 1>(x, w, steps, ahead, sums);
        case 2: return add_steps<W, 2>(x, w, steps, ahead, sums);
        case 3: return add_steps<W, 3>(x, w, steps, ahead, sums);
        case 4: return add_steps<W, 4>(x, w, steps, ahead, sums);
        case 5: return add_steps<W, 5>(x, w, steps, ahead, sums);
        default: return add_steps<W, 6>(x, w, steps, ahead, sums);
    }
}

inline void put_block(const Job& job, int first, int rows, int panel, const F32* sums, F32* gates) {
    for (int r = 0; r < rows; r++) {
        const F32 sum[1] = {sums[r]};
        put_row<1>(job, first + r, panel, sum, gates[r]);
    }
}

}  // namespace linear

#endif
