// Gated delta nets between their projections (model/ops/delta.py is the definition): the causal convolution, unit queries and keys,
// and the recurrence, in which a head's memory is changed and read by one token after the other.
//
// Sixteen columns of a memory are one part of the recurrence: they depend on no other column, and stay in a core's first cache for
// all tokens of a sequence. A sum over the key's numbers has four interleaved partial sums, added in one order. So bits depend
// neither on the tokens and sequences of a call nor on threads. Source: Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "lanes.h"
#include "simd.h"
#include "threads.h"

using namespace simd;

namespace {

constexpr int SUMS = 4, ROWS_PER_PART = 8;
constexpr float LEAST_SQUARE = 1e-6f;  // added to the squared length of queries and keys

int keys_width(const Delta& d) { return d.key_heads * d.key_width; }
int channels(const Delta& d) { return 2 * keys_width(d) + d.heads * d.value_width; }

// Sixteen inputs of a span, `back` tokens before its row `t`.
F32 input(const Delta& d, const DeltaSpan& span, int t, int back, int at, int count) {
    if (back <= t) return get(d.x.data, d.x.kind, (span.row + t - back) * d.x.stride + at, count);
    return get(span.conv + (int64_t)(d.num_taps - 1 + t - back) * channels(d) + at, FLOAT32, 0, count);
}

// silu of the convolution of one row, rounded to the kind of x.
void convolve(const Delta& d, const DeltaSpan& span, int t, float* out) {
    for (int at = 0; at < channels(d); at += LANES) {
        const int count = channels(d) - at;
        F32 total{};
        for (int tap = 0; tap < d.num_taps; tap++) {
            const F32 weight = get(d.taps + (int64_t)tap * channels(d) + at, FLOAT32, 0, count);
            total = total + input(d, span, t, d.num_taps - 1 - tap, at, count) * weight;
        }
        F32 v = activate(total, SILU, false);
        if (d.x.kind == BFLOAT16) v = widen(rounded(v));
        put(out + at, FLOAT32, 0, count, v);
    }
}

float dot(const float* a, const float* b, int width) {
    F32 total{};
    for (int i = 0; i < width; i += LANES) total = fma(get(a + i, FLOAT32, 0, width - i), get(b + i, FLOAT32, 0, width - i), total);
    return sum(total);
}

void make_unit(float* x, int width, float scale) {
    const F32 factor = splat(scale / __builtin_sqrtf(dot(x, x, width) + LEAST_SQUARE));
    for (int i = 0; i < width; i += LANES) put(x + i, FLOAT32, 0, width - i, get(x + i, FLOAT32, 0, width - i) * factor);
}

// Prepare one row: mixed [channels], and overlap, decay and step of each value head.
void prepare(const Delta& d, const DeltaSpan& span, int t) {
    const int64_t row = span.row + t;
    float *mixed = d.mixed + row * channels(d), *numbers = d.numbers + row * 3 * d.heads;
    const float* rates = d.rates + row * 2 * d.heads;
    convolve(d, span, t, mixed);
    const float scale = 1.0f / __builtin_sqrtf((float)d.key_width);
    for (int h = 0; h < d.key_heads; h++) {
        make_unit(mixed + h * d.key_width, d.key_width, scale);
        make_unit(mixed + keys_width(d) + h * d.key_width, d.key_width, 1.0f);
    }
    for (int h = 0; h < d.heads; h++) {
        const float* query = mixed + h / (d.heads / d.key_heads) * d.key_width;
        const double rate = (double)rates[d.heads + h] + d.step_bias[h];
        const double softplus = std::max(rate, 0.0) + std::log1p(std::exp(-std::fabs(rate)));
        numbers[3 * h] = dot(query, query + keys_width(d), d.key_width);
        numbers[3 * h + 1] = (float)std::exp((double)d.decay[h] * softplus);
        numbers[3 * h + 2] = (float)(1.0 / (1.0 + std::exp(-(double)rates[h])));
    }
}

// Keep the last inputs before row `rows` of a span.
void keep_inputs(const Delta& d, const DeltaSpan& span, const DeltaMark& mark) {
    for (int i = 0; i < d.num_taps - 1; i++)
        for (int at = 0; at < channels(d); at += LANES)
            put(mark.conv + (int64_t)i * channels(d) + at, FLOAT32, 0, channels(d) - at,
                input(d, span, mark.rows, d.num_taps - 1 - i, at, channels(d) - at));
}

// Copy columns [at, at + count) of a head's memory [key width, value width] to or from a part's own [key width, 16].
void take_columns(const float* memory, const Delta& d, int at, int count, F32* own) {
    for (int k = 0; k < d.key_width; k++) own[k] = get(memory + (int64_t)k * d.value_width + at, FLOAT32, 0, count);
}
void give_columns(const F32* own, const Delta& d, int at, int count, float* memory) {
    for (int k = 0; k < d.key_width; k++) put(memory + (int64_t)k * d.value_width + at, FLOAT32, 0, count, own[k]);
}

// One token: forget, correct, read. numbers: overlap, decay, step. Returns what is read.
F32 pass(const float* key, const float* query, F32 value, const float* numbers, int width, F32* own) {
    F32 known[SUMS] = {}, seen[SUMS] = {};
    const F32 kept = splat(numbers[1]);
    int k = 0;
    for (; k + SUMS <= width; k += SUMS)
        for (int i = 0; i < SUMS; i++) {
            own[k + i] = own[k + i] * kept;
            known[i] = fma(own[k + i], splat(key[k + i]), known[i]);
            seen[i] = fma(own[k + i], splat(query[k + i]), seen[i]);
        }
    for (int i = 0; k < width; k++, i++) {
        own[k] = own[k] * kept;
        known[i] = fma(own[k], splat(key[k]), known[i]);
        seen[i] = fma(own[k], splat(query[k]), seen[i]);
    }
    const F32 wrong = (value - ((known[0] + known[1]) + (known[2] + known[3]))) * splat(numbers[2]);
    for (k = 0; k < width; k++) own[k] = fma(wrong, splat(key[k]), own[k]);
    return fma(wrong, splat(numbers[0]), (seen[0] + seen[1]) + (seen[2] + seen[3]));
}

void recur(const Delta& d, const DeltaSpan& span, int head, int at) {
    const int64_t of_head = (int64_t)head * d.key_width * d.value_width;
    const int count = std::min(LANES, d.value_width - at);
    std::vector<F32> own(d.key_width);
    take_columns(span.memory + of_head, d, at, count, own.data());
    const DeltaMark* mark = d.marks + span.first_mark;
    const DeltaMark* const end = mark + span.num_marks;
    for (int t = 0; t < span.count; t++) {
        const int64_t row = span.row + t;
        const float* mixed = d.mixed + row * channels(d);
        const float* query = mixed + head / (d.heads / d.key_heads) * d.key_width;
        const F32 value = get(mixed + 2 * keys_width(d) + head * d.value_width + at, FLOAT32, 0, count);
        const float* numbers = d.numbers + (row * d.heads + head) * 3;
        const F32 read = pass(query + keys_width(d), query, value, numbers, d.key_width, own.data());
        put(d.out.data, d.out.kind, row * d.out.stride + (int64_t)head * d.value_width + at, count, read);
        for (; mark < end && mark->rows == t + 1; mark++) give_columns(own.data(), d, at, count, mark->memory + of_head);
    }
}

}  // namespace

extern "C" {

void twostroke_delta(Threads* threads, const Delta* job) {
    std::vector<std::pair<int, int>> pieces;  // span and first row of each part of the rows
    for (int i = 0; i < job->num_spans; i++)
        for (int t = 0; t < job->spans[i].count; t += ROWS_PER_PART) pieces.emplace_back(i, t);
    threads->share((int)pieces.size(), [&](int i) {
        const DeltaSpan& span = job->spans[pieces[i].first];
        const int first = pieces[i].second, end = std::min(span.count, first + ROWS_PER_PART);
        for (int t = first; t < end; t++) prepare(*job, span, t);
    });
    const int columns = (job->value_width + LANES - 1) / LANES, parts = job->heads * columns;
    threads->share(job->num_spans * parts, [&](int i) {
        const int part = i % parts;
        const DeltaSpan& span = job->spans[i / parts];
        recur(*job, span, part / columns, part % columns * LANES);
        if (!part)
            for (int m = 0; m < span.num_marks; m++) keep_inputs(*job, span, job->marks[span.first_mark + m]);
    });
}

}  // extern "C"
