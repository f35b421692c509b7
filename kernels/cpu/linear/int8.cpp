// Linear layers of 8-bit weights and rows rounded to 8 bits. Sums are of integers, so their order does not matter.
//
// A row x is split into groups of 64 neighbours. The scale of a group is its largest magnitude / 127; its numbers become integers
// q[k] = round(x[k] / scale), to nearest even. Then
//   out[r, c] = ( sum over groups of float( sum over k of q[r, k] * w[c, k] ) * scale[r, group] ) * scale[c] + bias[c]
// The inner sums are exact; the outer sum of an output has one float32 lane, from the first group to the last. So an output's
// bits depend on its row and column alone, for any number of rows or threads, and are equal on all instruction sets that have
// fused products.
//
// Panels of 16 columns hold [inner / 4][16 columns][4 neighbours in k], as w + 128: the instruction multiplies unsigned by
// signed bytes. The offset adds 128 * sum(q) to a group's sum, so sums begin at minus that. On machines with AMX tiles, steps
// of many rows use them: integers, so the same bits. Machines with AVX2 and without AVX-512 have another layout:
// linear/int8_avx2.cpp.
#include "api.h"
#include "linear.h"
#include "row_rounding.h"
#include "tiles.h"

#if !defined(TWOSTROKE_INT8_AVX2)

namespace linear {

namespace {

constexpr int QUAD = 4;  // numbers of k
// PART_ROWS: rows that one inner kernel keeps in registers with two panels. BLOCK_PARTS: parts that share a pass over a group's
// weights.
#if defined(__AVX512F__)
constexpr int PART_ROWS = 12;
#else
constexpr int PART_ROWS = 4;
#endif
constexpr int BLOCK_PARTS = 2, BLOCK_ROWS = PART_ROWS * BLOCK_PARTS;

int quads(int inner) { return (inner + QUAD - 1) / QUAD; }
// 32-bit words of a packed row: its integers, and for each group the start of its sums and its scale.
int row_words(int inner) { return quads(inner) + 2 * num_groups(inner); }

// Number of rows that a part is padded to: the next size for which a kernel exists.
int padded_rows(int rows) {
    for (int size : {1, 2, 4, 6, 8, 12})
        if (rows <= size) return size;
    return PART_ROWS;
}
struct Parts {
    int parts, rows;  // of each part
    explicit Parts(int block) : parts(block > PART_ROWS ? 2 : 1), rows(padded_rows((block + parts - 1) / parts)) {}
};

// Call `pack(row)` for all rows, shared among the threads.
template <class F>
void share_rows(int rows, Threads& threads, const F& pack) {
    constexpr int SHARE = 4;
    threads.share((rows + SHARE - 1) / SHARE, [&](int part) {
        for (int row = part * SHARE; row < std::min(rows, (part + 1) * SHARE); row++) pack(row);
    });
}

// Pack one row of a block for the kernel: per part, per group { begin [rows], scale [rows], numbers [quads][rows] }.
void pack_row(const Rows& x, int first, int in_block, int inner, Parts d, uint32_t* block) {
    const int row = first + in_block, r = in_block % d.rows;
    uint32_t* to = block + (int64_t)(in_block / d.rows) * d.rows * row_words(inner);
    Rounded group{};
    for (int k = 0; k < inner; k += GROUP) {
        const int steps = quads(std::min(GROUP, inner - k));
        if (row < x.rows) round_group(x, row, k, inner, group);
        std::memcpy(to + r, &group.begin, 4), std::memcpy(to + d.rows + r, &group.scale, 4);
        to += 2 * d.rows;
        for (int step = 0; step < steps; step++, to += d.rows) std::memcpy(to + r, group.numbers + step * QUAD, 4);
    }
}

// Add one group's integer sums, scaled, to `sums`: ROWS packed rows by PANELS panels.
template <int ROWS, int PANELS, bool ASKS_AHEAD>
void add_group(const uint32_t* x, const char* w, int64_t panel_bytes, int steps, F32 (*sums)[PANELS]) {
    const float* scales = (const float*)x + ROWS;
    I32 acc[ROWS][PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) acc[r][p] = (I32)splat_u32(x[r]);
    x += 2 * ROWS;
    for (int k = 0; k < steps; k++, x += ROWS, w += LANES * QUAD) {
        U32 weights[PANELS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            if (ASKS_AHEAD) __builtin_prefetch(w + p * panel_bytes + PREFETCH_BYTES, 0, 2);
            weights[p] = load<U32>(w + p * panel_bytes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const U32 quad = splat_u32(x[r]);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) acc[r][p] = dot_quads(acc[r][p], weights[p], quad);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) sums[r][p] = fma(to_floats(acc[r][p]), splat(scales[r]), sums[r][p]);
}

template <int ROWS, int PANELS>
void kernel(const Job& job, const uint32_t* x, int first, int rows, int panel, F32* gates) {
    const int inner = job.matrix->inner, parts = Parts(rows).parts;
    const int64_t panel_bytes = int8_panel_bytes(inner), part_words = (int64_t)ROWS * row_words(inner);
    const char* w = (const char*)job.matrix->panels + panel * panel_bytes;
    F32 sums[BLOCK_PARTS * ROWS][PANELS] = {};
    for (int k = 0; k < inner; k += GROUP) {
        const int steps = quads(std::min(GROUP, inner - k));
        add_group<ROWS, PANELS, true>(x, w, panel_bytes, steps, sums);
        if (parts > 1) add_group<ROWS, PANELS, false>(x + part_words, w, panel_bytes, steps, sums + ROWS);
        x += (2 + steps) * ROWS, w += (int64_t)steps * LANES * QUAD;
    }
    for (int r = 0; r < rows; r++) put_row<PANELS>(job, first + r, panel, sums[r], gates[r]);
}

template <int PANELS>
void block(const Job& job, const uint32_t* x, int first, int rows, int panel, F32* gates) {
    switch (Parts(rows).rows) {
        case 1: return kernel<1, PANELS>(job, x, first, rows, panel, gates);
        case 2: return kernel<2, PANELS>(job, x, first, rows, panel, gates);
        case 4: return kernel<4, PANELS>(job, x, first, rows, panel, gates);
#if defined(__AVX512F__)
        case 6: return kernel<6, PANELS>(job, x, first, rows, panel, gates);
        case 8: return kernel<8, PANELS>(job, x, first, rows, panel, gates);
        case 12: return kernel<12, PANELS>(job, x, first, rows, panel, gates);
#endif
    }
}

// scratch: row_words for each of job.num_rows + BLOCK_ROWS rows.
void multiply_rows(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads) {
    const int inner = job.matrix->inner;
    const auto block_of = [&](int first) { return scratch + (int64_t)first * row_words(inner); };
    share_rows(x.rows, threads, [&](int row) {
        const int first = row / BLOCK_ROWS * BLOCK_ROWS, rows = std::min(BLOCK_ROWS, x.rows - first);
        const Parts d(rows);
        pack_row(x, first, row - first, inner, d, block_of(first));
        if (row + 1 == x.rows)  // padding rows of the last part
            for (int r = rows; r < d.parts * d.rows; r++) pack_row(x, first, r, inner, d, block_of(first));
    });
    share_panels(job, threads, int8_panel_bytes(inner), [&](int begin, int end) {
        F32 gates[BLOCK_ROWS];
        for (int first = 0; first < job.num_rows; first += BLOCK_ROWS)
            for (int panel = begin; panel < end; panel += 2) {
                const int rows = std::min(BLOCK_ROWS, job.num_rows - first);
                if (panel + 1 < end && job.num_rows > 1) {  // one row is bound by memory: one stream of panels
                    block<2>(job, block_of(first), first, rows, panel, gates);
                    continue;
                }
                for (int p = panel; p < std::min(panel + 2, end); p++)
                    block<1>(job, block_of(first), first, rows, p, gates);
            }
    });
}

#if defined(TWOSTROKE_TILES)

constexpr int SQUARE_ROWS = 2 * tiles::ROWS;
static_assert(GROUP == tiles::ROW_BYTES, "a group of a row is one row of a tile");

// One group of a block of rows. A panel's weights of one group are a tile as stored.
struct TileGroup {
    int8_t numbers[SQUARE_ROWS][GROUP];
    int32_t begin[SQUARE_ROWS];
    float scale[SQUARE_ROWS];
};

void pack_tile_row(const Rows& x, int row, int inner, TileGroup* to) {
    Rounded group{};
    for (int k = 0; k < inner; k += GROUP, to++) {
        if (row < x.rows) round_group(x, row, k, inner, group);
        const int r = row % SQUARE_ROWS;
        std::memcpy(to->numbers[r], group.numbers, GROUP);
        to->begin[r] = group.begin, to->scale[r] = group.scale;
    }
}

// Multiply two blocks of 16 rows by one or two panels.
template <int PANELS>
void tile_square(const Job& job, const TileGroup* x, int first, int panel) {
    const int64_t panel_bytes = int8_panel_bytes(job.matrix->inner);
    const char* w = (const char*)job.matrix->panels + panel * panel_bytes;
    F32 sums[SQUARE_ROWS][PANELS] = {};
    for (int k = 0; k < job.matrix->inner; k += GROUP, x++, w += tiles::TILE_BYTES) {
        alignas(64) int32_t integers[PANELS][SQUARE_ROWS][LANES];
        tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
        tiles::load<4>(x->numbers[0]), tiles::load<5>(x->numbers[tiles::ROWS]), tiles::load<6>(w);
        tiles::dot_bytes<0, 4, 6>(), tiles::dot_bytes<1, 5, 6>();
        tiles::save<0>(integers[0][0]), tiles::save<1>(integers[0][tiles::ROWS]);
        if (PANELS == 2) {
            tiles::load<7>(w + panel_bytes);
            tiles::dot_bytes<2, 4, 7>(), tiles::dot_bytes<3, 5, 7>();
            tiles::save<2>(integers[PANELS - 1][0]), tiles::save<3>(integers[PANELS - 1][tiles::ROWS]);
        }
        for (int r = 0; r < SQUARE_ROWS; r++)
            for (int p = 0; p < PANELS; p++) {
                const I32 sum = load<I32>(integers[p][r]) + (I32)splat_u32(x->begin[r]);
                sums[r][p] = fma(to_floats(sum), splat(x->scale[r]), sums[r][p]);
            }
    }
    F32 gate{};
    for (int r = 0; r < std::min(SQUARE_ROWS, job.num_rows - first); r++)
        put_row<PANELS>(job, first + r, panel, sums[r], gate);
}

void multiply_tiles(const Job& job, const Rows& x, TileGroup* scratch, Threads& threads) {
    const int inner = job.matrix->inner, groups = num_groups(inner);
    const auto block_of = [&](int row) { return scratch + (int64_t)(row / SQUARE_ROWS) * groups; };
    share_rows((x.rows + SQUARE_ROWS - 1) / SQUARE_ROWS * SQUARE_ROWS, threads,
               [&](int row) { pack_tile_row(x, row, inner, block_of(row)); });
    share_panels(job, threads, int8_panel_bytes(inner), [&](int begin, int end) {
        tiles::begin();
        for (int first = 0; first < job.num_rows; first += SQUARE_ROWS) {
            int panel = begin;
            for (; panel + 1 < end; panel += 2) tile_square<2>(job, block_of(first), first, panel);
            if (panel < end) tile_square<1>(job, block_of(first), first, panel);
        }
        tiles::end();
    });
}

#endif

}  // namespace

int64_t int8_panel_bytes(int inner) { return (int64_t)quads(inner) * QUAD * LANES; }

// Missing columns and neighbours are zeros.
void pack_int8(const int8_t* from, int columns, int inner, uint8_t* to) {
    for (int k = 0; k < inner; k += QUAD)
        for (int c = 0; c < LANES; c++)
            for (int j = k; j < k + QUAD; j++)
                *to++ = (uint8_t)((c < columns && j < inner ? from[(int64_t)c * inner + j] : 0) + OFFSET);
}

void multiply_int8(const Job& job, const Rows& x, uint32_t* scratch, Threads& threads) {
#if defined(TWOSTROKE_TILES)
    if (job.num_rows > BLOCK_ROWS && job.matrix->inner % GROUP == 0 && tiles::permitted())
        return multiply_tiles(job, x, (TileGroup*)scratch, threads);
#endif
    multiply_rows(job, x, scratch, threads);
}

}  // namespace linear

#endif
