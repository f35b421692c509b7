// Paged attention of a step's rows, prompts' chunks and decodes alike, to what the cache holds.
//
// A row at position p sees keys in tiles of 64 absolute positions, from the tile of its window's start on, in order:
//     s_j = log2(e) * scale * sum over parts of (q . k_j) * 2**e_j      softcap, mask      m' = max(m, max_j s_j)
//     l = l * 2**(m - m') + sum_j 2**(s_j - m')     o = o * 2**(m - m') + sum_j 2**(s_j - m') * 2**e_j * v_j, j rising
// A tile that a row cannot see changes nothing of it, so its bits depend on its own prefix alone: not on how a prompt was
// cut, who else is in the step, or which thread came. Where rows are bfloat16, products go pair by pair as in linear.cpp:
// of neighbours within a key, of neighbouring keys for values, whose weights are rounded to bfloat16 (l is summed before).
// Keys and values of positions beyond the sequence change nothing.
// Source: online softmax, Milakov and Gimelshein 2018; tiles and rounded weights as in FlashAttention, Dao et al. 2022.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "cache.h"
#include "simd.h"
#include "threads.h"

using namespace simd;
using namespace cache;

namespace {

constexpr int UNIT_ROWS = 96;  // query rows (token, head) that share a tile's unpacked keys and values
#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 6, MIX_ROWS = 6, MIX_LANES = 4, DIRECT_ROWS = 4;
#else
constexpr int SCORE_ROWS = 2, MIX_ROWS = 2, MIX_LANES = 2, DIRECT_ROWS = 2;
#endif
constexpr float NEVER = -INFINITY, LOG2_E = 1.44269504088896341f;

int padded(int width) { return (width + 31) / 32 * 32; }

struct Unit {
    int span, head, heads, first, rows;  // KV heads, and rows [first, first + rows) of the span's (token, head of the group)
};

// What a unit keeps of one KV head from tile to tile, and between a tile's phases.
struct State {
    std::vector<uint32_t> queries;  // [parts' steps][rows, padded to 16]
    std::vector<float> mixed;       // [rows][width]
    std::vector<float> weights;     // [rows][TILE]: scores, then weights (as pairs of bfloat16 in the first half)
    float top[UNIT_ROWS], total[UNIT_ROWS], shrink[UNIT_ROWS];
};
// Scratch of one thread.
struct Scratch {
    std::vector<uint32_t> keys;    // per part [group][steps][16]
    std::vector<uint32_t> values;  // [TILE's steps][width]
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
        state_.weights.resize(UNIT_ROWS * TILE);
        std::fill(state_.top, state_.top + unit_.rows, NEVER);
        std::fill(state_.total, state_.total + unit_.rows, 0.0f);
    }
    int first_tile() const { return job_.window ? std::max(0, position(0) - job_.window + 1) / TILE : 0; }
    int last_tile() const { return position(unit_.rows - 1) / TILE; }

    // The rows' scores of a tile.
    void score(int tile) {
        F32 scales[2][GROUPS];
        int64_t words = 0;
        for (int p = 0; p < job_.num_parts; p++) words += (int64_t)steps(p) * TILE;
        s_.keys.resize(words);
        uint32_t* to = s_.keys.data();
        for (int p = 0; p < job_.num_parts; to += (int64_t)steps(p) * TILE, p++) {
            const Plane& plane = job_.keys[p];
            const TileRows rows = rows_of(plane, tile);
            for (int g = 0; g < GROUPS; g++)
                scales[p][g] = rows.scales(g, !by_64(plane)) * splat(job_.scale * (job_.softcap ? 1.0f : LOG2_E));
            if (job_.num_parts == 1 && by_64(plane) && unit_.rows <= DIRECT_ROWS && plane.width <= 128)
                return plane.width == 64 ? score_few<64>(tile, rows, scales[0]) : score_few<128>(tile, rows, scales[0]);
            for (int g = 0; g < GROUPS && rows.rows[g]; g++)
                take_group(plane, rows.rows[g], steps(p), to + (int64_t)g * steps(p) * LANES);
        }
        int row = first_seeing(tile);
        for (; row + SCORE_ROWS <= unit_.rows; row += SCORE_ROWS) score_rows<SCORE_ROWS>(row, scales);
        for (; row + 2 <= unit_.rows; row += 2) score_rows<2>(row, scales);
        if (row < unit_.rows) score_rows<1>(row, scales);
    }

    // Scores become weights.
    void weigh(int tile) {
        const TileRows values = rows_of(job_.values, tile);
        const int count = held(tile);
        F32 scales[GROUPS];
        for (int g = 0; g < GROUPS; g++)  // beyond the sequence scales are anything: times a weight of zero that is no zero
            scales[g] = select((I32)(COUNT + g * LANES < count), values.scales(g, !by_64(job_.values)), splat(1.0f));
        for (int row = first_seeing(tile); row < unit_.rows; row++) weigh(row, tile, scales);
    }

    // The weighted values of a tile are added.
    void mix(int tile) {
        const TileRows values = rows_of(job_.values, tile);
        if (by_64(job_.values)) {
            const Ahead ahead(rows_of(job_.keys[0], tile + 1), values);
            return mix_from(ValuesBy64{values, ahead}, tile);
        }
        switch (job_.values.codec) {
            case FP8: return mix_of<FP8>(values, tile);
            case BFLOAT16: return mix_of<BFLOAT16>(values, tile);
            default: mix_of<FLOAT32>(values, tile);
        }
    }

    void give() {
        const int width = job_.values.width;
        for (int r = 0; r < unit_.rows; r++) {
            const int at = unit_.first + r, head = head_ * group_ + at % group_;
            const int64_t to = (span_.row + at / group_) * job_.out.stride + (int64_t)head * width;
            const float* mixed = state_.mixed.data() + (int64_t)r * width_;
            for (int i = 0; i < width && by_64(job_.values); i += 4 * LANES) {
                F32 v[4] = {load<F32>(mixed + i), load<F32>(mixed + i + LANES), load<F32>(mixed + i + 2 * LANES),
                            load<F32>(mixed + i + 3 * LANES)};
                restore_columns(v);
                for (int c = 0; c < 4; c++) put(to + i + c * LANES, LANES, v[c], state_.total[r]);
            }
            for (int i = 0; i < width && !by_64(job_.values); i += LANES)
                put(to + i, std::min(LANES, width - i), load<F32>(mixed + i), state_.total[r]);
        }
    }

   private:
    inline static const I32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static constexpr int KEYS = PAIRS ? 2 : 1;  // whose values are multiplied in one step

    int position(int row) const { return span_.start + (unit_.first + row) / group_; }
    int held(int tile) const { return std::min(TILE, span_.start + span_.count - tile * TILE); }
    // The first row that sees anything of a tile; those before it are left as they are.
    int first_seeing(int tile) const { return std::max(0, (tile * TILE - span_.start) * group_ - unit_.first); }
    int steps(int part) const { return PAIRS ? padded(job_.keys[part].width) / 2 : padded(job_.keys[part].width); }
    TileRows rows_of(const Plane& plane, int tile) const { return {plane, span_, head_, tile, held(tile)}; }
    // Whether a plane's rows are decoded by 64 numbers at once.
    static bool by_64(const Plane& plane) { return DECODES_64 && PAIRS && plane.codec == FP8 && plane.width % 64 == 0; }

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
        const char* rows[LANES];
        for (int j = 0; j < LANES; j++) {
            const int at = unit_.first + std::min(first + j, unit_.rows - 1), head = head_ * group_ + at % group_;
            rows[j] = (const char*)q.data + ((span_.row + at / group_) * q.stride + (int64_t)head * width) * size;
        }
        for (int k = 0; k < whole; k += LANES) {
            U32 m[16];
            for (int j = 0; j < LANES; j++) m[j] = load<U32>(rows[j] + 4 * k);
            transpose(m);
            for (int i = 0; i < LANES; i++) store(to + (int64_t)(k + i) * row_stride_, m[i]);
        }
        for (int k = whole; k < steps(part); k++)
            for (int j = 0; j < LANES; j++) {
                uint32_t word = 0;
                std::memcpy(&word, rows[j] + 4 * k, std::max(0, std::min(4, width * size - 4 * k)));
                to[(int64_t)k * row_stride_ + j] = word;
            }
    }

    // ------------------------------------------------------------ scores

    void take_group(const Plane& plane, const uint8_t* rows, int n, uint32_t* to) {
        if (by_64(plane)) return take_keys_by_64(rows, plane.width, to);
        const bool whole = plane.width % 32 == 0;
        switch (plane.codec) {
            case FP8: return (whole ? take_keys<PAIRS, FP8, true> : take_keys<PAIRS, FP8, false>)(rows, plane.width, n, to);
            case BFLOAT16:
                return (whole ? take_keys<PAIRS, BFLOAT16, true> : take_keys<PAIRS, BFLOAT16, false>)(rows, plane.width, n, to);
            default: (whole ? take_keys<PAIRS, FLOAT32, true> : take_keys<PAIRS, FLOAT32, false>)(rows, plane.width, n, to);
        }
    }
    static void take_keys_by_64(const uint8_t* rows, int width, uint32_t* to) {
        for (int at = 0; at < width; at += 16) {
            U32 codes[4];
            load_side_by_side(rows + at, width, codes);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, to += 2 * LANES) {
                U32 first, last;
                decode_64(E4M3_TABLES, codes[i], first, last);
                store(to, first), store(to + LANES, last);
            }
        }
    }

    // As `score_rows`, for all of a few rows: keys are decoded on their way into products. The width is known when this is
    // compiled, because the addresses of sixteen rows are more than there are registers.
    template <int WIDTH>
    void score_few(int tile, const TileRows& rows, const F32 (&scales)[GROUPS]) {
        const Ahead values(rows_of(job_.values, tile), rows);
        unit_.rows <= 2 ? score_directly<WIDTH, 2>(rows, scales, values)
                        : score_directly<WIDTH, DIRECT_ROWS>(rows, scales, values);
    }
    template <int WIDTH, int ROWS>
    void score_directly(const TileRows& rows, const F32 (&scales)[GROUPS], const Ahead& ahead) {
        F32 acc[ROWS][GROUPS];
        const uint32_t* q[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            q[r] = state_.queries.data() + std::min(r, unit_.rows - 1);
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) acc[r][g] = F32{};
        }
        for (int at = 0; at < WIDTH; at += 16) {
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) {
                if (rows.rows[g] == nullptr) continue;
#pragma GCC unroll 4
                for (int line = 0; line < 4; line++) ahead.ask(g, 16 * at + 64 * line);
                U32 codes[4];
                load_side_by_side(rows.rows[g] + at, WIDTH, codes);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    U32 first, last;
                    decode_64(E4M3_TABLES, codes[i], first, last);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        acc[r][g] = dot_pairs(acc[r][g], first, splat_u32(q[r][2 * i * LANES]));
                        acc[r][g] = dot_pairs(acc[r][g], last, splat_u32(q[r][(2 * i + 1) * LANES]));
                    }
                }
            }
            for (int r = 0; r < ROWS; r++) q[r] += 8 * LANES;
        }
        for (int r = 0; r < std::min(ROWS, unit_.rows); r++)
            for (int g = 0; g < GROUPS; g++) store(state_.weights.data() + r * TILE + g * LANES, acc[r][g] * scales[g]);
    }

    template <int ROWS>
    void score_rows(int first, const F32 (&scales)[2][GROUPS]) {
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
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < GROUPS; g++) store(state_.weights.data() + (first + r) * TILE + g * LANES, score[r][g]);
    }

    // One row's scores of a tile become weights (times the values' scales); its running maximum and total follow.
    void weigh(int row, int tile, const F32 (&scales)[GROUPS]) {
        const int last = position(row) - tile * TILE;                 // the last key it sees
        const int first = job_.window ? last - job_.window + 1 : -1;  // and the first
        float* weights = state_.weights.data() + row * TILE;
        F32 score[GROUPS], best = splat(NEVER);
        for (int g = 0; g < GROUPS; g++) {
            score[g] = load<F32>(weights + g * LANES);
            if (job_.softcap != 0.0f)
                score[g] = splat(job_.softcap * LOG2_E) * hyperbolic_tangent(score[g] / splat(job_.softcap));
            const I32 key = COUNT + g * LANES;
            if (last < TILE - 1 || first > 0)
                score[g] = select((I32)(key <= last) & (I32)(key >= first), score[g], splat(NEVER));
            best = larger(best, score[g]);
        }
        const float top = std::max(state_.top[row], largest(best));
        if (top == NEVER) {
            state_.shrink[row] = 1.0f;
            std::fill(weights, weights + TILE, 0.0f);
            return;
        }
        state_.shrink[row] = top == state_.top[row] ? 1.0f : power_of_two(splat(state_.top[row] - top))[0];
        F32 weight[GROUPS];
        for (int g = 0; g < GROUPS; g++) weight[g] = power_of_two(score[g] - splat(top));
        const float total = sum((weight[0] + weight[1]) + (weight[2] + weight[3]));
        state_.total[row] = state_.total[row] * state_.shrink[row] + total;
        state_.top[row] = top;
        for (int g = 0; g < GROUPS; g++) weight[g] = weight[g] * scales[g];
        for (int g = 0; g < GROUPS; g += KEYS) {
            if (PAIRS)
                store(weights + g / 2 * LANES, pack_rounded(weight[g], weight[g + 1]));
            else
                store(weights + g * LANES, weight[g]);
        }
    }

    // ------------------------------------------------------------ values

    template <int CODEC>
    void mix_of(const TileRows& values, int tile) {
        const int width = job_.values.width;
        if (width % 32)
            mix_from(Values<PAIRS, CODEC, false>{values, width, held(tile)}, tile);
        else
            mix_from(Values<PAIRS, CODEC, true>{values, width, held(tile)}, tile);
    }
    // Several rows share values that are taken once; few take them as they come.
    template <class Source>
    void mix_from(const Source& source, int tile) {
        if (unit_.rows <= MIX_ROWS) return mix_all(source, tile);
        const int count = (held(tile) + KEYS - 1) / KEYS;
        s_.values.resize(TILE * width_);
        int i = 0;
        for (; i + MIX_LANES * LANES <= width_; i += MIX_LANES * LANES) keep_columns<MIX_LANES>(source, i, count);
        for (; i < width_; i += 2 * LANES) keep_columns<2>(source, i, count);
        mix_all(ValuesKept{s_.values.data(), width_}, tile);
    }
    template <int WIDE, class Source>
    void keep_columns(const Source& source, int column, int count) {
        for (int step = 0; step < count; step++) {
            U32 value[WIDE];
            source.take(step, column, value);
            for (int c = 0; c < WIDE; c++) store(s_.values.data() + step * width_ + column + c * LANES, value[c]);
        }
    }
    template <class Source>
    void mix_all(const Source& source, int tile) {
        // Keys that none of a few rows sees have no weight: they are not taken.
        const auto seen = [&](int last_row) {
            return (std::min(held(tile), position(last_row) - tile * TILE + 1) + KEYS - 1) / KEYS;
        };
        int row = first_seeing(tile);
        for (; row + MIX_ROWS <= unit_.rows; row += MIX_ROWS)
            mix_columns<MIX_ROWS>(source, row, seen(row + MIX_ROWS - 1));
        for (; row + 2 <= unit_.rows; row += 2) mix_columns<2>(source, row, seen(row + 1));
        if (row < unit_.rows) mix_columns<1>(source, row, seen(row));
    }
    template <int ROWS, class Source>
    void mix_columns(const Source& source, int row, int count) {
        int column = 0;
        for (; column + MIX_LANES * LANES <= width_; column += MIX_LANES * LANES)
            mix_rows<ROWS, MIX_LANES>(source, row, column, count);
        for (; column < width_; column += 2 * LANES) mix_rows<ROWS, 2>(source, row, column, count);
    }
    template <int ROWS, int WIDE, class Source>
    void mix_rows(const Source& source, int first, int column, int count) {
        F32 acc[ROWS][WIDE];
        float* mixed = state_.mixed.data() + (int64_t)first * width_ + column;
        const uint32_t* weights = (const uint32_t*)state_.weights.data() + first * TILE;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++)
                acc[r][c] = load<F32>(mixed + r * width_ + c * LANES) * splat(state_.shrink[first + r]);
        for (int step = 0; step < count; step++) {
            U32 value[WIDE];
            source.take(step, column, value);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const U32 weight = splat_u32(weights[r * TILE + step]);
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++)
                    acc[r][c] = PAIRS ? dot_pairs(acc[r][c], value[c], weight) : fma((F32)weight, (F32)value[c], acc[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) store(mixed + r * width_ + c * LANES, acc[r][c]);
    }

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

// Phase by phase over the unit's heads: each phase of a head needs the one before, and heads are independent.
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
    for (int tile = workers[0].first_tile(); tile <= workers[0].last_tile(); tile++) {
        for (auto& worker : workers) worker.score(tile);
        for (auto& worker : workers) worker.weigh(tile);
        for (auto& worker : workers) worker.mix(tile);
    }
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
