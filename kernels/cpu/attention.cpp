// Paged attention of a step's rows (prompt chunks and decodes) to the cache.
//
// A row at position p sees keys in tiles of 64 absolute positions, in order, from the tile in which its window begins:
//     s_j = log2(e) * scale * sum over parts of (q . k_j) * 2**e_j      softcap, mask      m' = max(m, max_j s_j)
//     l = l * 2**(m - m') + sum_j 2**(s_j - m')     o = o * 2**(m - m') + sum_j 2**(s_j - m') * 2**e_j * v_j, j rising
// A tile that a row cannot see does not change it. So a row's bits depend on its own prefix alone: not on how the prompt was
// cut into chunks, on other rows of the step, or on the thread. For bfloat16 rows, products are taken by pairs as in linear.cpp:
// pairs of neighbours within a key; for values, pairs of neighbouring keys, with weights rounded to bfloat16 (l is summed
// before rounding). Keys and values at positions beyond the sequence do not affect a result.
// A sink of a head is added last, as a score without a value.
// Source: online softmax, Milakov and Gimelshein 2018; tiles and rounded weights as in FlashAttention, Dao et al. 2022.
#include <algorithm>
#include <vector>

#include "api.h"
#include "cache/cache.h"
#include "simd.h"
#include "softmax.h"
#include "threads.h"

using namespace simd;
using namespace cache;

namespace {

constexpr int UNIT_ROWS = softmax::MOST_ROWS;  // query rows (token, head) that share the unpacked keys and values of a tile
#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 6, MIX_ROWS = 6, MIX_LANES = 4, DIRECT_ROWS = 4;
#elif defined(TWOSTROKE_AVX2)
constexpr int SCORE_ROWS = 6, MIX_ROWS = 6, MIX_LANES = 1, DIRECT_ROWS = 2;
#else
constexpr int SCORE_ROWS = 2, MIX_ROWS = 2, MIX_LANES = 2, DIRECT_ROWS = 2;
#endif

int padded(int width) { return (width + 31) / 32 * 32; }

struct Unit {
    int span, head, heads, first, rows;  // KV heads, and rows [first, first + rows) of the span's (token, head of the group)
};

// State of one KV head of a unit, kept from tile to tile and between the phases of a tile.
template <bool PAIRS>
struct State {
    std::vector<U32> queries;  // [rows][parts' steps]
    std::vector<F32> mixed;    // [rows][width]
    softmax::Softmax<PAIRS> softmax;
};
// Scratch of one thread.
template <bool PAIRS>
struct Scratch {
    std::vector<U32> keys;    // per part [group][steps][16]
    std::vector<U32> values;  // [TILE's steps][width]
    std::vector<State<PAIRS>> states;
};

template <bool PAIRS>
class Worker {
   public:
    Worker(const Attend& job, const Unit& unit, int head, Scratch<PAIRS>& scratch, State<PAIRS>& state)
        : job_(job),
          span_(job.spans[unit.span]),
          unit_(unit),
          head_(head),
          s_(scratch),
          state_(state),
          softmax_(state.softmax),
          group_(job.heads / job.values.heads),
          width_(padded(job.values.width)),
          query_steps_(steps(0) + (job.num_parts > 1 ? steps(1) : 0)) {}

    void begin() {
        int position = span_.start + unit_.first / group_, head = unit_.first % group_;
        for (int r = 0; r < unit_.rows; r++) {
            softmax_.position[r] = position;
            if (++head == group_) head = 0, position++;
        }
        softmax_.begin(unit_.rows);
        take_queries();
        state_.mixed.assign((int64_t)unit_.rows * width_ / LANES, F32{});
    }
    int first_tile() const { return job_.window ? std::max(0, position(0) - job_.window + 1) / TILE : 0; }
    int last_tile() const { return position(unit_.rows - 1) / TILE; }

    // Compute the scores of a tile.
    void score(int tile) {
        F32 scales[2][GROUPS];
        int64_t words = 0;
        for (int p = 0; p < job_.num_parts; p++) words += (int64_t)steps(p) * TILE;
        s_.keys.resize(words / LANES);
        uint32_t* to = keys();
        for (int p = 0; p < job_.num_parts; to += (int64_t)steps(p) * TILE, p++) {
            const Plane& plane = job_.keys[p];
            const TileRows rows = rows_of(plane, tile);
            for (int g = 0; g < GROUPS; g++)
                scales[p][g] = rows.scales(g, is_divided(plane)) * splat(job_.scale * (job_.softcap ? 1.0f : LOG2_E));
            if constexpr (DECODES_64 && PAIRS)
                if (job_.num_parts == 1 && by_64(plane) && unit_.rows <= DIRECT_ROWS && plane.width <= 128)
                    return with_codec(plane.codec, [&](auto codec) {
                        if (plane.width == 64) return score_few<64, decltype(codec)::value>(tile, rows, scales[0]);
                        score_few<128, decltype(codec)::value>(tile, rows, scales[0]);
                    });
#if defined(TWOSTROKE_AVX2)
            if constexpr (PAIRS)
                if (job_.num_parts == 1 && has_numbers(plane) && unit_.rows <= DIRECT_ROWS && plane.width % 32 == 0 &&
                    plane.width <= MOST_DIRECT_WIDTH)
                    return with_codec(plane.codec, [&](auto codec) {
                        score_by_bytes<decltype(codec)::value>(rows, scales[0], Ahead(rows_of(job_.values, tile), rows));
                    });
#endif
            for (int g = 0; g < GROUPS && rows.rows[g]; g++)
                take_group(plane, rows.rows[g], steps(p), to + (int64_t)g * steps(p) * LANES);
        }
        int row = first_seeing(tile);
        for (; row + SCORE_ROWS <= unit_.rows; row += SCORE_ROWS) {
            const int last = (position(row + SCORE_ROWS - 1) - tile * TILE) / LANES;  // group that the last row sees
#if defined(TWOSTROKE_AVX2)
            for (int g = 0; g <= std::min(last, GROUPS - 1); g++) score_rows<SCORE_ROWS, 1>(row, scales, g);
            continue;
#endif
            switch (last) {
                case 0: score_rows<SCORE_ROWS, 1>(row, scales); break;
                case 1: score_rows<SCORE_ROWS, 2>(row, scales); break;
                case 2: score_rows<SCORE_ROWS, 3>(row, scales); break;
                default: score_rows<SCORE_ROWS, GROUPS>(row, scales);
            }
        }
        for (; row + 2 <= unit_.rows; row += 2) score_rows<2, GROUPS>(row, scales);
        if (row < unit_.rows) score_rows<1, GROUPS>(row, scales);
    }

    // Turn the scores of a tile into weights.
    void weigh(int tile) {
        const TileRows values = rows_of(job_.values, tile);
        softmax::Tile kind{tile * TILE, job_.window, job_.softcap, {}};
        for (int g = 0; g < GROUPS; g++)  // scales beyond the sequence are arbitrary, so 0 * scale may be NaN
            kind.scales[g] =
                select((I32)(COUNT + g * LANES < held(tile)), values.scales(g, is_divided(job_.values)), splat(1.0f));
        softmax_.weigh(first_seeing(tile), unit_.rows, kind);
    }

    // Add the weighted values of a tile.
    void mix(int tile) {
        const TileRows values = rows_of(job_.values, tile);
        if constexpr (DECODES_64 && PAIRS)
            if (by_64(job_.values)) {
                const Ahead ahead(rows_of(job_.keys[0], tile + 1), values);
                return with_codec(job_.values.codec, [&](auto codec) {
                    mix_from(ValuesBy64<decltype(codec)::value>{values, ahead}, tile);
                });
            }
#if defined(TWOSTROKE_AVX2)
        const Ahead keys(rows_of(job_.keys[0], tile + 1), values);
        if constexpr (PAIRS)
            if (has_numbers(job_.values) && unit_.rows <= DIRECT_ROWS && width_ == job_.values.width)
                return with_codec(job_.values.codec, [&](auto codec) {
                    if (unit_.rows - first_seeing(tile) == 1) return mix_bytes<1, decltype(codec)::value>(values, tile, keys);
                    mix_bytes<2, decltype(codec)::value>(values, tile, keys);
                });
        if (unit_.rows <= MIX_ROWS) {
            const int bytes = LANES * job_.keys[0].width * number_bytes(job_.keys[0].codec);
            for (int g = 0; g < GROUPS; g++)
                for (int at = 0; at < bytes; at += 64) keys.ask(g, at);
        }
#endif
        switch (job_.values.codec) {
            case FP8: return mix_of<FP8>(values, tile);
            case E5M2: return mix_of<E5M2>(values, tile);
            case INT8: return mix_of<INT8>(values, tile);
            case BFLOAT16: return mix_of<BFLOAT16>(values, tile);
            default: mix_of<FLOAT32>(values, tile);
        }
    }

    void give() {
        const int width = job_.values.width;
        for (int r = 0; r < unit_.rows; r++) {
            const int64_t to = row_of(r) * job_.out.stride + (int64_t)head_of(r) * width;
            const float* from = mixed() + (int64_t)r * width_;
            const F32 share = splat(share_of(r));
            for (int i = 0; i < width && by_64(job_.values); i += 4 * LANES) {
                F32 v[4] = {load<F32>(from + i), load<F32>(from + i + LANES), load<F32>(from + i + 2 * LANES),
                            load<F32>(from + i + 3 * LANES)};
                restore_columns(v);
                for (int c = 0; c < 4; c++) put(to + i + c * LANES, LANES, v[c] * share);
            }
            for (int i = 0; i < width && !by_64(job_.values); i += LANES)
                put(to + i, std::min(LANES, width - i), load<F32>(from + i) * share);
        }
    }

   private:
    inline static const I32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static constexpr int KEYS = PAIRS ? 2 : 1;  // keys per step of the product with values

    uint32_t* queries() const { return (uint32_t*)state_.queries.data(); }
    float* mixed() const { return (float*)state_.mixed.data(); }
    uint32_t* keys() const { return (uint32_t*)s_.keys.data(); }
    uint32_t* values() const { return (uint32_t*)s_.values.data(); }
    int position(int row) const { return softmax_.position[row]; }
    int row_of(int row) const { return span_.row + position(row) - span_.start; }  // of the batch
    int head_of(int row) const { return head_ * group_ + unit_.first + row - (position(row) - span_.start) * group_; }
    int held(int tile) const { return std::min(TILE, span_.start + span_.count - tile * TILE); }
    // The first row that sees a key of this tile. Earlier rows are left unchanged.
    int first_seeing(int tile) const { return std::max(0, (tile * TILE - span_.start) * group_ - unit_.first); }
    int steps(int part) const { return PAIRS ? padded(job_.keys[part].width) / 2 : padded(job_.keys[part].width); }
    TileRows rows_of(const Plane& plane, int tile) const { return {plane, span_, head_, tile, held(tile)}; }
    // True if numbers of this plane are divided by 256 in decoding.
    static bool is_divided(const Plane& plane) { return plane.codec == FP8 && !by_64(plane); }
    // True if rows of this plane are decoded 64 numbers at a time.
    static bool by_64(const Plane& plane) { return DECODES_64 && PAIRS && has_numbers(plane) && plane.width % 64 == 0; }
    // True if a byte of this plane is a number by itself.
    static bool has_numbers(const Plane& plane) { return is_bytes(plane.codec) && plane.codec != CHANNEL; }

    // Factor of a row's mixed values: 1 / l, or with a sink s, as if it were one more key without a value,
    // 2**(m - m') / (l * 2**(m - m') + 2**(s - m')), m' = max(m, s).
    float share_of(int row) const {
        if (!job_.sinks) return 1.0f / softmax_.total[row];
        const float sink = job_.sinks[head_of(row)] * LOG2_E, top = softmax_.top[row], greatest = std::max(top, sink);
        const float shrunk = power_of_two(splat(top - greatest))[0];
        return shrunk / (softmax_.total[row] * shrunk + power_of_two(splat(sink - greatest))[0]);
    }

    // Copy the unit's queries, 32 bits per step: [rows][steps of all parts].
    void take_queries() {
        state_.queries.resize((int64_t)unit_.rows * query_steps_ / LANES);
        char* to = (char*)queries();
        for (int r = 0; r < unit_.rows; r++)
            for (int p = 0; p < job_.num_parts; to += steps(p) * 4, p++) {
                const Rows& q = job_.queries[p];
                const int size = PAIRS ? 2 : 4, bytes = job_.keys[p].width * size;
                const char* from = (const char*)q.data + (row_of(r) * q.stride * size + (int64_t)head_of(r) * bytes);
                int at = 0;
                for (; at + 64 <= bytes; at += 64) store(to + at, load<U32>(from + at));
                if (at == steps(p) * 4) continue;
                std::memset(to + at, 0, steps(p) * 4 - at);
                std::memcpy(to + at, from + at, bytes - at);
            }
    }

    // ------------------------------------------------------------ scores

    void take_group(const Plane& plane, const uint8_t* rows, int n, uint32_t* to) {
        if constexpr (DECODES_64 && PAIRS)
            if (by_64(plane))
                return with_codec(plane.codec, [&](auto codec) { take_keys_by_64<decltype(codec)::value>(rows, plane.width, to); });
        const bool whole = plane.width % 32 == 0;
        switch (plane.codec) {
            case FP8: return take_keys_of<FP8>(whole, rows, plane.width, n, to);
            case E5M2: return take_keys_of<E5M2>(whole, rows, plane.width, n, to);
            case INT8: return take_keys_of<INT8>(whole, rows, plane.width, n, to);
            case CHANNEL: {
                float factors[MOST_CHANNELS];
                channel_factors(rows, plane.width, factors);
                return take_keys_of<CHANNEL>(whole, rows, plane.width, n, to, factors);
            }
            case BFLOAT16: return take_keys_of<BFLOAT16>(whole, rows, plane.width, n, to);
            default: take_keys_of<FLOAT32>(whole, rows, plane.width, n, to);
        }
    }
    template <int CODEC>
    static void take_keys_of(bool whole, const uint8_t* rows, int width, int n, uint32_t* to, const float* factors = nullptr) {
        (whole ? take_keys<PAIRS, CODEC, true> : take_keys<PAIRS, CODEC, false>)(rows, width, n, to, factors);
    }
    template <int CODEC>
    static void take_keys_by_64(const uint8_t* rows, int width, uint32_t* to) {
        for (int at = 0; at < width; at += 16) {
            U32 codes[4];
            load_side_by_side(rows + at, width, codes);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, to += 2 * LANES) {
                U32 first, last;
                decode_64<CODEC>(codes[i], first, last);
                store(to, first), store(to + LANES, last);
            }
        }
    }

    // `score_rows` for units of few rows: keys are decoded directly into registers. The width is a template parameter, because
    // the addresses of sixteen rows do not fit the registers.
    template <int WIDTH, int CODEC>
    void score_few(int tile, const TileRows& rows, const F32 (&scales)[GROUPS]) {
        const Ahead values(rows_of(job_.values, tile), rows);
        unit_.rows <= 2 ? score_directly<WIDTH, CODEC, 2>(rows, scales, values)
                        : score_directly<WIDTH, CODEC, DIRECT_ROWS>(rows, scales, values);
    }
    template <int WIDTH, int CODEC, int ROWS>
    void score_directly(const TileRows& rows, const F32 (&scales)[GROUPS], const Ahead& ahead) {
        F32 acc[ROWS][GROUPS];
        const uint32_t* q[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            q[r] = queries() + std::min(r, unit_.rows - 1) * query_steps_;
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
                    decode_64<CODEC>(codes[i], first, last);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        acc[r][g] = dot_pairs(acc[r][g], first, splat_u32(q[r][2 * i]));
                        acc[r][g] = dot_pairs(acc[r][g], last, splat_u32(q[r][2 * i + 1]));
                    }
                }
            }
            for (int r = 0; r < ROWS; r++) q[r] += 8;
        }
        for (int r = 0; r < std::min(ROWS, unit_.rows); r++)
            for (int g = 0; g < GROUPS; g++) store(softmax_.scores + r * TILE + g * LANES, acc[r][g] * scales[g]);
    }

#if defined(TWOSTROKE_AVX2)
    // The same for machines whose registers hold two rows and two groups. Sixteen keys are transposed as bytes.
    static constexpr int MOST_DIRECT_WIDTH = 256;
    template <int CODEC>
    void score_by_bytes(const TileRows& rows, const F32 (&scales)[GROUPS], const Ahead& values) {
        float q[DIRECT_ROWS][MOST_DIRECT_WIDTH];
        for (int r = 0; r < DIRECT_ROWS; r++) {
            const uint16_t* from = (const uint16_t*)(queries() + std::min(r, unit_.rows - 1) * query_steps_);
            for (int i = 0; i < job_.keys[0].width; i += LANES) store(q[r] + i, load_bf16(from + i));
        }
        for (int g = 0; g < GROUPS && rows.rows[g]; g += 2)
            unit_.rows == 1 ? score_two_groups<CODEC, 1>(q, g, rows, scales, values)
                            : score_two_groups<CODEC, 2>(q, g, rows, scales, values);
    }
    // Groups `group` and `group + 1` together: four sums would wait for each other. A missing group repeats the first.
    template <int CODEC, int ROWS>
    void score_two_groups(const float (&q)[DIRECT_ROWS][MOST_DIRECT_WIDTH], int group, const TileRows& rows,
                          const F32 (&scales)[GROUPS], const Ahead& values) {
        const int width = job_.keys[0].width, last = rows.rows[group + 1] ? group + 1 : group;
        F32 acc[2][ROWS] = {};
        for (int at = 0; at < width; at += LANES) {
            __m256i codes[2][8];
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++) {
#pragma GCC unroll 4
                for (int line = 0; line < 4; line++) values.ask(group + g, LANES * at + 64 * line);
                load_byte_columns(rows.rows[g ? last : group] + at, width, codes[g]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
#pragma GCC unroll 2
                for (int g = 0; g < 2; g++) {
                    const F32 even = decode_byte_column<CODEC, false>(codes[g][i]);
                    const F32 odd = decode_byte_column<CODEC, true>(codes[g][i]);
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; r++) {
                        const __m256 x = _mm256_broadcast_ss(q[r] + at + 2 * i), y = _mm256_broadcast_ss(q[r] + at + 2 * i + 1);
                        acc[g][r] = fma(odd, {y, y}, fma(even, {x, x}, acc[g][r]));
                    }
                }
            }
        }
        for (int g = group; g <= last; g++)
            for (int r = 0; r < ROWS; r++) store(softmax_.scores + r * TILE + g * LANES, acc[g - group][r] * scales[g]);
    }
#endif

    // Scores of ROWS rows with SEEN groups of keys from group `from` on. Scores of later groups are undefined.
    template <int ROWS, int SEEN>
    void score_rows(int first, const F32 (&scales)[2][GROUPS], int from = 0) {
        F32 score[ROWS][SEEN];
        static_assert(ROWS <= 6, "three rows to an address, as in linear.cpp, and two addresses");
        const int64_t places[3] = {0, query_steps_, 2 * query_steps_};
        const uint32_t *q0 = queries() + first * query_steps_, *q3 = q0 + 3 * query_steps_, *k = keys();
        for (int p = 0; p < job_.num_parts; p++) {
            const int n = steps(p);
            F32 acc[ROWS][SEEN];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < SEEN; g++) acc[r][g] = F32{};
            for (int i = 0; i < n; i++, q0++, q3++) {
                asm("" : "+r"(q0), "+r"(q3));
                U32 keys[SEEN];
#pragma GCC unroll 4
                for (int g = 0; g < SEEN; g++) keys[g] = load<U32>(k + ((int64_t)(from + g) * n + i) * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const U32 x = splat_u32((r < 3 ? q0 : q3)[places[r % 3]]);
#pragma GCC unroll 4
                    for (int g = 0; g < SEEN; g++)
                        acc[r][g] = PAIRS ? dot_pairs(acc[r][g], keys[g], x) : fma((F32)keys[g], (F32)x, acc[r][g]);
                }
            }
            k += (int64_t)n * TILE;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < SEEN; g++)
                    score[r][g] = p ? fma(acc[r][g], scales[p][from + g], score[r][g]) : acc[r][g] * scales[p][from + g];
        }
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < SEEN; g++) store(softmax_.scores + (first + r) * TILE + (from + g) * LANES, score[r][g]);
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
#if defined(TWOSTROKE_AVX2)
    // `mix_all` for the last ROWS rows of a unit of few rows, with values of one byte: 32 columns at a time, weights as float32. The
    // next tile's keys are prefetched meanwhile.
    template <int ROWS, int CODEC>
    void mix_bytes(const TileRows& rows, int tile, const Ahead& keys) {
        const int first = unit_.rows - ROWS, count = std::min(held(tile), position(unit_.rows - 1) - tile * TILE + 1);
        const int ahead_bytes = LANES * job_.keys[0].width * number_bytes(job_.keys[0].codec);
        float weights[ROWS][TILE];
        for (int r = 0; r < ROWS; r++) {
            const uint16_t* from = (const uint16_t*)(softmax_.scores + (first + r) * TILE);
            for (int i = 0; i < TILE; i += LANES) store(weights[r] + i, load_bf16(from + i));
        }
        for (int column = 0; column < width_; column += 32) {
            float* to = mixed() + (int64_t)first * width_ + column;
            F32 acc[ROWS][2];
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int c = 0; c < 2; c++) acc[r][c] = load<F32>(to + r * width_ + c * LANES) * splat(softmax_.shrink[first + r]);
            for (int g = 0; g * LANES < count; g++) {
                const uint8_t* at = rows.rows[g] + column;
                const int end = std::min(LANES, count - g * LANES);
                for (int line = column * ahead_bytes / width_; line < (column + 32) * ahead_bytes / width_; line += 64)
                    keys.ask(g, line);
                for (int j = 0; j < end; j++, at += rows.row_bytes) {
                    F32 value[2];
                    decode_32<CODEC>(at, value);
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; r++) {
                        const __m256 weight = _mm256_broadcast_ss(weights[r] + g * LANES + j);
#pragma GCC unroll 2
                        for (int c = 0; c < 2; c++) acc[r][c] = fma(value[c], {weight, weight}, acc[r][c]);
                    }
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int c = 0; c < 2; c++) store(to + r * width_ + c * LANES, acc[r][c]);
        }
    }
#endif
    // Many rows share values that are decoded once into scratch. Few rows decode them directly.
    template <class Source>
    void mix_from(const Source& source, int tile) {
        if (unit_.rows <= MIX_ROWS) return mix_all(source, tile);
        const int count = (held(tile) + KEYS - 1) / KEYS;
        s_.values.resize(TILE * width_ / LANES);
        int i = 0;
        for (; i + MIX_LANES * LANES <= width_; i += MIX_LANES * LANES) keep_columns<MIX_LANES>(source, i, count);
        for (; i < width_; i += 2 * LANES) keep_columns<2>(source, i, count);
        mix_all(ValuesKept{values(), width_}, tile);
    }
    template <int WIDE, class Source>
    void keep_columns(const Source& source, int column, int count) {
        for (int step = 0; step < count; step++) {
            U32 value[WIDE];
            source.take(step, column, value);
            for (int c = 0; c < WIDE; c++) store(values() + step * width_ + column + c * LANES, value[c]);
        }
    }
    template <class Source>
    void mix_all(const Source& source, int tile) {
        // Keys that no row of this group sees have zero weight and are skipped.
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
        float* to = mixed() + (int64_t)first * width_ + column;
        const uint32_t* weights = (const uint32_t*)softmax_.scores + first * TILE;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++)
                acc[r][c] = load<F32>(to + r * width_ + c * LANES) * splat(softmax_.shrink[first + r]);
        for (int step = 0; step < count; step++) {
#if defined(TWOSTROKE_AVX2)
            if constexpr (PAIRS && Source::READS_SINGLE) {  // without packing two numbers into one lane
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++) {
                    const F32 one = source.one(2 * step, column + c * LANES), other = source.one(2 * step + 1, column + c * LANES);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        const U32 weight = splat_u32(weights[r * TILE + step]);
                        acc[r][c] = fma(one, (F32)(weight << 16), acc[r][c]);
                        acc[r][c] = fma(other, (F32)(weight & 0xFFFF0000u), acc[r][c]);
                    }
                }
                continue;
            }
#endif
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
            for (int c = 0; c < WIDE; c++) store(to + r * width_ + c * LANES, acc[r][c]);
    }

    void put(int64_t at, int count, F32 v) {
        v = v + splat(0.0f);  // turns -0 into 0: the sign would depend on whether an unseen tile was added
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
    Scratch<PAIRS>& s_;
    State<PAIRS>& state_;
    softmax::Softmax<PAIRS>& softmax_;
    const int group_, width_, query_steps_;
};

// Compute a unit phase by phase over its heads. A phase of a head needs the phase before it; heads are independent.
template <bool PAIRS>
void run(const Attend& job, const Unit& unit) {
    static thread_local Scratch<PAIRS> scratch;
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

void twostroke_attend(Threads* threads, const Attend* job) {
    const int kv_heads = job->values.heads, group = job->heads / kv_heads;
    // With few rows, reading dominates: then a unit takes several heads, whose bytes are adjacent in every block.
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
