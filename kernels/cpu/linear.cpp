// Linear layers over packed matrices. One order of summation per output, whatever the number of rows or threads.
//
// A matrix [columns, inner] lies in panels of 16 columns. Within a panel numbers stand as the kernel reads them, front
// to back: for bfloat16 and int8 [inner / 2][16 columns][2 neighbours in k], for float32 [inner][16 columns]. Where 64
// int8 can be decoded at once they stand as a sign and a magnitude, two k-steps to 64 bytes, eight bytes of one step and
// eight of the other by turns. The same copy serves one row and a thousand.
//
// out[r, c] = ( sum over k = 0, 1, 2 ... of x[r, k] * w[c, k] ) * scale[c] + bias[c], each output in one float32
// accumulator lane from first k to last; k pairs go through dot_pairs. Int8 weights become exact bfloat16 on the way.
// So an output's bits depend on its own row and column alone. Where the machine has AMX tiles, bfloat16 goes through them
// instead, for every number of rows: 32 k at a time in the instruction's order.
#include <algorithm>
#include <vector>

#include "api.h"
#include "simd.h"
#include "threads.h"
#include "tiles.h"

using namespace simd;

namespace {

// Rows and panels that one inner kernel keeps in registers.
#if defined(__AVX512F__)
constexpr int WIDE_ROWS = 12, WIDE_PANELS = 2;  // 24 accumulators of 32 registers
constexpr int TALL_ROWS = 16;                   // one panel: a decode batch of 16 reads its weights once
#else
constexpr int WIDE_ROWS = 4, WIDE_PANELS = 1;
constexpr int TALL_ROWS = 4;
#endif
// How far ahead of the kernel weights are asked for, into the core's own second-level cache: measured.
constexpr int PREFETCH_BYTES = 4096;
constexpr int64_t CACHED_BYTES = 512 << 10;  // of panels that stay in a core's own cache while rows pass

// What one k-step of a panel is: as stored, and as multiplied.
template <int KIND, bool PAIRS>
struct Panel;

template <>
struct Panel<BFLOAT16, true> {
    static constexpr int STEP_BYTES = 64, STEPS = 1;
    static void take(const char* p, U32 (&w)[1]) { w[0] = load<U32>(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return dot_pairs(acc, w, splat_u32(x)); }
};
template <>
struct Panel<INT8, true> {
    static constexpr int STEP_BYTES = 32, STEPS = 1;
    static void take(const char* p, U32 (&w)[1]) { w[0] = pack_exact(widen_i8(p), widen_i8(p + 16)); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return dot_pairs(acc, w, splat_u32(x)); }
};
template <>
struct Panel<FLOAT32, false> {
    static constexpr int STEP_BYTES = 64, STEPS = 1;
    static void take(const char* p, U32 (&w)[1]) { w[0] = load<U32>(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return fma((F32)w, (F32)splat_u32(x), acc); }
};
template <>
struct Panel<INT8, false> {
    static constexpr int STEP_BYTES = 16, STEPS = 1;
    static void take(const char* p, U32 (&w)[1]) { w[0] = (U32)widen_i8(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return fma((F32)w, (F32)splat_u32(x), acc); }
};

struct Int8By64 {
    static constexpr int STEP_BYTES = 32, STEPS = 2;
    static void take(const char* p, U32 (&w)[2]) { decode_64(INTEGER_TABLES, load<U32>(p), w[0], w[1]); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return dot_pairs(acc, w, splat_u32(x)); }
};
bool int8_by_64(int inner, bool pairs) { return DECODES_64 && pairs && inner % 4 == 0; }

struct Job {
    const Matrix* matrix;
    Rows out;
    int out_columns;
    const uint32_t* packed;  // x by blocks of rows: [steps][rows of the block]
    int steps, num_rows, activation;  // NONE, or panels alternate between a gate and what it lets through
};

F32 finished(const Matrix& m, int panel, F32 acc) {
    if (m.scales) acc = acc * load<F32>(m.scales + panel * LANES);
    if (m.bias) acc = acc + load<F32>(m.bias + panel * LANES);
    return acc;
}
void put(const Job& job, int row, int column, F32 v) {
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
void put_linear(const Job& job, int row, int panel, F32 acc) {
    put(job, row, panel * LANES, finished(*job.matrix, panel, acc));
}
// Gate and up are rounded as if they had been stored, so that the fused form changes no bit.
void put_gated(const Job& job, int row, int panel, F32 gate, F32 up) {
    gate = finished(*job.matrix, panel, gate), up = finished(*job.matrix, panel + 1, up);
    if (job.out.kind == BFLOAT16) gate = widen(rounded(gate)), up = widen(rounded(up));
    put(job, row, panel / 2 * LANES, activate(gate, job.activation) * up);
}

// ROWS packed rows by PANELS panels; only `real_rows` are stored.
template <class P, int ROWS, int PANELS>
void kernel(const Job& job, const uint32_t* x, int first_row, int real_rows, int panel, F32* gates) {
    const int64_t panel_bytes = (int64_t)job.steps * P::STEP_BYTES;
    const char* w = (const char*)job.matrix->panels + panel * panel_bytes;
    F32 acc[ROWS][PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) acc[r][p] = F32{};
    for (int k = 0; k < job.steps; k += P::STEPS) {
        U32 weights[PANELS][P::STEPS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            __builtin_prefetch(w + p * panel_bytes + PREFETCH_BYTES, 0, 2);
            P::take(w + p * panel_bytes, weights[p]);
        }
#pragma GCC unroll 2
        for (int step = 0; step < P::STEPS; step++)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++)
                    acc[r][p] = P::add(acc[r][p], weights[p][step], x[step * ROWS + r]);
        w += P::STEPS * P::STEP_BYTES;
        x += P::STEPS * ROWS;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
        if (r < real_rows) {
            if (job.activation == NONE) {
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++) put_linear(job, first_row + r, panel + p, acc[r][p]);
            } else if (PANELS == 2) {
                put_gated(job, first_row + r, panel, acc[r][0], acc[r][PANELS - 1]);
            } else if (panel % 2 == 0) {
                gates[r] = acc[r][0];
            } else {
                put_gated(job, first_row + r, panel - 1, gates[r], acc[r][0]);
            }
        }
}

// The number of rows that a block of `rows` is padded to: the kernels that exist.
int padded_rows(int rows) {
    for (int size : {1, 2, 4, 6, 8, 12, 16})
        if (rows <= size) return size;
    return TALL_ROWS;
}

template <class P, int PANELS>
void block(const Job& job, const uint32_t* x, int first, int rows, int panel, F32* gates) {
    switch (padded_rows(rows)) {
        case 1: return kernel<P, 1, PANELS>(job, x, first, rows, panel, gates);
        case 2: return kernel<P, 2, PANELS>(job, x, first, rows, panel, gates);
        case 4: return kernel<P, 4, PANELS>(job, x, first, rows, panel, gates);
#if defined(__AVX512F__)
        case 6: return kernel<P, 6, PANELS>(job, x, first, rows, panel, gates);
        case 8: return kernel<P, 8, PANELS>(job, x, first, rows, panel, gates);
        case 12: return kernel<P, 12, PANELS>(job, x, first, rows, panel, gates);
        case 16:
            for (int p = 0; p < PANELS; p++) kernel<P, 16, 1>(job, x, first, rows, panel + p, gates);
#endif
    }
}

int block_rows(int num_rows) { return num_rows <= TALL_ROWS ? TALL_ROWS : WIDE_ROWS; }

// Rows of x as [steps][block], 32 bits per step: two bfloat16 or one float32.
void pack_rows(const Rows& x, int first, int rows, int steps, uint32_t* to) {
    const int width = padded_rows(rows);
    const int64_t row_words = x.kind == BFLOAT16 ? 1 : 2;  // half words
    auto row = [&](int r) {
        return (const char*)x.data + (int64_t)(first + r) * x.stride * 2 * row_words;
    };
    int k = 0;
    for (; k + LANES <= steps; k += LANES) {
        U32 m[16];
        for (int r = 0; r < 16; r++) m[r] = r < rows ? load<U32>(row(r) + 4 * k) : U32{};
        transpose(m);
        for (int i = 0; i < LANES; i++) std::memcpy(to + (int64_t)(k + i) * width, &m[i], 4 * width);
    }
    for (; k < steps; k++)
        for (int r = 0; r < width; r++) {
            uint32_t word = 0;
            if (r < rows) std::memcpy(&word, row(r) + 4 * k, 4);
            to[(int64_t)k * width + r] = word;
        }
}

template <class P>
void multiply(const Job& job, Threads& threads) {
    const int num_panels = (job.matrix->columns + LANES - 1) / LANES;
    const int size = block_rows(job.num_rows);
    // A part is so many panels that a cache holds them while all rows pass, and that every thread gets several.
    const int held = (int)(CACHED_BYTES / ((int64_t)job.steps * P::STEP_BYTES));
    const int group = std::max(2, std::min({8, held, num_panels / (threads.count() * 4)}) / 2 * 2);
    threads.share((num_panels + group - 1) / group, [&](int part) {
        const int end = std::min(num_panels, (part + 1) * group);
        F32 gates[TALL_ROWS];
        for (int first = 0; first < job.num_rows; first += size)
            for (int panel = part * group; panel < end; panel += 2) {
                const int rows = std::min(size, job.num_rows - first);
                const uint32_t* x = job.packed + (int64_t)first * job.steps;
                if (panel + 1 < end && WIDE_PANELS == 2 && job.num_rows > 1) {  // one row waits for memory: one long stream
                    block<P, WIDE_PANELS>(job, x, first, rows, panel, gates);
                    continue;
                }
                for (int p = panel; p < std::min(panel + 2, end); p++) block<P, 1>(job, x, first, rows, p, gates);
            }
    });
}

#if defined(TWOSTROKE_TILES)

constexpr int TILE_STEPS = 16;  // k-steps (pairs) per tile: a panel's sixteen steps are one tile as they lie

bool by_tiles(const Matrix& m, bool pairs) { return pairs && m.inner % (2 * TILE_STEPS) == 0 && tiles::permitted(); }

// Rows of x as tiles [blocks of 16 rows][inner / 32][16 rows][64 bytes], missing rows zero.
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

template <int KIND, int T>
void load_weights(const char* panel, int step) {
    if (KIND == BFLOAT16) {
        __builtin_prefetch(panel + (int64_t)step * 64 + 8192);
        return tiles::load<T>(panel + (int64_t)step * 64);
    }
    alignas(64) U32 wide[TILE_STEPS];
    for (int k = 0; k < TILE_STEPS; k += DECODES_64 ? 2 : 1) {
        const char* from = panel + (int64_t)(step + k) * 32;
        if (DECODES_64)
            decode_64(INTEGER_TABLES, load<U32>(from), wide[k], wide[(k + 1) % TILE_STEPS]);
        else
            wide[k] = pack_exact(widen_i8(from), widen_i8(from + 16));
    }
    tiles::load<T>(wide);
}

// Two panels' tiles; only the first when there is no second.
template <int T, int U>
void put_tiles(const Job& job, int row, int panel, bool second) {
    alignas(64) float one[tiles::ROWS][LANES], other[tiles::ROWS][LANES];
    tiles::save<T>(one), tiles::save<U>(other);
    for (int r = 0; r < std::min(tiles::ROWS, job.num_rows - row); r++) {
        if (job.activation != NONE) {
            put_gated(job, row + r, panel, load<F32>(one[r]), load<F32>(other[r]));
            continue;
        }
        put_linear(job, row + r, panel, load<F32>(one[r]));
        if (second) put_linear(job, row + r, panel + 1, load<F32>(other[r]));
    }
}

// One block of 16 rows by up to four panels: what streams weights. A missing panel repeats the last and is not stored.
template <int KIND>
void tile_strip(const Job& job, int row, int panel, int panels) {
    const int64_t bytes = (int64_t)job.steps * (KIND == BFLOAT16 ? 64 : 32);
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char* w[4];
    for (int p = 0; p < 4; p++) w[p] = (const char*)job.matrix->panels + (panel + std::min(p, panels - 1)) * bytes;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int k = 0; k < job.steps; k += TILE_STEPS, x += tiles::TILE_BYTES) {
        tiles::load<4>(x);
        load_weights<KIND, 5>(w[0], k), tiles::dot<0, 4, 5>();
        load_weights<KIND, 6>(w[1], k), tiles::dot<1, 4, 6>();
        load_weights<KIND, 7>(w[2], k), tiles::dot<2, 4, 7>();
        load_weights<KIND, 5>(w[3], k), tiles::dot<3, 4, 5>();
    }
    put_tiles<0, 1>(job, row, panel, panels > 1);
    if (panels > 2) put_tiles<2, 3>(job, row, panel + 2, panels > 3);
}

// Two blocks of rows by two panels: what computes prompts.
template <int KIND>
void tile_square(const Job& job, int row, int panel) {
    const int64_t bytes = (int64_t)job.steps * (KIND == BFLOAT16 ? 64 : 32);
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char *below = x + (int64_t)tiles::ROWS * job.steps * 4, *w = (const char*)job.matrix->panels + panel * bytes;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int k = 0; k < job.steps; k += TILE_STEPS, x += tiles::TILE_BYTES, below += tiles::TILE_BYTES) {
        tiles::load<4>(x), tiles::load<5>(below);
        load_weights<KIND, 6>(w, k), load_weights<KIND, 7>(w + bytes, k);
        tiles::dot<0, 4, 6>(), tiles::dot<1, 4, 7>(), tiles::dot<2, 5, 6>(), tiles::dot<3, 5, 7>();
    }
    put_tiles<0, 1>(job, row, panel, true);
    put_tiles<2, 3>(job, row + tiles::ROWS, panel, true);
}

template <int KIND>
void multiply_tiles(const Job& job, Threads& threads) {
    const int num_panels = (job.matrix->columns + LANES - 1) / LANES;
    threads.share((num_panels + 3) / 4, [&](int part) {
        const int panel = part * 4, panels = std::min(4, num_panels - panel);
        tiles::begin();
        int row = 0;
        for (; panels == 4 && row + tiles::ROWS < job.num_rows; row += 2 * tiles::ROWS) {
            tile_square<KIND>(job, row, panel);
            tile_square<KIND>(job, row, panel + 2);
        }
        for (; row < job.num_rows; row += tiles::ROWS) tile_strip<KIND>(job, row, panel, panels);
        tiles::end();
    });
}

#endif

}  // namespace

namespace {

// Where element `element` (of 32) of step k goes, when `out` is where it would stand one after the other.
char* place_of_64(char* out, int k, int element) {
    char* both = out - element - (k % 2) * 32;
    return both + element / 8 * 16 + k % 2 * 8 + element % 8;
}

}  // namespace

extern "C" {

// Bytes of the panels of a matrix [columns, inner].
int64_t twostroke_panel_bytes(int32_t kind, int32_t columns, int32_t inner, int32_t pairs) {
    int64_t panels = (columns + LANES - 1) / LANES;
    int64_t padded = pairs ? (inner + 1) / 2 * 2 : inner;
    return panels * LANES * padded * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
}

// Rearrange rows [columns, inner] of numbers of `size` bytes into panels; missing columns and neighbours are zeros.
void twostroke_pack(const void* from, int32_t size, int32_t columns, int32_t inner, int32_t pairs, void* to) {
    const int steps = pairs ? (inner + 1) / 2 : inner, neighbours = pairs ? 2 : 1;
    const bool by_64 = size == 1 && int8_by_64(inner, pairs);
    char* out = (char*)to;
    for (int panel = 0; panel < (columns + LANES - 1) / LANES; panel++)
        for (int k = 0; k < steps; k++)
            for (int c = 0; c < LANES; c++)
                for (int j = 0; j < neighbours; j++, out += size) {
                    const int column = panel * LANES + c, at = k * neighbours + j, element = c * 2 + j;
                    if (column >= columns || at >= inner) {
                        std::memset(by_64 ? place_of_64(out, k, element) : out, 0, size);
                        continue;
                    }
                    const char* number = (const char*)from + ((int64_t)column * inner + at) * size;
                    if (by_64)
                        *place_of_64(out, k, element) = (char)(*number < 0 ? 0x80 | -*number : *number);
                    else
                        std::memcpy(out, number, size);
                }
}

// out [rows, columns] = x [rows, inner] times the matrix. x: bfloat16 with even inner, or float32.
// scratch holds at least (rows rounded up to 16, plus 16) * inner numbers of x, 64-byte aligned.
// With an activation the matrix's panels alternate between gate and up, and out [rows, up's columns] is
// activation(gate) * up; out_columns says how many those are.
void twostroke_linear(Threads* threads, const Matrix* matrix, const Rows* x, const Rows* out, int32_t activation,
                      int32_t out_columns, uint32_t* scratch) {
    const bool pairs = x->kind == BFLOAT16;
    Job job{matrix, *out, out_columns, scratch, pairs ? matrix->inner / 2 : matrix->inner, x->rows, activation};
#if defined(TWOSTROKE_TILES)
    if (by_tiles(*matrix, pairs)) {
        threads->share((x->rows + tiles::ROWS - 1) / tiles::ROWS, [&](int b) {
            pack_tiles(*x, b * tiles::ROWS, job.steps, (char*)scratch + (int64_t)b * tiles::ROWS * job.steps * 4);
        });
        return matrix->kind == INT8 ? multiply_tiles<INT8>(job, *threads) : multiply_tiles<BFLOAT16>(job, *threads);
    }
#endif
    const int size = block_rows(x->rows);
    const auto pack = [&](int b) {
        const int first = b * size;
        pack_rows(*x, first, std::min(size, x->rows - first), job.steps, scratch + (int64_t)first * job.steps);
    };
    threads->share((x->rows + size - 1) / size, pack);
    if (matrix->kind == FLOAT32)
        multiply<Panel<FLOAT32, false>>(job, *threads);
    else if (matrix->kind == BFLOAT16)
        multiply<Panel<BFLOAT16, true>>(job, *threads);
    else if (int8_by_64(matrix->inner, pairs))
        multiply<Int8By64>(job, *threads);
    else if (pairs)
        multiply<Panel<INT8, true>>(job, *threads);
    else
        multiply<Panel<INT8, false>>(job, *threads);
}

// The instructions that decide the bits of an answer.
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
#else
    return "plain";
#endif
}

Threads* twostroke_start_threads(int32_t count) { return new Threads(count); }
void twostroke_stop_threads(Threads* threads) { delete threads; }

}  // extern "C"
