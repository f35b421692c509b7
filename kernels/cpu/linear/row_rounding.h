// Rows rounded to 8 bits, in groups of 64 neighbours: linear/int8.cpp has the definition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "simd.h"

namespace linear {

using namespace simd;

constexpr int GROUP = 64, OFFSET = 128;
inline int num_groups(int inner) { return (inner + GROUP - 1) / GROUP; }

// Sixteen numbers of a row from k on; zeros past the row's end.
inline F32 numbers(const Rows& x, int row, int k, int inner) {
    const int64_t at = row * x.stride + k;
    const int count = std::min(LANES, inner - k);
    if (x.kind == BFLOAT16) {
        if (count == LANES) return load_bf16((const uint16_t*)x.data + at);
        U16x16 some{};
        std::memcpy(&some, (const uint16_t*)x.data + at, 2 * count);
        return widen(some);
    }
    F32 some{};
    std::memcpy(&some, (const float*)x.data + at, 4 * count);
    return some;
}

// One row of a group, rounded.
struct Rounded {
    alignas(64) int8_t numbers[GROUP];
    int32_t begin;  // start of the row's sums: minus the offset that unsigned weights add
    float scale;    // NaN if a number is not finite, so that every output is NaN
};

inline void round_group(const Rows& x, int row, int first, int inner, Rounded& to) {
    const int count = std::min(GROUP, inner - first);
    F32 v[GROUP / LANES];
    U32 top{};
    for (int i = 0; i * LANES < count; i++) {
        v[i] = numbers(x, row, first + i * LANES, inner);
        top = larger_u32(top, (U32)v[i] & 0x7FFFFFFFu);  // bits of magnitudes are ordered as the magnitudes, NaN last
    }
    const uint32_t bits = largest_u32(top);
    float largest, inverse = 0.0f;
    std::memcpy(&largest, &bits, 4);
    to.scale = 0.0f;
    if (bits >= 0x7F800000u)
        to.scale = __builtin_nanf("");
    else if (largest >= 0x1p-100f)  // below, 127 / largest may not be finite
        to.scale = largest / 127.0f, inverse = 127.0f / largest;
    constexpr float INTEGERS = 12582912.0f;  // 1.5 * 2**23: added, it leaves a small number as an integer in the low bits
    I32 sum{};
    for (int i = 0; i * LANES < count; i++) {
        const F32 rounded = v[i] * splat(inverse) + splat(INTEGERS);
        const I32 q = (I32)rounded - (I32)splat(INTEGERS);
        sum += q;
        store_bytes(to.numbers + i * LANES, q);
    }
    to.begin = -OFFSET * sum_integers(sum);
}

}  // namespace linear
