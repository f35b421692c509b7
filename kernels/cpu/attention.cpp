// Paged attention of a step's rows, prompts' chunks and decodes alike, to what the cache holds.
//
// A row at position p sees keys in tiles of 64 absolute positions, from the tile of its window's start on, in order:
//     s_j = scale * sum over parts of (q . k_j) * 2**e_j      softcap, mask      m' = max(m, max_j s_j)
//     l = l * exp(m - m') + sum_j exp(s_j - m')               o = o * exp(m - m') + sum_j exp(s_j - m') * v_j, j rising
// A tile that a row cannot see changes nothing of it, so its bits depend on its own prefix alone: not on how a prompt was
// cut, who else is in the step, or which thread came. Products of keys go pair by pair as in linear.cpp; those of values
// are float32. Keys and values of positions beyond the sequence are never read.
// Source: online softmax, Milakov and Gimelshein 2018; tiles as in FlashAttention, Dao et al. 2022.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

extern "C" {

struct Plane {
    const uint8_t *payload, *scales;  // [blocks, heads, block_tokens, row bytes] and [blocks, heads, block_tokens]
    int32_t codec, heads, block_tokens, width;
};

struct AttendSpan {
    const int32_t* blocks;
    int32_t row, start, count, reserved;
};

struct Attend {
    Rows queries[2];  // per part: heads * width numbers per row
    Plane keys[2];
    Plane values;
    Rows out;
    const AttendSpan* spans;
    int32_t num_parts, num_spans, heads, window;  // window 0: none
    float scale, softcap;                         // softcap 0: none
};

}  // extern "C"

namespace {

constexpr int TILE = 64, GROUPS = TILE / LANES;
constexpr int UNIT_ROWS = 96;  // query rows (token, head) that share a tile's unpacked keys and values
#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 6, MIX_ROWS = 6, MIX_LANES = 4;
#else
constexpr int SCORE_ROWS = 2, MIX_ROWS = 2, MIX_LANES = 2;
#endif
constexpr float NEVER = -INFINITY;

int padded(int width) { return (width + 31) / 32 * 32; }

struct Unit {
    int span, head, heads, first, rows;  // KV heads, and rows [first, first + rows) of the span's (token, head of the group)
};

// Whether a plane's rows are decoded by 64 numbers, which come in another order (simd.h).
bool by_64(const Plane& plane) { return DECODES_64 && plane.codec == FP8 && plane.width % 64 == 0; }

int number_bytes(int codec) { return codec == FP8 ? 1 : codec == BFLOAT16 ? 2 : 4; }

// Sixteen numbers of a row from `at` on, without its scale; fp8 comes divided by 256. WHOLE: they are all there.
template <int CODEC, bool WHOLE>
F32 numbers(const uint8_t* row, int at, int width) {
    const int count = WHOLE ? LANES : std::min(LANES, width - at);
    if (!WHOLE && count <= 0) return F32{};
    U8x16 codes{};
    U16x16 bits{};
    F32 v{};
    void* to = CODEC == FP8 ? (void*)&codes : CODEC == BFLOAT16 ? (void*)&bits : (void*)&v;
    const int size = CODEC == FP8 ? 1 : CODEC == BFLOAT16 ? 2 : 4;
    if (WHOLE)
        std::memcpy(to, row + (int64_t)at * size, LANES * size);
    else
        std::memcpy(to, row + (int64_t)at * size, count * size);
    return CODEC == FP8 ? decode_e4m3_by_256(codes) : CODEC == BFLOAT16 ? widen(bits) : v;
}

// A tile's rows of one plane: blocks are multiples of 16 tokens, so that 16 rows always lie together.
struct TileRows {
    const uint8_t* rows[GROUPS];
    F32 scales[GROUPS];  // of fp8, times 256 where its numbers come divided by that; else 1

    TileRows(const Plane& plane, const AttendSpan& span, int head, int tile, int held, bool scaled_down) {
        for (int g = 0; g < GROUPS; g++) {
            rows[g] = nullptr;
            scales[g] = splat(1.0f);
            if (g * LANES >= held) continue;
            const int position = tile * TILE + g * LANES;
            const int64_t block = span.blocks[position / plane.block_tokens];
            const int64_t place = (block * plane.heads + head) * plane.block_tokens + position % plane.block_tokens;
            rows[g] = plane.payload + place * plane.width * number_bytes(plane.codec);
            if (plane.codec == FP8) scales[g] = (F32)((widen_u8(plane.scales + place) + (scaled_down ? 8u : 0u)) << 23);
        }
    }
};

// What a unit keeps of one KV head from tile to tile.
struct State {
    std::vector<uint32_t> queries;  // [parts' steps][rows]
    std::vector<float> mixed;       // [rows][width]
    float top[UNIT_ROWS], total[UNIT_ROWS], shrink[UNIT_ROWS];
};
// Scratch of one thread.
struct Scratch {
    std::vector<uint32_t> keys;          // per part [group][steps][16]
    std::vector<float> values, weights;  // [TILE][width], [rows][TILE]
    std::vector<State> states;
};

template <bool PAIRS>
class Worker {
   public:
    Worker(const Attend& job, const Unit& unit, int head, Scratch& scratch, State& state)
        : job_(job),
          span_(job.spans[unit.span]),
          unit_(unit),
          head_(head),
          s_(scratch),
          state_(state),
          group_(job.heads / job.values.heads),
          width_(padded(job.values.width)),
          row_stride_((unit.rows + LANES - 1) / LANES * LANES) {}

    void begin() {
        take_queries();
        state_.mixed.assign((int64_t)unit_.rows * width_, 0.0f);
        s_.weights.resize(UNIT_ROWS * TILE);
        std::fill(state_.top, state_.top + unit_.rows, NEVER);
        std::fill(state_.total, state_.total + unit_.rows, 0.0f);
    }
    int first_tile() const { return job_.window ? std::max(0, position(0) - job_.window + 1) / TILE : 0; }
    int last_tile() const { return position(unit_.rows - 1) / TILE; }

    void attend(int tile) {
        const int held = std::min(TILE, span_.start + span_.count - tile * TILE);
        prefetch(tile);
        const TileRows values(job_.values, span_, head_, tile, held, !by_64(job_.values));
        score_tile(tile, held, values);
        if (by_64(job_.values)) return mix_from(Direct64{values, job_.values.width}, tile, held);
        switch (job_.values.codec) {
            case FP8: return mix_tile<FP8>(values, tile, held);
            case BFLOAT16: return mix_tile<BFLOAT16>(values, tile, held);
            default: mix_tile<FLOAT32>(values, tile, held);
        }
    }

   private:
    int position(int row) const { return span_.start + (unit_.first + row) / group_; }
    // The first row that sees anything of a tile; those before it are left as they are.
    int first_seeing(int tile) const {
        return std::max(0, (tile * TILE - span_.start) * group_ - unit_.first);
    }
    int steps(int part) const { return PAIRS ? padded(job_.keys[part].width) / 2 : padded(job_.keys[part].width); }

    // Blocks lie scattered: no hardware guesses where the next tile is. A unit of several heads passes through each tile's
    // blocks from end to end, and asks for its next head there.
    void prefetch(int tile) const {
        const bool wraps = head_ + 1 == unit_.head + unit_.heads;
        const int head = wraps ? unit_.head : head_ + 1, next = tile + wraps;
        const int held = std::min(TILE, span_.start + span_.count - next * TILE);
        for (int p = 0; p <= job_.num_parts; p++) {
            const Plane& plane = p < job_.num_parts ? job_.keys[p] : job_.values;
            const TileRows rows(plane, span_, head, next, held, false);
            const int bytes = LANES * plane.width * number_bytes(plane.codec);
            for (int g = 0; g < GROUPS && rows.rows[g]; g++)
                for (int at = 0; at < bytes; at += 64) __builtin_prefetch(rows.rows[g] + at, 0, 2);
        }
    }

    // The unit's queries side by side: per part [steps][rows, padded to 16], 32 bits each.
    void take_queries() {
        int total = 0;
        for (int p = 0; p < job_.num_parts; p++) total += steps(p);
        state_.queries.resize((int64_t)total * row_stride_);
        uint32_t* to = state_.queries.data();
        for (int p = 0; p < job_.num_parts; to += (int64_t)steps(p) * row_stride_, p++)
            for (int first = 0; first < unit_.rows; first += LANES) take_sixteen(p, first, to + first);
    }
    void take_sixteen(int part, int first, uint32_t* to) {
        const Rows& q = job_.queries[part];
        const int width = job_.keys[part].width, size = PAIRS ? 2 : 4, whole = width * size / 64 * LANES;
        const bool reordered = PAIRS && by_64(job_.keys[part]);
        const char* rows[LANES];
        for (int j = 0; j < LANES; j++) {
            const int at = unit_.first + std::min(first + j, unit_.rows - 1), head = head_ * group_ + at % group_;
            rows[j] = (const char*)q.data + ((span_.row + at / group_) * q.stride + (int64_t)head * width) * size;
        }
        for (int k = 0; k < whole; k += LANES) {
            U32 m[16];
            for (int j = 0; j < LANES; j++) m[j] = load<U32>(rows[j] + 4 * k);
            transpose(m);
            for (int i = 0; i < LANES; i++) {
                const int step = reordered ? k / 32 * 32 + place_in_64((k + i) % 32) : k + i;
                store(to + (int64_t)step * row_stride_, m[i]);
            }
        }
        for (int k = whole; k < steps(part); k++)
            for (int j = 0; j < LANES; j++) {
                uint32_t word = 0;
                std::memcpy(&word, rows[j] + 4 * k, std::max(0, std::min(4, width * size - 4 * k)));
                to[(int64_t)k * row_stride_ + j] = word;
            }
    }

    // ------------------------------------------------------------ scores

    // A tile's keys side by side: [group][steps][16 keys], 32 bits each.
    template <int CODEC, bool WHOLE>
    void take_keys(const Plane& plane, const TileRows& tile, int n, uint32_t* to) {
        const int row_bytes = plane.width * number_bytes(CODEC);
        for (int g = 0; g < GROUPS && tile.rows[g]; g++)
            for (int k = 0; k < n; k += LANES) {
                U32 m[16];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) {
                    const uint8_t* row = tile.rows[g] + j * row_bytes;
                    if (PAIRS)
                        m[j] = pack_exact(numbers<CODEC, WHOLE>(row, 2 * k, plane.width),
                                          numbers<CODEC, WHOLE>(row, 2 * k + LANES, plane.width));
                    else
                        m[j] = (U32)numbers<CODEC, WHOLE>(row, k, plane.width);
                }
                transpose(m);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store(to + ((int64_t)g * n + k + j) * LANES, m[j]);
            }
    }
    void take_keys_by_64(const Plane& plane, const TileRows& tile, int n, uint32_t* to) {
        for (int g = 0; g < GROUPS && tile.rows[g]; g++)
            for (int k = 0; k < n; k += 2 * LANES) {
                U32 low[16], high[16];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) decode_64(E4M3_TABLES, tile.rows[g] + j * plane.width + 2 * k, low[j], high[j]);
                uint32_t* at = to + ((int64_t)g * n + k) * LANES;
                transpose(low);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store(at + j * LANES, low[j]);
                transpose(high);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store(at + (j + LANES) * LANES, high[j]);
            }
    }
    template <int CODEC>
    void take_keys_of(const Plane& plane, const TileRows& tile, int n, uint32_t* to) {
        plane.width % 32 ? take_keys<CODEC, false>(plane, tile, n, to) : take_keys<CODEC, true>(plane, tile, n, to);
    }

    void score_tile(int tile, int held, const TileRows& values) {
        int total = 0;
        for (int p = 0; p < job_.num_parts; p++) total += steps(p);
        s_.keys.resize((int64_t)total * TILE);
        uint32_t* to = s_.keys.data();
        F32 scales[2][GROUPS];
        for (int p = 0; p < job_.num_parts; to += steps(p) * TILE, p++) {
            const Plane& plane = job_.keys[p];
            const TileRows rows(plane, span_, head_, tile, held, !(PAIRS && by_64(plane)));
            for (int g = 0; g < GROUPS; g++) scales[p][g] = rows.scales[g] * splat(job_.scale);
            if (PAIRS && by_64(plane)) {
                take_keys_by_64(plane, rows, steps(p), to);
                continue;
            }
            switch (plane.codec) {
                case FP8: take_keys_of<FP8>(plane, rows, steps(p), to); break;
                case BFLOAT16: take_keys_of<BFLOAT16>(plane, rows, steps(p), to); break;
                default: take_keys_of<FLOAT32>(plane, rows, steps(p), to);
            }
        }
        int row = first_seeing(tile);
        for (; row + SCORE_ROWS <= unit_.rows; row += SCORE_ROWS) score_rows<SCORE_ROWS>(row, tile, scales, values);
        for (; row + 2 <= unit_.rows; row += 2) score_rows<2>(row, tile, scales, values);
        if (row < unit_.rows) score_rows<1>(row, tile, scales, values);
    }

    template <int ROWS>
    void score_rows(int first, int tile, const F32 (&scales)[2][GROUPS], const TileRows& values) {
        F32 score[ROWS][GROUPS];
        const uint32_t *q = state_.queries.data() + first, *k = s_.keys.data();
        for (int p = 0; p < job_.num_parts; p++) {
            const int n = steps(p);
            F32 acc[ROWS][GROUPS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) acc[r][g] = F32{};
            for (int i = 0; i < n; i++, q += row_stride_) {
                U32 keys[GROUPS];
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) keys[g] = load<U32>(k + ((int64_t)g * n + i) * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const U32 x = splat_u32(q[r]);
#pragma GCC unroll 4
                    for (int g = 0; g < GROUPS; g++)
                        acc[r][g] = PAIRS ? dot_pairs(acc[r][g], keys[g], x) : fma((F32)keys[g], (F32)x, acc[r][g]);
                }
            }
            k += (int64_t)n * TILE;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++)
                    score[r][g] = p ? fma(acc[r][g], scales[p][g], score[r][g]) : acc[r][g] * scales[p][g];
        }
        for (int r = 0; r < ROWS; r++) weigh(first + r, tile, score[r], values);
    }

    // One row's scores of a tile become weights (times the values' scales); its running maximum and total follow.
    void weigh(int row, int tile, F32 (&score)[GROUPS], const TileRows& values) {
        static const I32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int last = position(row) - tile * TILE;                 // the last key it sees
        const int first = job_.window ? last - job_.window + 1 : -1;  // and the first
        F32 best = splat(NEVER);
        for (int g = 0; g < GROUPS; g++) {
            if (job_.softcap != 0.0f)
                score[g] = splat(job_.softcap) * hyperbolic_tangent(score[g] / splat(job_.softcap));
            const I32 key = COUNT + g * LANES;
            if (last < TILE - 1 || first > 0)
                score[g] = select((I32)(key <= last) & (I32)(key >= first), score[g], splat(NEVER));
            best = larger(best, score[g]);
        }
        const float top = std::max(state_.top[row], largest(best));
        float* weights = s_.weights.data() + row * TILE;
        if (top == NEVER) {
            state_.shrink[row] = 1.0f;
            std::fill(weights, weights + TILE, 0.0f);
            return;
        }
        state_.shrink[row] = top == state_.top[row] ? 1.0f : exponential(splat(state_.top[row] - top))[0];
        F32 totals[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            totals[g] = exponential(score[g] - splat(top));
            store(weights + g * LANES, totals[g] * values.scales[g]);
        }
        state_.total[row] = state_.total[row] * state_.shrink[row] + sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        state_.top[row] = top;
    }

    // ------------------------------------------------------------ values

    // Where sixteen values of key j come from: the cache itself, or a copy already widened.
    template <int CODEC, bool WHOLE>
    struct Direct {
        const TileRows& tile;
        int width;
        template <int WIDE>
        __attribute__((always_inline)) void take(int j, int column, F32 (&to)[WIDE]) const {
            const uint8_t* row = tile.rows[j / LANES] + (j % LANES) * width * number_bytes(CODEC);
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) to[c] = numbers<CODEC, WHOLE>(row, column + c * LANES, width);
        }
    };
    struct Direct64 {
        const TileRows& tile;
        int width;
        template <int WIDE>
        __attribute__((always_inline)) void take(int j, int column, F32 (&to)[WIDE]) const {
            U32 low, high;
            decode_64(E4M3_TABLES, tile.rows[j / LANES] + (j % LANES) * width + column, low, high);
            const F32 all[4] = {(F32)(low << 16), (F32)(low & 0xFFFF0000u), (F32)(high << 16), (F32)(high & 0xFFFF0000u)};
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) to[c] = all[c];  // WIDE is 4 wherever rows come by 64
        }
    };
    struct Widened {
        const float* values;
        int width;
        template <int WIDE>
        __attribute__((always_inline)) void take(int j, int column, F32 (&to)[WIDE]) const {
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) to[c] = load<F32>(values + j * width + column + c * LANES);
        }
    };

    template <int CODEC>
    void mix_tile(const TileRows& rows, int tile, int held) {
        const int width = job_.values.width;
        if (width % 32)
            mix_from(Direct<CODEC, false>{rows, width}, tile, held);
        else
            mix_from(Direct<CODEC, true>{rows, width}, tile, held);
    }
    template <class Source>
    void mix_from(const Source& source, int tile, int held) {
        if (unit_.rows <= MIX_ROWS) return mix(source, tile, held);
        s_.values.resize(TILE * width_);
        int i = 0;
        for (; i + MIX_LANES * LANES <= width_; i += MIX_LANES * LANES) widen_columns<MIX_LANES>(source, i, held);
        for (; i < width_; i += 2 * LANES) widen_columns<2>(source, i, held);
        mix(Widened{s_.values.data(), width_}, tile, held);
    }
    template <int WIDE, class Source>
    void widen_columns(const Source& source, int column, int held) {
        for (int j = 0; j < held; j++) {
            F32 value[WIDE];
            source.take(j, column, value);
            for (int c = 0; c < WIDE; c++) store(s_.values.data() + j * width_ + column + c * LANES, value[c]);
        }
    }
    template <class Source>
    void mix(const Source& source, int tile, int held) {
        // Keys that none of a few rows sees have no weight: they are not taken.
        const auto seen = [&](int last_row) { return std::min(held, position(last_row) - tile * TILE + 1); };
        int row = first_seeing(tile);
        for (; row + MIX_ROWS <= unit_.rows; row += MIX_ROWS)
            mix_columns<MIX_ROWS>(source, row, seen(row + MIX_ROWS - 1));
        for (; row + 2 <= unit_.rows; row += 2) mix_columns<2>(source, row, seen(row + 1));
        if (row < unit_.rows) mix_columns<1>(source, row, seen(row));
    }
    template <int ROWS, class Source>
    void mix_columns(const Source& source, int row, int held) {
        int column = 0;
        for (; column + MIX_LANES * LANES <= width_; column += MIX_LANES * LANES)
            mix_rows<ROWS, MIX_LANES>(source, row, column, held);
        for (; column < width_; column += 2 * LANES) mix_rows<ROWS, 2>(source, row, column, held);
    }
    template <int ROWS, int WIDE, class Source>
    void mix_rows(const Source& source, int first, int column, int held) {
        F32 acc[ROWS][WIDE];
        float* mixed = state_.mixed.data() + (int64_t)first * width_ + column;
        const float* weights = s_.weights.data() + first * TILE;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++)
                acc[r][c] = load<F32>(mixed + r * width_ + c * LANES) * splat(state_.shrink[first + r]);
        for (int j = 0; j < held; j++) {
            F32 value[WIDE];
            source.take(j, column, value);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const F32 weight = splat(weights[r * TILE + j]);
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++) acc[r][c] = fma(weight, value[c], acc[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) store(mixed + r * width_ + c * LANES, acc[r][c]);
    }

   public:
    void give() {
        const int width = job_.values.width;
        for (int r = 0; r < unit_.rows; r++) {
            const int at = unit_.first + r, head = head_ * group_ + at % group_;
            const int64_t to = (span_.row + at / group_) * job_.out.stride + (int64_t)head * width;
            const float* mixed = state_.mixed.data() + (int64_t)r * width_;
            if (by_64(job_.values))
                for (int i = 0; i < width; i += 4 * LANES) {
                    F32 v[4] = {load<F32>(mixed + i), load<F32>(mixed + i + LANES), load<F32>(mixed + i + 2 * LANES),
                                load<F32>(mixed + i + 3 * LANES)};
                    restore_order(v);
                    for (int c = 0; c < 4; c++) put(to + i + c * LANES, LANES, v[c], state_.total[r]);
                }
            else
                for (int i = 0; i < width; i += LANES)
                    put(to + i, std::min(LANES, width - i), load<F32>(mixed + i), state_.total[r]);
        }
    }
   private:
    void put(int64_t at, int count, F32 v, float total) {
        v = (v + splat(0.0f)) / splat(total);  // + 0: a negative zero must not tell whether a blank tile was there
        if (PAIRS && count == LANES) return store_bf16((uint16_t*)job_.out.data + at, v);
        if (!PAIRS && count == LANES) return store((float*)job_.out.data + at, v);
        const U16x16 bits = narrow(v);
        PAIRS ? std::memcpy((uint16_t*)job_.out.data + at, &bits, 2 * count)
              : std::memcpy((float*)job_.out.data + at, &v, 4 * count);
    }

    const Attend& job_;
    const AttendSpan& span_;
    const Unit unit_;
    const int head_;
    Scratch& s_;
    State& state_;
    const int group_, width_, row_stride_;
};

template <bool PAIRS>
void run(const Attend& job, const Unit& unit) {
    static thread_local Scratch scratch;
    if ((int)scratch.states.size() < unit.heads) scratch.states.resize(unit.heads);
    std::vector<Worker<PAIRS>> workers;
    workers.reserve(unit.heads);
    for (int h = 0; h < unit.heads; h++) {
        workers.emplace_back(job, unit, unit.head + h, scratch, scratch.states[h]);
        workers.back().begin();
    }
    for (int tile = workers[0].first_tile(); tile <= workers[0].last_tile(); tile++)
        for (auto& worker : workers) worker.attend(tile);
    for (auto& worker : workers) worker.give();
}

}  // namespace

extern "C" {

// Rows of no span are left as they are.
void twostroke_attend(Threads* threads, const Attend* job) {
    const int kv_heads = job->values.heads, group = job->heads / kv_heads;
    // Few rows leave little to compute: there a unit takes several heads, whose bytes lie side by side in every block.
    int together = kv_heads;
    while (together % 2 == 0 && job->num_spans * (kv_heads / together) < 2 * threads->count()) together /= 2;
    if (together % 2) together = 1;
    std::vector<Unit> units;
    for (int s = 0; s < job->num_spans; s++) {
        const int rows = job->spans[s].count * group, heads = rows <= MIX_ROWS ? together : 1;
        for (int first = 0; first < rows; first += UNIT_ROWS)
            for (int head = 0; head < kv_heads; head += heads)
                units.push_back({s, head, heads, first, std::min(UNIT_ROWS, rows - first)});
    }
    threads->share((int)units.size(), [&](int i) {
        if (job->out.kind == BFLOAT16)
            run<true>(*job, units[i]);
        else
            run<false>(*job, units[i]);
    });
}

}  // extern "C"
