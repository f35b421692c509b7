// Shared by all linear kernels: the job, its division among threads, and the conversion of sums into answers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "extremes.h"
#include "simd.h"
#include "threads.h"

namespace linear {

using namespace simd;

// Prefetch distance of weights, into the core's second-level cache (measured).
constexpr int PREFETCH_BYTES = 4096;
constexpr int64_t CACHED_BYTES = 512 << 10;  // bytes of panels that stay in a core's cache during all rows

struct Job {
    const Matrix* matrix;
    Rows out;
    int out_columns;
    const uint32_t* packed;           // x packed into tiles
    int steps, num_rows, activation;  // with an activation, panels alternate between gate and up
    extremes::Search* search;         // searches answers while they are in a cache; or null
};

inline float number(const Rows& x, int64_t at) {
    return x.kind == BFLOAT16 ? to_float(((const uint16_t*)x.data)[at]) : ((const float*)x.data)[at];
}

inline int num_panels(const Matrix& m) { return (m.columns + LANES - 1) / LANES; }

inline F32 finished(const Matrix& m, int panel, F32 acc) {
    if (m.scales) acc = acc * load<F32>(m.scales + panel * LANES);
    if (m.bias) acc = acc + load<F32>(m.bias + panel * LANES);
    return acc;
}
inline void put(const Job& job, int row, int column, F32 v) {
    const int count = std::min(LANES, job.out_columns - column);
    const int64_t at = row * job.out.stride + column;
    if (job.out.kind == BFLOAT16) {
        uint16_t* to = (uint16_t*)job.out.data + at;
        if (count == LANES) return store_bf16(to, v);
        const U16x16 bits = rounded(v);
        std::memcpy(to, &bits, 2 * count);
    } else {
        std::memcpy((float*)job.out.data + at, &v, 4 * count);
    }
}
inline void put_linear(const Job& job, int row, int panel, F32 acc) {
    put(job, row, panel * LANES, finished(*job.matrix, panel, acc));
}
// Gate and up are rounded to the kind of `out` first, so that the fused form has the bits of the separate ops.
inline void put_gated(const Job& job, int row, int panel, F32 gate, F32 up) {
    gate = finished(*job.matrix, panel, gate), up = finished(*job.matrix, panel + 1, up);
    if (job.out.kind == BFLOAT16) gate = widen(rounded(gate)), up = widen(rounded(up));
    put(job, row, panel / 2 * LANES, gated(gate, up, job.activation, job.out.kind == BFLOAT16));
}
// Store one row of a kernel of one or two panels. With one panel, the gate's sum is kept in `gate` until the sum of up comes.
template <int PANELS>
__attribute__((always_inline)) inline void put_row(const Job& job, int row, int panel, const F32 (&sums)[PANELS], F32& gate) {
    if (job.activation == NO_ACTIVATION) {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) put_linear(job, row, panel + p, sums[p]);
    } else if (PANELS == 2) {
        put_gated(job, row, panel, sums[0], sums[PANELS - 1]);
    } else if (panel % 2 == 0) {
        gate = sums[0];
    } else {
        put_gated(job, row, panel - 1, gate, sums[0]);
    }
}

// True if the sums of two panels are stored as bfloat16 without scale or bias, and no column is padding.
inline bool is_plain(const Job& job, int panel) {
    const Matrix& m = *job.matrix;
    const int end = job.activation == NO_ACTIVATION ? (panel + 2) * LANES : (panel + 2) / 2 * LANES;
    return job.out.kind == BFLOAT16 && !m.scales && !m.bias && end <= job.out_columns;
}
inline uint16_t* place(const Job& job, int row, int panel) {
    return (uint16_t*)job.out.data + row * job.out.stride + (job.activation == NO_ACTIVATION ? panel : panel / 2) * LANES;
}
// `put_gated` for jobs where `is_plain` holds; sums [rows][gate and up].
inline void put_gates(const Job& job, int row, int panel, int rows, const F32* sums) {
    uint16_t* to = place(job, row, panel);
    for (int r = 0; r < rows; r++, to += job.out.stride, sums += 2) {
        const F32 gate = widen(rounded(sums[0])), up = widen(rounded(sums[1]));
        store_bf16(to, gated(gate, up, job.activation, true));
    }
}

// Call `panels_of(first, end)` for stretches of `group` panels, shared among the threads.
template <class F>
void share_groups(const Job& job, Threads& threads, int group, const F& panels_of) {
    const int count = num_panels(*job.matrix);
    if (job.search) job.search->begin(group * LANES);
    threads.share((count + group - 1) / group, [&](int part) {
        panels_of(part * group, std::min(count, (part + 1) * group));
        if (job.search) job.search->look(part);
    });
}
// The same for stretches that fit a core's cache during all rows, and are small enough that every thread gets several.
// `first` is even.
template <class F>
void share_panels(const Job& job, Threads& threads, int64_t panel_bytes, const F& panels_of) {
    const int count = num_panels(*job.matrix), held = (int)(CACHED_BYTES / panel_bytes);
    share_groups(job, threads, std::max(2, std::min({8, held, count / (threads.count() * 4)}) / 2 * 2), panels_of);
}

// linear.cpp: twostroke_linear, optionally with a search over `out`, which then is float32.
void multiply(Threads& threads, const Matrix& matrix, const Rows& x, const Rows& out, int activation, int out_columns,
              uint32_t* scratch, extremes::Search* search);

// linear/avx2.cpp: products of float32 or bfloat16 rows on machines with AVX2 and without AVX-512.
void multiply_avx2(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads);

// linear/int8.cpp, linear/int8_avx2.cpp: products of rows rounded to 8 bits with 8-bit matrices.
int64_t int8_panel_bytes(int inner);
void pack_int8(const int8_t* from, int columns, int inner, uint8_t* to);
void multiply_int8(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads);

// linear/int4.cpp, linear/int4_avx2.cpp: products with 4-bit matrices.
void multiply_int4(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads);

}  // namespace linear
