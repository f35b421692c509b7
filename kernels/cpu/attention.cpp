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
    int span, head, first, rows;  // rows [first, first + rows) of the span's (token, head of the group)
};

// One row of a plane, sixteen numbers from `at` on, without its scale; fp8 comes divided by 256.
template <int CODEC>
F32 numbers(const uint8_t* row, int at, int width) {
    const int count = std::min(LANES, width - at);
    if (count <= 0) return F32{};
    if (CODEC == FP8) {
        U8x16 codes{};
        if (count == LANES)
            codes = load<U8x16>(row + at);
        else
            std::memcpy(&codes, row + at, count);
        return decode_e4m3_by_256(codes);
    }
    if (CODEC == BFLOAT16) {
        U16x16 bits{};
        std::memcpy(&bits, (const uint16_t*)row + at, 2 * count);
        return widen(bits);
    }
    F32 v{};
    std::memcpy(&v, (const float*)row + at, 4 * count);
    return v;
}

struct PlaneRow {
    const uint8_t* payload;
    float scale;
};

PlaneRow find(const Plane& plane, const AttendSpan& span, int head, int position) {
    const int64_t block = span.blocks[position / plane.block_tokens];
    const int64_t place = (block * plane.heads + head) * plane.block_tokens + position % plane.block_tokens;
    const int bytes = plane.codec == FP8 ? 1 : plane.codec == BFLOAT16 ? 2 : 4;
    float scale = 1.0f;
    if (plane.codec == FP8) {
        uint32_t bits = (uint32_t)(plane.scales[place] + 8) << 23;  // times 256; at most 246 + 8
        std::memcpy(&scale, &bits, 4);
    }
    return {plane.payload + place * plane.width * bytes, scale};
}

// Scratch of one thread.
struct Scratch {
    std::vector<uint32_t> queries, keys;          // [parts' steps][rows]; per part [group][steps][16]
    std::vector<float> values, mixed, weights;    // [TILE][width], [rows][width], [rows][TILE]
    alignas(64) float key_scales[2][TILE];
    float top[UNIT_ROWS], total[UNIT_ROWS], shrink[UNIT_ROWS];
};

template <bool PAIRS>
class Worker {
   public:
    Worker(const Attend& job, const Unit& unit, Scratch& scratch)
        : job_(job), span_(job.spans[unit.span]), unit_(unit), s_(scratch), group_(job.heads / job.values.heads) {}

    void run() {
        const int last = position(unit_.rows - 1), earliest = position(0);
        const int from = job_.window ? std::max(0, earliest - job_.window + 1) / TILE : 0;
        const int width = padded(job_.values.width);
        take_queries();
        s_.values.resize(TILE * width);
        s_.mixed.assign((int64_t)unit_.rows * width, 0.0f);
        s_.weights.resize(UNIT_ROWS * TILE);
        std::fill(s_.top, s_.top + unit_.rows, NEVER);
        std::fill(s_.total, s_.total + unit_.rows, 0.0f);
        for (int tile = from; tile <= last / TILE; tile++) {
            const int held = std::min(TILE, span_.start + span_.count - tile * TILE);
            take_keys(tile, held);
            scores(tile);
            take_values(tile, held);
            mix(held);
        }
        give();
    }

   private:
    int position(int row) const { return span_.start + (unit_.first + row) / group_; }
    int steps(int part) const { return PAIRS ? padded(job_.keys[part].width) / 2 : padded(job_.keys[part].width); }

    void take_queries() {
        int total = 0;
        for (int p = 0; p < job_.num_parts; p++) total += steps(p);
        s_.queries.assign((int64_t)total * UNIT_ROWS, 0);
        uint32_t* to = s_.queries.data();
        for (int p = 0; p < job_.num_parts; to += (int64_t)steps(p) * UNIT_ROWS, p++) {
            const Rows& q = job_.queries[p];
            const int width = job_.keys[p].width;
            for (int r = 0; r < unit_.rows; r++) {
                const int at = unit_.first + r, head = unit_.head * group_ + at % group_;
                const int64_t number = (span_.row + at / group_) * q.stride + (int64_t)head * width;
                const char* from = (const char*)q.data + number * (PAIRS ? 2 : 4);
                for (int k = 0; k < width; k += PAIRS ? 2 : 1)
                    std::memcpy(to + (int64_t)(PAIRS ? k / 2 : k) * UNIT_ROWS + r, from + k * (PAIRS ? 2 : 4),
                                PAIRS ? std::min(2, width - k) * 2 : 4);
            }
        }
    }

    template <int CODEC>
    void take_key_part(int part, int tile, int held) {
        const Plane& plane = job_.keys[part];
        uint32_t* to = s_.keys.data() + (part ? (int64_t)steps(0) * TILE : 0);
        for (int g = 0; g < GROUPS; g++) {
            const uint8_t* rows[LANES];
            for (int j = 0; j < LANES; j++) {
                const int in_tile = g * LANES + j;
                rows[j] = nullptr;
                s_.key_scales[part][in_tile] = 0.0f;
                if (in_tile < held) {
                    PlaneRow row = find(plane, span_, unit_.head, tile * TILE + in_tile);
                    rows[j] = row.payload;
                    s_.key_scales[part][in_tile] = row.scale;
                }
            }
            for (int k = 0; k < steps(part); k += LANES) {
                U32 m[16];
                for (int j = 0; j < LANES; j++) {
                    if (!rows[j])
                        m[j] = U32{};
                    else if (PAIRS)
                        m[j] = pack_exact(numbers<CODEC>(rows[j], 2 * k, plane.width),
                                          numbers<CODEC>(rows[j], 2 * k + LANES, plane.width));
                    else
                        m[j] = (U32)numbers<CODEC>(rows[j], k, plane.width);
                }
                transpose(m);
                for (int j = 0; j < LANES; j++) store(to + ((int64_t)g * steps(part) + k + j) * LANES, m[j]);
            }
        }
    }

    void take_keys(int tile, int held) {
        int total = 0;
        for (int p = 0; p < job_.num_parts; p++) total += steps(p);
        s_.keys.resize((int64_t)total * TILE);
        for (int p = 0; p < job_.num_parts; p++) switch (job_.keys[p].codec) {
                case FP8: take_key_part<FP8>(p, tile, held); break;
                case BFLOAT16: take_key_part<BFLOAT16>(p, tile, held); break;
                default: take_key_part<FLOAT32>(p, tile, held);
            }
    }

    template <int ROWS>
    void score_rows(int first, int tile) {
        F32 score[ROWS][GROUPS];
        const uint32_t* q = s_.queries.data() + first;
        const uint32_t* k = s_.keys.data();
        for (int p = 0; p < job_.num_parts; p++) {
            const int n = steps(p);
            F32 acc[ROWS][GROUPS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) acc[r][g] = F32{};
            for (int i = 0; i < n; i++, q += UNIT_ROWS) {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const U32 x = splat_u32(q[r]);
#pragma GCC unroll 4
                    for (int g = 0; g < GROUPS; g++) {
                        const U32 key = load<U32>(k + ((int64_t)g * n + i) * LANES);
                        acc[r][g] = PAIRS ? dot_pairs(acc[r][g], key, x) : fma((F32)key, (F32)x, acc[r][g]);
                    }
                }
            }
            k += (int64_t)n * TILE;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) {
                    const F32 scale = load<F32>(s_.key_scales[p] + g * LANES) * splat(job_.scale);
                    score[r][g] = p ? fma(acc[r][g], scale, score[r][g]) : acc[r][g] * scale;
                }
        }
        for (int r = 0; r < ROWS; r++) weigh(first + r, tile, score[r]);
    }

    // One row's scores of a tile become weights, and its running maximum and total follow.
    void weigh(int row, int tile, F32 (&score)[GROUPS]) {
        static const I32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int last = position(row) - tile * TILE;                               // the last key it sees
        const int first = job_.window ? last - job_.window + 1 : -1;                // and the first
        F32 best = splat(NEVER);
        for (int g = 0; g < GROUPS; g++) {
            if (job_.softcap != 0.0f)
                score[g] = splat(job_.softcap) * hyperbolic_tangent(score[g] / splat(job_.softcap));
            const I32 key = COUNT + g * LANES;
            score[g] = select((key <= last) & (key >= first), score[g], splat(NEVER));
            best = larger(best, score[g]);
        }
        const float top = std::max(s_.top[row], largest(best));
        float* weights = s_.weights.data() + row * TILE;
        if (top == NEVER) {
            s_.shrink[row] = 1.0f;
            std::fill(weights, weights + TILE, 0.0f);
            return;
        }
        s_.shrink[row] = exponential(splat(s_.top[row]) - splat(top))[0];
        F32 totals[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            totals[g] = exponential(score[g] - splat(top));
            store(weights + g * LANES, totals[g]);
        }
        s_.total[row] = s_.total[row] * s_.shrink[row] + sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        s_.top[row] = top;
    }

    void scores(int tile) {
        int row = 0;
        for (; row + SCORE_ROWS <= unit_.rows; row += SCORE_ROWS) score_rows<SCORE_ROWS>(row, tile);
        for (; row + 2 <= unit_.rows; row += 2) score_rows<2>(row, tile);
        if (row < unit_.rows) score_rows<1>(row, tile);
    }

    template <int CODEC>
    void take_values_of(int tile, int held, int width) {
        for (int j = 0; j < held; j++) {
            PlaneRow row = find(job_.values, span_, unit_.head, tile * TILE + j);
            for (int i = 0; i < width; i += LANES)
                store(s_.values.data() + j * width + i,
                      numbers<CODEC>(row.payload, i, job_.values.width) * splat(row.scale));
        }
    }
    void take_values(int tile, int held) {
        const int width = padded(job_.values.width);
        switch (job_.values.codec) {
            case FP8: return take_values_of<FP8>(tile, held, width);
            case BFLOAT16: return take_values_of<BFLOAT16>(tile, held, width);
            default: return take_values_of<FLOAT32>(tile, held, width);
        }
    }

    template <int ROWS, int WIDE>
    void mix_rows(int first, int column, int held, int width) {
        F32 acc[ROWS][WIDE];
        float* mixed = s_.mixed.data() + (int64_t)first * width + column;
        const float *values = s_.values.data() + column, *weights = s_.weights.data() + first * TILE;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++)
                acc[r][c] = load<F32>(mixed + r * width + c * LANES) * splat(s_.shrink[first + r]);
        for (int j = 0; j < held; j++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const F32 weight = splat(weights[r * TILE + j]);
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++)
                    acc[r][c] = fma(weight, load<F32>(values + j * width + c * LANES), acc[r][c]);
            }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) store(mixed + r * width + c * LANES, acc[r][c]);
    }
    template <int ROWS>
    void mix_columns(int row, int held, int width) {
        int column = 0;
        for (; column + MIX_LANES * LANES <= width; column += MIX_LANES * LANES)
            mix_rows<ROWS, MIX_LANES>(row, column, held, width);
        for (; column < width; column += 2 * LANES) mix_rows<ROWS, 2>(row, column, held, width);
    }
    void mix(int held) {
        const int width = padded(job_.values.width);
        int row = 0;
        for (; row + MIX_ROWS <= unit_.rows; row += MIX_ROWS) mix_columns<MIX_ROWS>(row, held, width);
        for (; row + 2 <= unit_.rows; row += 2) mix_columns<2>(row, held, width);
        if (row < unit_.rows) mix_columns<1>(row, held, width);
    }

    void give() {
        const int width = job_.values.width, stride = padded(width);
        for (int r = 0; r < unit_.rows; r++) {
            const int at = unit_.first + r, head = unit_.head * group_ + at % group_;
            const int64_t to = (span_.row + at / group_) * job_.out.stride + (int64_t)head * width;
            for (int i = 0; i < width; i += LANES) {
                // + 0: a negative zero must not tell whether a tile without weight was there.
                F32 v = (load<F32>(s_.mixed.data() + (int64_t)r * stride + i) + splat(0.0f)) / splat(s_.total[r]);
                const int count = std::min(LANES, width - i);
                if (PAIRS) {
                    U16x16 bits = narrow(v);
                    std::memcpy((uint16_t*)job_.out.data + to + i, &bits, 2 * count);
                } else {
                    std::memcpy((float*)job_.out.data + to + i, &v, 4 * count);
                }
            }
        }
    }

    const Attend& job_;
    const AttendSpan& span_;
    const Unit unit_;
    Scratch& s_;
    const int group_;
};

}  // namespace

extern "C" {

// Rows of no span are left as they are.
void twostroke_attend(Threads* threads, const Attend* job) {
    const int group = job->heads / job->values.heads;
    std::vector<Unit> units;
    for (int s = 0; s < job->num_spans; s++)
        for (int first = 0, rows = job->spans[s].count * group; first < rows; first += UNIT_ROWS)
            for (int head = 0; head < job->values.heads; head++)
                units.push_back({s, head, first, std::min(UNIT_ROWS, rows - first)});
    threads->share((int)units.size(), [&](int i) {
        static thread_local Scratch scratch;
        if (job->out.kind == BFLOAT16)
            Worker<true>(*job, units[i], scratch).run();
        else
            Worker<false>(*job, units[i], scratch).run();
    });
}

}  // extern "C"
