// Sixteen numbers of a row of float32 or bfloat16, as float32; a row may end within them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "simd.h"

namespace simd {

// Sixteen numbers from `at` on; numbers from `count` on are zeros.
inline F32 get(const void* data, int kind, int64_t at, int count) {
    if (count >= LANES)
        return kind == BFLOAT16 ? load_bf16((const uint16_t*)data + at) : load<F32>((const float*)data + at);
    if (kind == BFLOAT16) {
        U16x16 bits{};
        std::memcpy(&bits, (const uint16_t*)data + at, 2 * std::max(count, 0));
        return widen(bits);
    }
    F32 v{};
    std::memcpy(&v, (const float*)data + at, 4 * std::max(count, 0));
    return v;
}
template <U16x16 (*ROUND)(F32) = rounded>
inline void put(void* data, int kind, int64_t at, int count, F32 v) {
    if (kind == BFLOAT16) {
        U16x16 bits = ROUND(v);
        if (count >= LANES)
            store((uint16_t*)data + at, bits);
        else
            std::memcpy((uint16_t*)data + at, &bits, 2 * count);
    } else if (count >= LANES) {
        store((float*)data + at, v);
    } else {
        std::memcpy((float*)data + at, &v, 4 * count);
    }
}

}  // namespace simd
