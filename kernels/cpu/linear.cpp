// Linear layers over packed matrices. One order of summation per output, whatever the number of rows or threads.
//
// A matrix [columns, inner] lies in panels of 16 columns. Within a panel numbers stand as the kernel reads them, front
// to back: for bfloat16 [inner / 2][16 columns][2 neighbours in k], for float32 [inner][16 columns]; so too for int8 that
// meets float32 rows. The same copy serves one row and a thousand.
//
// out[r, c] = ( sum over k = 0, 1, 2 ... of x[r, k] * w[c, k] ) * scale[c] + bias[c], each output in one float32
// accumulator lane from first k to last; k pairs go through dot_pairs. So an output's bits depend on its own row and column
// alone. Where the machine has AMX tiles, bfloat16 goes through them instead, for every number of rows: 32 k at a time in
// the instruction's order. Int8 that meets bfloat16 rows: see linear_int8.cpp.
#include "linear.h"

#include "tiles.h"

using namespace linear;

namespace {

// Rows and panels that one inner kernel keeps in registers.
#if defined(__AVX512F__)
constexpr int WIDE_ROWS = 12, WIDE_PANELS = 2;  // 24 accumulators of 32 registers
constexpr int TALL_ROWS = 16;                   // one panel: a decode batch of 16 reads its weights once
#else
constexpr int WIDE_ROWS = 4, WIDE_PANELS = 1;
constexpr int TALL_ROWS = 4;
#endif
// What one k-step of a panel is: as stored, and as multiplied.
template <int KIND>
struct Panel;

template <>
struct Panel<BFLOAT16> {
    static constexpr int STEP_BYTES = 64;
    static U32 take(const char* p) { return load<U32>(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return dot_pairs(acc, w, splat_u32(x)); }
};
template <>
struct Panel<FLOAT32> {
    static constexpr int STEP_BYTES = 64;
    static U32 take(const char* p) { return load<U32>(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return fma((F32)w, (F32)splat_u32(x), acc); }
};
template <>
struct Panel<INT8> {
    static constexpr int STEP_BYTES = 16;
    static U32 take(const char* p) { return (U32)widen_i8(p); }
    static F32 add(F32 acc, U32 w, uint32_t x) { return fma((F32)w, (F32)splat_u32(x), acc); }
};

// Rows of x as they lie, words of 32 bits: two bfloat16 or one float32.
struct Block {
    const char* x;
    int64_t stride;  // bytes
    int first, rows;
};

// ROWS rows by PANELS panels; only those that the block has are stored. Four rows to an address: an address of each row's own
// would take more registers than there are.
template <class P, int ROWS, int PANELS>
void kernel(const Job& job, const Block& block, int panel, F32* gates) {
    const int64_t panel_bytes = (int64_t)job.steps * P::STEP_BYTES, stride = block.stride;
    const int64_t places[4] = {0, stride, 2 * stride, 3 * stride};
    const char *w = (const char*)job.matrix->panels + panel * panel_bytes, *x[(ROWS + 3) / 4];
    F32 acc[ROWS][PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        if (r % 4 == 0) x[r / 4] = block.x + r * stride;
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) acc[r][p] = F32{};
    }
    for (int k = 0; k < job.steps; k++, w += P::STEP_BYTES) {
        U32 weights[PANELS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            __builtin_prefetch(w + p * panel_bytes + PREFETCH_BYTES, 0, 2);
            weights[p] = P::take(w + p * panel_bytes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            uint32_t word;
            std::memcpy(&word, x[r / 4] + places[r % 4], 4);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) acc[r][p] = P::add(acc[r][p], weights[p], word);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 3) / 4; i++) {
            x[i] += 4;
            asm("" : "+r"(x[i]));  // the compiler would make an address per row of it
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
        if (r < block.rows) put_row<PANELS>(job, block.first + r, panel, acc[r], gates[r]);
}

// The number of rows that a block of `rows` is padded to: the kernels that exist.
int padded_rows(int rows) {
    for (int size : {1, 2, 4, 6, 8, 12, 16})
        if (rows <= size) return size;
    return TALL_ROWS;
}

template <class P, int PANELS>
void multiply_block(const Job& job, const Block& block, int panel, F32* gates) {
    switch (padded_rows(block.rows)) {
        case 1: return kernel<P, 1, PANELS>(job, block, panel, gates);
        case 2: return kernel<P, 2, PANELS>(job, block, panel, gates);
        case 4: return kernel<P, 4, PANELS>(job, block, panel, gates);
#if defined(__AVX512F__)
        case 6: return kernel<P, 6, PANELS>(job, block, panel, gates);
        case 8: return kernel<P, 8, PANELS>(job, block, panel, gates);
        case 12: return kernel<P, 12, PANELS>(job, block, panel, gates);
        case 16:
            for (int p = 0; p < PANELS; p++) kernel<P, 16, 1>(job, block, panel + p, gates);
#endif
    }
}

int block_rows(int num_rows) { return num_rows <= TALL_ROWS ? TALL_ROWS : WIDE_ROWS; }

// x in blocks of rows for which there are kernels: as it lies, but for a last block that is filled up with zeros in scratch.
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

template <class P>
void multiply_blocks(const Job& job, const Blocks& x, Threads& threads) {
    share_panels(job, threads, (int64_t)job.steps * P::STEP_BYTES, [&](int begin, int end) {
        F32 gates[TALL_ROWS];
        for (int first = 0; first < job.num_rows; first += x.size())
            for (int panel = begin; panel < end; panel += 2) {
                const Block block = x.from(first);
                if (panel + 1 < end && WIDE_PANELS == 2 && job.num_rows > 1) {  // one row waits for memory: one long stream
                    multiply_block<P, WIDE_PANELS>(job, block, panel, gates);
                    continue;
                }
                for (int p = panel; p < std::min(panel + 2, end); p++) multiply_block<P, 1>(job, block, p, gates);
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

template <int T>
void load_weights(const char* panel, int step) {
    __builtin_prefetch(panel + (int64_t)step * 64 + 8192);
    tiles::load<T>(panel + (int64_t)step * 64);
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
void tile_strip(const Job& job, int row, int panel, int panels) {
    const int64_t bytes = (int64_t)job.steps * 64;
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char* w[4];
    for (int p = 0; p < 4; p++) w[p] = (const char*)job.matrix->panels + (panel + std::min(p, panels - 1)) * bytes;
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

// Two blocks of rows by two panels: what computes prompts.
void tile_square(const Job& job, int row, int panel) {
    const int64_t bytes = (int64_t)job.steps * 64;
    const char* x = (const char*)job.packed + (int64_t)row * job.steps * 4;
    const char *below = x + (int64_t)tiles::ROWS * job.steps * 4, *w = (const char*)job.matrix->panels + panel * bytes;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int k = 0; k < job.steps; k += TILE_STEPS, x += tiles::TILE_BYTES, below += tiles::TILE_BYTES) {
        tiles::load<4>(x), tiles::load<5>(below);
        load_weights<6>(w, k), load_weights<7>(w + bytes, k);
        tiles::dot<0, 4, 6>(), tiles::dot<1, 4, 7>(), tiles::dot<2, 5, 6>(), tiles::dot<3, 5, 7>();
    }
    put_tiles<0, 1>(job, row, panel, true);
    put_tiles<2, 3>(job, row + tiles::ROWS, panel, true);
}

void multiply_tiles(const Job& job, Threads& threads) {
    share_groups(job, threads, 4, [&](int panel, int end) {
        const int panels = end - panel;
        tiles::begin();
        int row = 0;
        for (; panels == 4 && row + tiles::ROWS < job.num_rows; row += 2 * tiles::ROWS) {
            tile_square(job, row, panel);
            tile_square(job, row, panel + 2);
        }
        for (; row < job.num_rows; row += tiles::ROWS) tile_strip(job, row, panel, panels);
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
#if defined(TWOSTROKE_TILES)
    if (by_tiles(matrix, pairs)) {
        threads.share((x.rows + tiles::ROWS - 1) / tiles::ROWS, [&](int b) {
            pack_tiles(x, b * tiles::ROWS, steps, (char*)scratch + (int64_t)b * tiles::ROWS * steps * 4);
        });
        return multiply_tiles(job, threads);
    }
#endif
    const Blocks blocks(x, steps, (char*)scratch);
    if (matrix.kind == FLOAT32)
        multiply_blocks<Panel<FLOAT32>>(job, blocks, threads);
    else if (matrix.kind == BFLOAT16)
        multiply_blocks<Panel<BFLOAT16>>(job, blocks, threads);
    else
        multiply_blocks<Panel<INT8>>(job, blocks, threads);
}

extern "C" {

// Bytes of the panels of a matrix [columns, inner]. `pairs`: the rows that it meets are bfloat16.
int64_t twostroke_panel_bytes(int32_t kind, int32_t columns, int32_t inner, int32_t pairs) {
    const int64_t panels = (columns + LANES - 1) / LANES;
    if (kind == INT8 && pairs) return panels * int8_panel_bytes(inner);
    const int64_t padded = pairs ? (inner + 1) / 2 * 2 : inner;
    return panels * LANES * padded * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
}

// Rearrange rows [columns, inner] of numbers of `kind` into panels; missing columns and neighbours are zeros.
void twostroke_pack(const void* from, int32_t kind, int32_t columns, int32_t inner, int32_t pairs, void* to) {
    if (kind == INT8 && pairs) return pack_int8((const int8_t*)from, columns, inner, (uint8_t*)to);
    const int neighbours = pairs ? 2 : 1, steps = (inner + neighbours - 1) / neighbours;
    const int size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    char* out = (char*)to;
    for (int first = 0; first < columns; first += LANES)
        for (int k = 0; k < steps; k++)
            for (int column = first; column < first + LANES; column++)
                for (int at = k * neighbours; at < (k + 1) * neighbours; at++, out += size)
                    if (column < columns && at < inner)
                        std::memcpy(out, (const char*)from + ((int64_t)column * inner + at) * size, size);
                    else
                        std::memset(out, 0, size);
}

// out [rows, columns] = x [rows, inner] times the matrix. x: float32, or bfloat16 (with even inner, unless weights are int8).
// scratch holds at least (rows + 32) * (inner numbers of x + 16 bytes), 64-byte aligned; out must not lie over x.
// With an activation the matrix's panels alternate between gate and up, and out [rows, up's columns] is
// activation(gate) * up; out_columns says how many those are.
void twostroke_linear(Threads* threads, const Matrix* matrix, const Rows* x, const Rows* out, int32_t activation,
                      int32_t out_columns, uint32_t* scratch) {
    multiply(*threads, *matrix, *x, *out, activation, out_columns, scratch, nullptr);
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
