// Low-rank changes of products: y += scale * up^T (down x) for the rows of every adapter of a batch, in one call per matrix.
//
// The numbers of a row are float32 sums in one order, whatever the other rows, adapters and threads: down x is summed over
// sixteen lanes and these by the fixed tree of simd::sum; up^T t in the order of ranks. Source: Punica (Chen et al. 2023) for
// one product grouped by adapter; the kernels are for a CPU's registers.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "api.h"
#include "lanes.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

namespace {

constexpr int ROWS = 4;              // of a register block
constexpr int BLOCK = 2 * LANES;     // columns of `up` that are stored together
constexpr int PIECE_ROWS = 16;       // that read a matrix together, from a core's cache
constexpr int64_t SHARED = 1 << 19;  // products of a call that is worth several threads: they take about 50 microseconds

// Work of one thread: rows [row, row + num_rows) of an adapter, and one part of its change.
struct Piece {
    const AdapterRows* adapter;
    const LowRank* part;
    int row, num_rows;
    float* inner;  // down x, scaled: [num_rows, rank]
};

template <int KIND>
F32 whole(const void* data, int64_t at) {
    return KIND == BFLOAT16 ? load_bf16((const uint16_t*)data + at) : load<F32>((const float*)data + at);
}

// Sum of products of `down` and x over the columns. PAIRS: both are bfloat16, and 32 numbers are multiplied at once.
template <int KIND, int X>
struct Dot {
    static constexpr bool PAIRS = KIND == BFLOAT16 && X == BFLOAT16;
    static constexpr int STEP = PAIRS ? 2 * LANES : LANES;
    using Numbers = std::conditional_t<PAIRS, U32, F32>;

    template <int OF>
    static Numbers take(const void* data, int64_t at) {
        if constexpr (PAIRS)
            return load<U32>((const uint16_t*)data + at);
        else
            return whole<OF>(data, at);
    }
    // Numbers from `count` on are zeros.
    template <int OF>
    static Numbers take_some(const void* data, int64_t at, int count) {
        if constexpr (PAIRS) {
            uint16_t some[2 * LANES] = {};
            std::memcpy(some, (const uint16_t*)data + at, 2 * count);
            return load<U32>(some);
        } else {
            return get(data, OF, at, count);
        }
    }
    static F32 add(F32 sum, Numbers w, Numbers v) {
        if constexpr (PAIRS)
            return dot_pairs(sum, w, v);
        else
            return fma(w, v, sum);
    }
};

// inner[row + i][rank + k] for i below R and k below K.
template <int KIND, int X, int R, int K>
void shrink_block(const Piece& piece, const Rows& x, int row, int rank) {
    using D = Dot<KIND, X>;
    const LowRank& part = *piece.part;
    int64_t from[R];
    for (int i = 0; i < R; i++) from[i] = piece.adapter->rows[piece.row + row + i] * x.stride;
    F32 sums[R][K] = {};
    int c = 0;
    for (; c + D::STEP <= part.inner; c += D::STEP) {
        typename D::Numbers w[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) w[k] = D::template take<KIND>(part.down, (int64_t)(rank + k) * part.inner + c);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const auto v = D::template take<X>(x.data, from[i] + c);
#pragma GCC unroll 8
            for (int k = 0; k < K; k++) sums[i][k] = D::add(sums[i][k], w[k], v);
        }
    }
    if (const int left = part.inner - c; left > 0)
        for (int k = 0; k < K; k++) {
            const auto w = D::template take_some<KIND>(part.down, (int64_t)(rank + k) * part.inner + c, left);
            for (int i = 0; i < R; i++)
                sums[i][k] = D::add(sums[i][k], w, D::template take_some<X>(x.data, from[i] + c, left));
        }
    for (int i = 0; i < R; i++)
        for (int k = 0; k < K; k++) piece.inner[(row + i) * part.rank + rank + k] = sum(sums[i][k]) * part.scale;
}
template <int KIND, int X, int R>
void shrink_rows(const Piece& piece, const Rows& x, int row) {
    constexpr int RANKS = R > 1 ? 4 : 8;  // so many sums that none waits for the one before
    int rank = 0;
    for (; rank + RANKS <= piece.part->rank; rank += RANKS) shrink_block<KIND, X, R, RANKS>(piece, x, row, rank);
    for (; rank < piece.part->rank; rank++) shrink_block<KIND, X, R, 1>(piece, x, row, rank);
}
template <int KIND, int X>
void shrink(const Piece& piece, const Rows& x) {
    int row = 0;
    for (; row + ROWS <= piece.num_rows; row += ROWS) shrink_rows<KIND, X, ROWS>(piece, x, row);
    for (; row < piece.num_rows; row++) shrink_rows<KIND, X, 1>(piece, x, row);
}

// Columns [column, column + 32 * W) of the change, of R rows; `up` has zeros behind its last column.
template <int KIND, int Y, int R, int W>
void expand_block(const Piece& piece, const Rows& y, int row, int column) {
    const LowRank& part = *piece.part;
    const int64_t stride = (part.count + BLOCK - 1) / BLOCK * BLOCK;
    F32 sums[R][2 * W] = {};
    for (int k = 0; k < part.rank; k++) {
        F32 w[2 * W];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) {
            const int64_t at = k * stride + column + j * BLOCK;
            if (KIND == BFLOAT16) {
                const U32 both = load<U32>((const uint16_t*)part.up + at);
                w[2 * j] = (F32)(both << 16), w[2 * j + 1] = (F32)(both & 0xFFFF0000u);
            } else {
                w[2 * j] = load<F32>((const float*)part.up + at);
                w[2 * j + 1] = load<F32>((const float*)part.up + at + LANES);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const F32 t = splat(piece.inner[(row + i) * part.rank + k]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * W; j++) sums[i][j] = fma(t, w[j], sums[i][j]);
        }
    }
    for (int i = 0; i < R; i++) {
        const int64_t to = piece.adapter->rows[piece.row + row + i] * y.stride + part.first;
        for (int j = 0; j < 2 * W; j++) {
            const int count = std::min(LANES, part.count - column - j * LANES);
            if (count <= 0) break;
            const int64_t at = to + (int64_t)(column / LANES + j) * part.step;
            put(y.data, Y, at, count, get(y.data, Y, at, count) + sums[i][j]);
        }
    }
}
template <int KIND, int Y, int R>
void expand_rows(const Piece& piece, const Rows& y, int row) {
    constexpr int WIDE = R > 1 ? 2 : 4;  // blocks of columns
    int column = 0;
    for (; column + WIDE * BLOCK <= piece.part->count; column += WIDE * BLOCK)
        expand_block<KIND, Y, R, WIDE>(piece, y, row, column);
    for (; column < piece.part->count; column += BLOCK) expand_block<KIND, Y, R, 1>(piece, y, row, column);
}
template <int KIND, int Y>
void expand(const Piece& piece, const Rows& y) {
    int row = 0;
    for (; row + ROWS <= piece.num_rows; row += ROWS) expand_rows<KIND, Y, ROWS>(piece, y, row);
    for (; row < piece.num_rows; row++) expand_rows<KIND, Y, 1>(piece, y, row);
}
template <int KIND>
void add(const Piece& piece, const Rows& x, const Rows& y) {
    x.kind == FLOAT32 ? shrink<KIND, FLOAT32>(piece, x) : shrink<KIND, BFLOAT16>(piece, x);
    y.kind == FLOAT32 ? expand<KIND, FLOAT32>(piece, y) : expand<KIND, BFLOAT16>(piece, y);
}

void share_if(bool worth, Threads& threads, int num_parts, const std::function<void(int)>& part) {
    if (worth) return threads.share(num_parts, part);
    for (int i = 0; i < num_parts; i++) part(i);
}

}  // namespace

extern "C" {

void twostroke_add_changes(Threads* threads, const AdapterRows* adapters, int32_t count, int32_t place, const Rows* x,
                           const Rows* y) {
    static thread_local std::vector<Piece> pieces;
    static thread_local std::vector<float> memory;
    pieces.clear();
    int64_t numbers = 0, products = 0;
    for (int a = 0; a < count; a++)
        for (int p = adapters[a].starts[place]; p < adapters[a].starts[place + 1]; p++) {
            const LowRank& part = adapters[a].parts[p];
            for (int row = 0; row < adapters[a].num_rows; row += PIECE_ROWS)
                pieces.push_back({adapters + a, &part, row, std::min(PIECE_ROWS, adapters[a].num_rows - row), nullptr});
            numbers += (int64_t)adapters[a].num_rows * part.rank;
            products += (int64_t)adapters[a].num_rows * part.rank * (part.inner + part.count);
        }
    if ((int64_t)memory.size() < numbers) memory.resize(numbers);
    float* inner = memory.data();
    for (Piece& piece : pieces) piece.inner = inner, inner += (int64_t)piece.num_rows * piece.part->rank;
    const std::vector<Piece>& all = pieces;  // this thread's, also where other threads read them
    share_if(products >= SHARED, *threads, (int)all.size(), [&](int i) {
        all[i].part->kind == FLOAT32 ? add<FLOAT32>(all[i], *x, *y) : add<BFLOAT16>(all[i], *x, *y);
    });
}

void twostroke_gate(Threads* threads, const Rows* halves, const Rows* out, int32_t activation, int32_t columns) {
    const bool narrow_out = out->kind == BFLOAT16;
    share_if((int64_t)out->rows * columns >= SHARED / 8, *threads, out->rows, [&](int r) {
        for (int c = 0; c < columns; c += LANES) {
            const int64_t at = r * halves->stride + 2 * (int64_t)c;
            const F32 gate = get(halves->data, halves->kind, at, LANES);
            const F32 up = get(halves->data, halves->kind, at + LANES, LANES);
            put(out->data, out->kind, r * out->stride + c, columns - c, gated(gate, up, activation, narrow_out));
        }
    });
}

}  // extern "C"
