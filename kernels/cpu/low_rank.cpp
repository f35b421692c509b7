// Low-rank changes of products: y += scale * up^T (down x) for the rows of every adapter of a batch, in one call per matrix.
//
// The numbers of a row are float32 sums in one order, whatever the other rows, adapters and threads: down x is summed over
// sixteen lanes and these by the fixed tree of simd::sum; up^T t in the order of ranks. Source: Punica (Chen et al. 2023) for
// one product grouped by adapter; the kernels are for a CPU's registers.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "api.h"
#include "lanes.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

namespace {

constexpr int ROWS = 4, RANKS = 4;  // of one register block of `down`
constexpr int WIDE = 4;             // vectors of sixteen columns of one register block of `up`
constexpr int PART_ROWS = 16, PART_COLUMNS = 1024;

// Work of one thread: rows [row, row + num_rows) of an adapter, and one part of its change.
struct Piece {
    const AdapterRows* adapter;
    const LowRank* part;
    int row, num_rows;
    int64_t place;  // of `inner` in the memory of the call
    float* inner;   // down x, scaled: [num_rows, rank]
};

template <int KIND>
F32 whole(const void* data, int64_t at) {
    return KIND == BFLOAT16 ? load_bf16((const uint16_t*)data + at) : load<F32>((const float*)data + at);
}

// inner[row + i][rank + k] for i below R and k below K.
template <int KIND, int X, int R, int K>
void shrink_block(const Piece& piece, const Rows& x, int row, int rank) {
    const LowRank& part = *piece.part;
    int64_t from[R];
    for (int i = 0; i < R; i++) from[i] = piece.adapter->rows[piece.row + row + i] * x.stride;
    F32 sums[R][K] = {};
    int c = 0;
    for (; c + LANES <= part.inner; c += LANES) {
        F32 w[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) w[k] = whole<KIND>(part.down, (int64_t)(rank + k) * part.inner + c);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const F32 v = whole<X>(x.data, from[i] + c);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) sums[i][k] = fma(w[k], v, sums[i][k]);
        }
    }
    if (c < part.inner)
        for (int k = 0; k < K; k++) {
            const F32 w = get(part.down, KIND, (int64_t)(rank + k) * part.inner + c, part.inner - c);
            for (int i = 0; i < R; i++) sums[i][k] = fma(w, get(x.data, X, from[i] + c, part.inner - c), sums[i][k]);
        }
    for (int i = 0; i < R; i++)
        for (int k = 0; k < K; k++) piece.inner[(row + i) * part.rank + rank + k] = sum(sums[i][k]) * part.scale;
}
template <int KIND, int X, int R>
void shrink_rows(const Piece& piece, const Rows& x, int row) {
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

// Columns [column, column + 16 * W) of the change, of R rows. The last vector may end within the change.
template <int KIND, int Y, int R, int W>
void expand_block(const Piece& piece, const Rows& y, int row, int column) {
    const LowRank& part = *piece.part;
    F32 sums[R][W] = {};
    for (int k = 0; k < part.rank; k++) {
        const int64_t at = (int64_t)k * part.count + column;
        F32 w[W];
#pragma GCC unroll 4
        for (int j = 0; j < W; j++)
            w[j] = W > 1 ? whole<KIND>(part.up, at + j * LANES) : get(part.up, KIND, at, part.count - column);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const F32 t = splat(piece.inner[(row + i) * part.rank + k]);
#pragma GCC unroll 4
            for (int j = 0; j < W; j++) sums[i][j] = fma(t, w[j], sums[i][j]);
        }
    }
    for (int i = 0; i < R; i++) {
        const int64_t to = piece.adapter->rows[piece.row + row + i] * y.stride + part.first;
        for (int j = 0; j < W; j++) {
            const int64_t at = to + (int64_t)(column / LANES + j) * part.step;
            const int count = std::min(LANES, part.count - column - j * LANES);
            put(y.data, Y, at, count, get(y.data, Y, at, count) + sums[i][j]);
        }
    }
}
template <int KIND, int Y, int R>
void expand_rows(const Piece& piece, const Rows& y, int row, int column, int end) {
    for (; column + WIDE * LANES <= end; column += WIDE * LANES) expand_block<KIND, Y, R, WIDE>(piece, y, row, column);
    for (; column < end; column += LANES) expand_block<KIND, Y, R, 1>(piece, y, row, column);
}
template <int KIND, int Y>
void expand(const Piece& piece, const Rows& y, int column) {
    const int end = std::min(piece.part->count, column + PART_COLUMNS);
    int row = 0;
    for (; row + ROWS <= piece.num_rows; row += ROWS) expand_rows<KIND, Y, ROWS>(piece, y, row, column, end);
    for (; row < piece.num_rows; row++) expand_rows<KIND, Y, 1>(piece, y, row, column, end);
}

}  // namespace

extern "C" {

void twostroke_add_changes(Threads* threads, const AdapterRows* adapters, int32_t count, int32_t place, const Rows* x,
                           const Rows* y) {
    static thread_local std::vector<Piece> pieces;
    static thread_local std::vector<float> inner;
    static thread_local std::vector<std::pair<int, int>> spans;  // of columns: the piece, and the first column
    pieces.clear(), spans.clear();
    int64_t numbers = 0;
    for (int a = 0; a < count; a++)
        for (int p = adapters[a].starts[place]; p < adapters[a].starts[place + 1]; p++) {
            const LowRank& part = adapters[a].parts[p];
            for (int row = 0; row < adapters[a].num_rows; row += PART_ROWS) {
                const int rows = std::min(PART_ROWS, adapters[a].num_rows - row);
                for (int column = 0; column < part.count; column += PART_COLUMNS)
                    spans.push_back({(int)pieces.size(), column});
                pieces.push_back({adapters + a, &part, row, rows, numbers, nullptr});
                numbers += (int64_t)rows * part.rank;
            }
        }
    if (pieces.empty()) return;
    if ((int64_t)inner.size() < numbers) inner.resize(numbers);
    for (Piece& piece : pieces) piece.inner = inner.data() + piece.place;
    const std::vector<Piece>& all = pieces;  // this thread's, also where other threads read them
    const std::vector<std::pair<int, int>>& columns = spans;
    threads->share((int)all.size(), [&](int i) {
        const bool wide = x->kind == FLOAT32;
        if (all[i].part->kind == FLOAT32)
            return wide ? shrink<FLOAT32, FLOAT32>(all[i], *x) : shrink<FLOAT32, BFLOAT16>(all[i], *x);
        return wide ? shrink<BFLOAT16, FLOAT32>(all[i], *x) : shrink<BFLOAT16, BFLOAT16>(all[i], *x);
    });
    threads->share((int)columns.size(), [&](int i) {
        const Piece& piece = all[columns[i].first];
        const int column = columns[i].second;
        const bool wide = y->kind == FLOAT32;
        if (piece.part->kind == FLOAT32)
            return wide ? expand<FLOAT32, FLOAT32>(piece, *y, column) : expand<FLOAT32, BFLOAT16>(piece, *y, column);
        return wide ? expand<BFLOAT16, FLOAT32>(piece, *y, column) : expand<BFLOAT16, BFLOAT16>(piece, *y, column);
    });
}

void twostroke_gate(Threads* threads, const Rows* halves, const Rows* out, int32_t activation, int32_t columns) {
    const bool narrow_out = out->kind == BFLOAT16;
    threads->share(out->rows, [&](int r) {
        for (int c = 0; c < columns; c += LANES) {
            const int64_t at = r * halves->stride + 2 * (int64_t)c;
            const F32 gate = get(halves->data, halves->kind, at, LANES);
            const F32 up = get(halves->data, halves->kind, at + LANES, LANES);
            put(out->data, out->kind, r * out->stride + c, columns - c, activate(gate, activation, narrow_out) * up);
        }
    });
}

}  // extern "C"
