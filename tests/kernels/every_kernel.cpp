// Calls every kernel with the same numbers and prints a digest of what it wrote, one line each. Two builds of the kernels with
// fused products print the same lines: tests/kernels/test_arm.py compares 64-bit Arm with this machine.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace {

Threads* threads;

// From -1 to 1 in steps of 2**-23.
float number(uint64_t seed, uint64_t i) {
    uint64_t x = (i + seed * 1000003) * 0x9E3779B97F4A7C15ull;
    x ^= x >> 29, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 32;
    return (float)(int64_t)((x >> 40) & 0xFFFFFF) / 8388608.0f - 1.0f;
}

int bytes(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 || kind == FP8 ? 1 : 2; }

// Aligned memory, filled with numbers of a kind or with zeros.
struct Memory {
    explicit Memory(int64_t size) : size(size), data((char*)std::aligned_alloc(64, (size + 127) / 64 * 64)) {
        std::memset(data, 0, size);
    }
    Memory(int64_t count, int kind, int seed, float scale = 1.0f) : Memory(count * bytes(kind)) {
        for (int64_t i = 0; i < count; i++) {
            const float x = number(seed, i) * scale;
            uint32_t bits;
            std::memcpy(&bits, &x, 4);
            if (kind == FLOAT32) ((float*)data)[i] = x;
            if (kind == BFLOAT16 || kind == CODED) ((uint16_t*)data)[i] = (uint16_t)(bits >> 16);
            if (kind == INT8) ((int8_t*)data)[i] = (int8_t)(x * 127.0f);
        }
    }
    Memory(const Memory&) = delete;
    ~Memory() { std::free(data); }
    int64_t size;
    char* data;
};

void tell(const std::string& name, const Memory& memory) {
    uint64_t digest = 0xCBF29CE484222325ull;
    for (int64_t i = 0; i < memory.size; i++) digest = (digest ^ (uint8_t)memory.data[i]) * 0x100000001B3ull;
    std::printf("%s %016llx\n", name.c_str(), (unsigned long long)digest);
}

// A matrix of a kind for rows of a kind, packed.
struct Packed {
    Packed(int kind, int x_kind, int columns, int inner, int seed)
        : from((int64_t)columns * inner, kind, seed), scales(columns + 16, FLOAT32, seed + 1), bias(columns + 16, FLOAT32, seed + 2) {
        const int pairs = x_kind == BFLOAT16;
        const int64_t panel = kind == CODED ? twostroke_coded_panel_bytes(threads, (uint16_t*)from.data, columns, inner)
                                            : twostroke_panel_bytes(kind, inner, pairs);
        panels.reset(new Memory((columns + 15) / 16 * panel + 64));
        if (panel) twostroke_pack(threads, from.data, kind, columns, inner, pairs, panel, panels->data);
        matrix = Matrix{panels->data, kind == INT8 ? (float*)scales.data : nullptr, (float*)bias.data, panel, kind, columns, inner, 0};
    }
    Memory from, scales, bias;
    std::unique_ptr<Memory> panels;
    Matrix matrix;
};

void products() {
    for (int kind : {FLOAT32, BFLOAT16, INT8})
        for (int x_kind : {FLOAT32, BFLOAT16})
            for (int rows : {1, 3, 7, 17, 50}) {
                if (kind != INT8 && kind != x_kind) continue;
                const int columns = 90, inner = 264;
                const Packed packed(kind, x_kind, columns, inner, 3);
                const Memory x((int64_t)rows * inner, x_kind, 11);
                Memory out((int64_t)rows * columns * bytes(x_kind)), scratch(8l * (rows + 64) * (inner + 16));
                const Rows in{x.data, inner, rows, x_kind}, to{out.data, columns, rows, x_kind};
                twostroke_linear(threads, &packed.matrix, &in, &to, NO_ACTIVATION, columns, (uint32_t*)scratch.data);
                const std::string name = std::to_string(kind) + " by " + std::to_string(x_kind) + ", " + std::to_string(rows) + " rows";
                tell("linear " + name, out);
                const Packed gates(kind, x_kind, 2 * 64, inner, 5);
                for (int activation : {SILU, GELU_TANH, CLAMPED_SWIGLU}) {
                    Memory gated((int64_t)rows * 64 * bytes(x_kind));
                    const Rows half{gated.data, 64, rows, x_kind};
                    twostroke_linear(threads, &gates.matrix, &in, &half, activation, 64, (uint32_t*)scratch.data);
                    tell("gated " + std::to_string(activation) + " " + name, gated);
                }
                Memory head((int64_t)rows * columns * 4), h((int64_t)rows * inner * bytes(x_kind)), weight(inner, FLOAT32, 6);
                Memory least(4l * rows), greatest(4l * rows), best(4l * rows);
                const Rows logits{head.data, columns, rows, FLOAT32}, normed{h.data, inner, rows, x_kind};
                twostroke_head(threads, &packed.matrix, (float*)weight.data, 1e-5f, &in, &normed, &logits, (uint32_t*)scratch.data,
                               (float*)least.data, (float*)greatest.data, (int32_t*)best.data);
                tell("head " + name, head), tell("least " + name, least), tell("greatest " + name, greatest), tell("best " + name, best);
            }
}

// 4-bit groups, with and without zero points, in both orders of columns.
void groups() {
    const int columns = 90, inner = 192, group = 32, count = columns * inner / group;
    Memory pairs(columns * inner / 2), scales(count, FLOAT32, 41, 0.1f), zeros(count), order(4l * inner);
    for (int64_t i = 0; i < pairs.size; i++) pairs.data[i] = (char)(number(42, i) * 128.0f + 128.0f);
    for (int i = 0; i < count; i++) zeros.data[i] = (char)(i * 7 % 16);
    for (int i = 0; i < inner; i++) ((int32_t*)order.data)[i] = i * 5 % inner;
    for (int x_kind : {FLOAT32, BFLOAT16})
        for (int has_zeros : {0, 1})
            for (int ordered : {0, 1})
                for (int count : {1, 3, 7, 17, 50}) {
                    Matrix m{};
                    m.kind = INT4, m.columns = columns, m.inner = inner, m.group = group, m.scale_kind = FLOAT32;
                    m.has_zeros = has_zeros, m.order = ordered ? (int32_t*)order.data : nullptr;
                    m.panel_bytes = twostroke_int4_panel_bytes(inner, group, FLOAT32, has_zeros);
                    Memory panels((columns + 15) / 16 * m.panel_bytes);
                    m.panels = panels.data;
                    twostroke_pack_int4(threads, (uint8_t*)pairs.data, scales.data, has_zeros ? (uint8_t*)zeros.data : nullptr, &m);
                    Memory x((int64_t)count * inner, x_kind, 43), out((int64_t)count * columns * bytes(x_kind)), scratch(8l * (count + 64) * (inner + 16));
                    const Rows in{x.data, inner, count, x_kind}, to{out.data, columns, count, x_kind};
                    twostroke_linear(threads, &m, &in, &to, NO_ACTIVATION, columns, (uint32_t*)scratch.data);
                    tell("groups " + std::to_string(x_kind) + std::to_string(has_zeros) + std::to_string(ordered) + ", " + std::to_string(count), out);
                }
}

void rows() {
    for (int kind : {FLOAT32, BFLOAT16}) {
        const int count = 5, width = 96;
        Memory x(count * width, kind, 21, 4.0f), delta(count * width, kind, 22), weight(width, FLOAT32, 23), out(count * width * bytes(kind));
        const Rows in{x.data, width, count, kind}, more{delta.data, width, count, kind}, to{out.data, width, count, kind};
        twostroke_rms_norm(threads, &in, &more, (float*)weight.data, 1e-5f, 1, width, &to);
        tell("norm", out), tell("sum", x);
        Memory cos(count * 16, FLOAT32, 24), sin(count * 16, FLOAT32, 25);
        for (int interleaved : {0, 1}) twostroke_rotary(threads, &to, 2, 48, (float*)cos.data, (float*)sin.data, 16, interleaved);
        tell("rotary", out);
    }
    Memory x(4 * 1000, FLOAT32, 26), least(16), greatest(16), best(16);
    const Rows in{x.data, 1000, 4, FLOAT32};
    twostroke_extremes(threads, &in, 1000, (float*)least.data, (float*)greatest.data, (int32_t*)best.data);
    tell("least", least), tell("greatest", greatest), tell("best", best);
}

// A cache of one sequence in each codec: rows are stored, sealed, and attended to.
void cache() {
    constexpr int TOKENS = 150, BLOCK = 32, BLOCKS = 5, HEADS = 2, GROUP = 3;
    for (int codec : {FP8, BFLOAT16, FLOAT32})
        for (int kind : {FLOAT32, BFLOAT16})
            for (int width : {64, 40}) {
                const std::string name = std::to_string(codec) + " of " + std::to_string(kind) + ", " + std::to_string(width);
                const int64_t row_bytes = (int64_t)width * (codec == FP8 ? 1 : bytes(codec)), places = (int64_t)BLOCKS * HEADS * BLOCK;
                Memory keys(places * row_bytes), values(places * row_bytes), key_scales(places), value_scales(places);
                Memory k((int64_t)TOKENS * HEADS * width, kind, 31, 2.0f), v((int64_t)TOKENS * HEADS * width, kind, 32, 2.0f);
                std::vector<int64_t> slots(TOKENS);
                for (int i = 0; i < TOKENS; i++) slots[i] = i;
                Memory bad(4l * TOKENS);
                const StorePart parts[] = {
                    {{k.data, HEADS * width, TOKENS, kind}, (uint8_t*)keys.data, (uint8_t*)key_scales.data, HEADS, width, codec, BLOCK},
                    {{v.data, HEADS * width, TOKENS, kind}, (uint8_t*)values.data, (uint8_t*)value_scales.data, HEADS, width, codec, BLOCK}};
                twostroke_write(threads, parts, 2, slots.data(), TOKENS, (int32_t*)bad.data);
                tell("keys " + name, keys), tell("scales " + name, key_scales);
                const int32_t blocks[BLOCKS] = {0, 1, 2, 3, 4};
                const float sinks[HEADS * GROUP] = {0, 2, -3, 50, 1, -80};
                for (int count : {1, 40}) {
                    Memory q((int64_t)count * HEADS * GROUP * width, kind, 33, 3.0f), out((int64_t)count * HEADS * GROUP * width * bytes(kind));
                    const AttendSpan span{blocks, 0, TOKENS - count, count, 0};
                    for (int window : {0, 37}) {
                        Attend job{};
                        job.queries[0] = {q.data, HEADS * GROUP * width, count, kind};
                        job.keys[0] = {(uint8_t*)keys.data, (uint8_t*)key_scales.data, codec, HEADS, BLOCK, width};
                        job.values = {(uint8_t*)values.data, (uint8_t*)value_scales.data, codec, HEADS, BLOCK, width};
                        job.out = {out.data, HEADS * GROUP * width, count, kind};
                        job.spans = &span, job.num_parts = 1, job.num_spans = 1, job.heads = HEADS * GROUP;
                        job.window = window, job.scale = 0.125f, job.softcap = window ? 5.0f : 0.0f;
                        job.sinks = window ? nullptr : sinks;
                        twostroke_attend(threads, &job);
                        tell("attend " + std::to_string(count) + " window " + std::to_string(window) + ": " + name, out);
                    }
                }
                const int words = (int)(row_bytes / 4);
                Memory row_keys(16l * words * 8), scale_keys(16 * 8), first(HEADS * 8);
                for (int64_t i = 0; i < row_keys.size / 8; i++) ((uint64_t*)row_keys.data)[i] = (i + 1) * 0x9E3779B97F4A7C15ull;
                for (int64_t i = 0; i < 16; i++) ((uint64_t*)scale_keys.data)[i] = (i + 7) * 0xBF58476D1CE4E5B9ull;
                Memory digests((int64_t)HEADS * BLOCKS * 2 * 8), generations(BLOCKS * 2 * 8), tokens(BLOCKS * 2 * 8);
                const SealedPlanes planes{(uint8_t*)keys.data, codec == FP8 ? (uint8_t*)key_scales.data : nullptr,
                                          (uint64_t*)row_keys.data, (uint64_t*)scale_keys.data, (uint64_t*)first.data,
                                          (uint64_t*)digests.data, 17, 19, BLOCKS, 1, HEADS, BLOCK, words};
                const HashBlock sealed[] = {{0, 0, 1, 0, 16}, {3, 1, 1, 7, 9}};
                twostroke_seal(&planes, 1, sealed, 2, 2, (int64_t*)generations.data, (int64_t*)tokens.data);
                tell("seals " + name, digests);
            }
}

// A gated delta net over two sequences, one of which goes on from a state and leaves two.
void recurrence() {
    constexpr int TAPS = 4, KEY_HEADS = 2, HEADS = 4, KEY = 30, VALUE = 24, ROWS = 9, STATES = 4;
    constexpr int CHANNELS = 2 * KEY_HEADS * KEY + HEADS * VALUE, MEMORY = HEADS * KEY * VALUE, KEPT = (TAPS - 1) * CHANNELS;
    for (int kind : {FLOAT32, BFLOAT16}) {
        Memory x(ROWS * CHANNELS, kind, 41), rates(ROWS * 2 * HEADS, FLOAT32, 42, 3.0f), taps(TAPS * CHANNELS, FLOAT32, 43);
        Memory decay(HEADS, FLOAT32, 44, 2.0f), bias(HEADS, FLOAT32, 45), mixed(4l * ROWS * CHANNELS), numbers(4l * ROWS * HEADS * 3);
        for (int h = 0; h < HEADS; h++) ((float*)decay.data)[h] -= 2.5f;
        Memory memories(STATES * MEMORY, FLOAT32, 46), convs(STATES * KEPT, FLOAT32, 47), out((int64_t)ROWS * HEADS * VALUE * bytes(kind));
        float *memory = (float*)memories.data, *conv = (float*)convs.data;
        const DeltaSpan spans[] = {{memory, conv, 0, 8, 0, 2}, {memory, conv, 8, 1, 2, 1}};
        const DeltaMark marks[] = {{memory + MEMORY, conv + KEPT, 2, 0},
                                   {memory + 2 * MEMORY, conv + 2 * KEPT, 8, 0},
                                   {memory + 3 * MEMORY, conv + 3 * KEPT, 1, 0}};
        Delta job{{x.data, CHANNELS, ROWS, kind}};
        job.rates = (float*)rates.data, job.taps = (float*)taps.data, job.decay = (float*)decay.data;
        job.step_bias = (float*)bias.data, job.mixed = (float*)mixed.data, job.numbers = (float*)numbers.data;
        job.out = {out.data, HEADS * VALUE, ROWS, kind};
        job.spans = spans, job.marks = marks, job.num_spans = 2, job.num_taps = TAPS;
        job.key_heads = KEY_HEADS, job.heads = HEADS, job.key_width = KEY, job.value_width = VALUE;
        twostroke_delta(threads, &job);
        const std::string name = std::to_string(kind);
        tell("delta " + name, out), tell("memories " + name, memories), tell("convs " + name, convs);
    }
}

}  // namespace

int main() {
    threads = twostroke_start_threads(2);
    products(), groups(), rows(), cache(), recurrence();
    twostroke_stop_threads(threads);
    std::fprintf(stderr, "%s %d\n", twostroke_level(), twostroke_self_check());
}
