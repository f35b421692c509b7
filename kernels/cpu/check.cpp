// Self-test of a built library: compares matrix products with float64 sums. Run once after building, in a process of its own.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "api.h"
#include "linear/coded.h"
#include "simd.h"
#include "threads.h"

namespace {

float number(uint32_t& state) {
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)(state >> 16 & 0xFF) / 64.0f - 2.0f;  // eight bits: exact in bfloat16
}
void write(void* to, int64_t i, float x, int kind) {
    if (kind == FLOAT32) ((float*)to)[i] = x;
    if (kind == INT8) ((int8_t*)to)[i] = (int8_t)x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (kind == BFLOAT16 || kind == CODED) ((uint16_t*)to)[i] = (uint16_t)(bits >> 16);
}
float read(const void* from, int64_t i, int kind) {
    return kind == FLOAT32 ? ((const float*)from)[i] : simd::to_float(((const uint16_t*)from)[i]);
}
int bytes(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

struct Buffer {
    explicit Buffer(int64_t size) : data(std::aligned_alloc(64, (size + 127) / 64 * 64)) {}
    ~Buffer() { std::free(data); }
    void* data;
};

bool right(int kind, int x_kind, int rows, int columns, int inner) {
    const bool pairs = x_kind == BFLOAT16;
    uint32_t seed = 7;
    Buffer x(4l * rows * inner), w(4l * columns * inner), out(4l * rows * columns);
    Buffer scratch(4l * (rows + 32) * (inner + 4));
    std::vector<float> xs((int64_t)rows * inner), ws((int64_t)columns * inner), scales(columns + 16, 0.5f);
    for (int64_t i = 0; i < (int64_t)xs.size(); i++) {
        xs[i] = number(seed);
        if (kind == INT8) xs[i] = i % inner % 32 ? std::rint(xs[i] * 60.0f) : 127.0f;  // rounding to 8 bits is exact
        write(x.data, i, xs[i], x_kind);
    }
    for (int64_t i = 0; i < (int64_t)ws.size(); i++) {
        ws[i] = kind == INT8 ? std::rint(number(seed) * 60.0f) : number(seed);
        write(w.data, i, ws[i], kind);
    }
    Threads threads(2);
    const int64_t panel_bytes = kind == CODED ? twostroke_coded_panel_bytes(&threads, (uint16_t*)w.data, columns, inner)
                                              : twostroke_panel_bytes(kind, inner, pairs);
    if (!panel_bytes) return false;
    Buffer panels((columns + 15) / 16 * panel_bytes);
    twostroke_pack(&threads, w.data, kind, columns, inner, pairs, panel_bytes, panels.data);
    Matrix matrix{panels.data, kind == INT8 ? scales.data() : nullptr, nullptr, panel_bytes, kind, columns, inner, 0};
    Rows in{x.data, inner, rows, x_kind}, to{out.data, columns, rows, FLOAT32};
    twostroke_linear(&threads, &matrix, &in, &to, NO_ACTIVATION, columns, (uint32_t*)scratch.data);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            double sum = 0, size = 0;
            for (int k = 0; k < inner; k++) {
                const double product = (double)xs[(int64_t)r * inner + k] * ws[(int64_t)c * inner + k];
                sum += product, size += std::fabs(product);
            }
            const double factor = kind == INT8 ? 0.5 : 1.0, got = read(out.data, (int64_t)r * columns + c, FLOAT32);
            if (!(std::fabs(got - sum * factor) <= 1e-5 * size * factor)) return false;
        }
    return true;
}

bool right_int4(int x_kind, int rows, bool has_zeros) {
    const int columns = 40, inner = 96, group = 32, groups = inner / group;
    uint32_t seed = 9;
    Buffer x(4l * rows * inner), out(4l * rows * columns), scratch(4l * (rows + 32) * (inner + 4));
    std::vector<float> xs((int64_t)rows * inner), scales(columns * groups);
    std::vector<uint8_t> pairs(columns * inner / 2), zeros(columns * groups);
    for (int64_t i = 0; i < (int64_t)xs.size(); i++) write(x.data, i, xs[i] = number(seed), x_kind);
    for (auto& pair : pairs) pair = (uint8_t)(number(seed) * 64.0f + 128.0f);
    for (int i = 0; i < columns * groups; i++) scales[i] = number(seed), zeros[i] = (uint8_t)(i % 16);
    Threads threads(2);
    Matrix matrix{};
    matrix.kind = INT4, matrix.columns = columns, matrix.inner = inner;
    matrix.group = group, matrix.scale_kind = FLOAT32, matrix.has_zeros = has_zeros;
    matrix.panel_bytes = twostroke_int4_panel_bytes(inner, group, FLOAT32, has_zeros);
    Buffer panels((columns + 15) / 16 * matrix.panel_bytes);
    matrix.panels = panels.data;
    twostroke_pack_int4(&threads, pairs.data(), scales.data(), has_zeros ? zeros.data() : nullptr, &matrix);
    Rows in{x.data, inner, rows, x_kind}, to{out.data, columns, rows, FLOAT32};
    twostroke_linear(&threads, &matrix, &in, &to, NO_ACTIVATION, columns, (uint32_t*)scratch.data);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            double sum = 0, size = 0;
            for (int k = 0; k < inner; k++) {
                const int at = c * groups + k / group, zero = has_zeros ? zeros[at] : 8;
                const int number = pairs[(c * inner + k) / 2] >> (k % 2 ? 4 : 0) & 15;
                const double product = (double)xs[(int64_t)r * inner + k] * (number - zero) * scales[at];
                sum += product, size += std::fabs(product);
            }
            if (!(std::fabs(read(out.data, (int64_t)r * columns + c, FLOAT32) - sum) <= 1e-5 * (size + 1.0))) return false;
        }
    return true;
}

}  // namespace

extern "C" int32_t twostroke_self_check() {
    for (int rows : {1, 3, 12, 16, 17, 50})
        for (int inner : {32, 70, 256})
            for (int kind : {FLOAT32, BFLOAT16, INT8})
                for (int x_kind : {FLOAT32, BFLOAT16})
                    if ((kind == INT8 || kind == x_kind) && !right(kind, x_kind, rows, 40, inner)) return 1;
    for (int rows : {1, 3, 16, 50, 70})
        if (coded::DECODES && !right(CODED, BFLOAT16, rows, 40, 264)) return 1;
    for (int rows : {1, 2, 3, 16, 50})
        for (int x_kind : {FLOAT32, BFLOAT16})
            for (bool has_zeros : {false, true})
                if (!right_int4(x_kind, rows, has_zeros)) return 1;
    return 0;
}
