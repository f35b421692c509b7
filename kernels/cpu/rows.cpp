// Ops on single rows between linear layers: norms, rotation, extremes, and storing keys and values.
//
// A row is computed alone, in float32, with lane sums in one fixed order, and rounded once.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "cache/cache.h"
#include "cache/encode.h"
#include "extremes.h"
#include "lanes.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

namespace {

constexpr int ROWS_PER_PART = 16;

void share_rows(Threads& threads, int rows, const std::function<void(int)>& each) {
    threads.share((rows + ROWS_PER_PART - 1) / ROWS_PER_PART, [&](int part) {
        const int end = std::min(rows, (part + 1) * ROWS_PER_PART);
        for (int r = part * ROWS_PER_PART; r < end; r++) each(r);
    });
}

// Normalise one vector; x, delta and out have one kind.
template <int KIND>
void norm(void* x, int64_t at, const void* delta, int64_t from, const float* weight, float eps, int width, void* out,
          int64_t to) {
    F32 total{};
    for (int i = 0; i < width; i += LANES) {
        F32 v = get(x, KIND, at + i, width - i);
        if (delta) {
            v = v + get(delta, KIND, from + i, width - i);
            if (KIND == BFLOAT16) v = widen(rounded(v));
            put(x, KIND, at + i, width - i, v);
        }
        total = fma(v, v, total);
    }
    const F32 scale = splat(1.0f / __builtin_sqrtf(sum(total) / (float)width + eps));
    for (int i = 0; i < width; i += LANES)
        put(out, KIND, to + i, width - i, get(x, KIND, at + i, width - i) * scale * get(weight, FLOAT32, i, width - i));
}

// Rotate the pairs (i, i + half) of one vector. WHOLE: half is a multiple of 16.
template <int KIND, bool WHOLE>
void rotate(void* x, int64_t at, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += LANES) {
        const int count = WHOLE ? LANES : half - i;
        const F32 cosine = get(cos, FLOAT32, i, count), sine = get(sin, FLOAT32, i, count);
        const F32 a = get(x, KIND, at + i, count), b = get(x, KIND, at + half + i, count);
        put(x, KIND, at + i, count, a * cosine - b * sine);
        put(x, KIND, at + half + i, count, b * cosine + a * sine);
    }
}

constexpr int EXTREMES_COLUMNS = 2048;

}  // namespace

extern "C" {

void twostroke_rms_norm(Threads* threads, const Rows* x, const Rows* delta, const float* weight, float eps,
                        int32_t vectors, int32_t width, const Rows* out) {
    share_rows(*threads, x->rows, [&](int r) {
        for (int n = 0; n < vectors; n++) {
            const int64_t at = r * x->stride + (int64_t)n * width, to = r * out->stride + (int64_t)n * width;
            const int64_t from = delta ? r * delta->stride : 0;
            if (x->kind == BFLOAT16)
                norm<BFLOAT16>(x->data, at, delta ? delta->data : nullptr, from, weight, eps, width, out->data, to);
            else
                norm<FLOAT32>(x->data, at, delta ? delta->data : nullptr, from, weight, eps, width, out->data, to);
        }
    });
}

void twostroke_rotary(Threads* threads, const Rows* x, int32_t heads, int32_t width, const float* cos, const float* sin,
                      int32_t half, int32_t interleaved) {
    const bool whole = half % LANES == 0;
    const auto one = x->kind == BFLOAT16 ? (whole ? rotate<BFLOAT16, true> : rotate<BFLOAT16, false>)
                                         : (whole ? rotate<FLOAT32, true> : rotate<FLOAT32, false>);
    share_rows(*threads, x->rows, [&](int r) {
        const float *c = cos + (int64_t)r * half, *s = sin + (int64_t)r * half;
        for (int h = 0; h < heads; h++) {
            const int64_t at = r * x->stride + (int64_t)h * width;
            if (interleaved) {
                for (int i = 0; i < half; i++) {
                    const int64_t p = at + 2 * i;
                    const float a = x->kind == BFLOAT16 ? to_float(((uint16_t*)x->data)[p]) : ((float*)x->data)[p];
                    const float b =
                        x->kind == BFLOAT16 ? to_float(((uint16_t*)x->data)[p + 1]) : ((float*)x->data)[p + 1];
                    F32 pair{};
                    pair[0] = a * c[i] - b * s[i];
                    pair[1] = b * c[i] + a * s[i];
                    put(x->data, x->kind, p, 2, pair);
                }
                continue;
            }
            one(x->data, at, c, s, half);
        }
    });
}

// Threads share columns, as in the product that wrote them: each finds its own columns in its cache.
void twostroke_extremes(Threads* threads, const Rows* x, int32_t width, float* least, float* greatest, int32_t* best) {
    extremes::Search search(*x, width);
    search.begin(EXTREMES_COLUMNS);
    threads->share(search.pieces(), [&](int piece) { search.look(piece); });
    search.settle(least, greatest, best);
}

}  // extern "C"

extern "C" {

void twostroke_write(Threads* threads, const StorePart* parts, int32_t num_parts, const int64_t* slots, int32_t rows,
                     int32_t* non_finite) {
    const auto store = [&](int r, const StorePart& part) {
        const int64_t block = slots[r] / part.block_tokens, offset = slots[r] % part.block_tokens;
        const int row_bytes = part.width * cache::number_bytes(part.codec);
        int bad = 0;
        for (int h = 0; h < part.heads; h++) {
            const int64_t place = (block * part.heads + h) * part.block_tokens + offset;
            const encode::Row row{part.x, r * part.x.stride + (int64_t)h * part.width, part.width};
            uint8_t* payload = part.payload + place * row_bytes;
            if (!cache::is_bytes(part.codec)) {
                bad += !encode::plain(row, payload, part.codec);
                continue;
            }
            float factors[cache::MOST_CHANNELS];
            const bool divides = part.codec == CHANNEL && offset % cache::ANCHOR_TOKENS;
            if (divides) cache::channel_factors(payload - offset % cache::ANCHOR_TOKENS * row_bytes, part.width, factors);
            bad += !encode::bytes(row, part.codec, divides ? factors : nullptr, payload, part.scales + place);
        }
        return bad;
    };
    const auto is_anchor = [&](int r, const StorePart& part) {
        return part.codec == CHANNEL && slots[r] % part.block_tokens % cache::ANCHOR_TOKENS == 0;
    };
    // Anchors first: other rows of the step need them.
    if (std::any_of(parts, parts + num_parts, [](const StorePart& part) { return part.codec == CHANNEL; }))
        share_rows(*threads, rows, [&](int r) {
            for (int p = 0; p < num_parts; p++)
                if (slots[r] >= 0 && is_anchor(r, parts[p])) store(r, parts[p]);
        });
    share_rows(*threads, rows, [&](int r) {
        non_finite[r] = 0;
        for (int p = 0; p < num_parts && slots[r] >= 0; p++) non_finite[r] += store(r, parts[p]);
    });
}

}  // extern "C"
