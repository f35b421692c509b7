// Functions for the eight AMX tile registers, each 16 rows of 64 bytes, and an emulation in plain C++.
//
// TWOSTROKE_EMULATE_TILES selects the emulation, so that code which uses tiles can be tested on any machine. Its arithmetic has
// the order of the instruction's specification.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(TWOSTROKE_EMULATE_TILES)
#define TWOSTROKE_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define TWOSTROKE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Tiles read the layout of linear/int8.cpp.
#if defined(TWOSTROKE_AVX2) && !defined(TWOSTROKE_TILES)
#define TWOSTROKE_INT8_AVX2 1
#endif

#if defined(TWOSTROKE_TILES)

namespace tiles {

constexpr int ROWS = 16, ROW_BYTES = 64, TILE_BYTES = ROWS * ROW_BYTES;

#if defined(TWOSTROKE_EMULATE_TILES)

inline float (&memory(int tile))[ROWS][16] {
    static thread_local float tiles[8][ROWS][16];
    return tiles[tile];
}
inline bool permitted() { return true; }
inline void begin() {}
inline void end() {}
template <int T>
void zero() {
    std::memset(memory(T), 0, TILE_BYTES);
}
template <int T>
void load(const void* p) {
    std::memcpy(memory(T), p, TILE_BYTES);
}
template <int T>
void save(void* p) {
    std::memcpy(p, memory(T), TILE_BYTES);
}
template <int C, int A, int B>
void dot() {
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0.0f, odd = 0.0f;
            for (int k = 0; k < 16; k++) {
                uint32_t a, b;
                std::memcpy(&a, &memory(A)[m][k], 4);
                std::memcpy(&b, &memory(B)[k][n], 4);
                even += simd::to_float((uint16_t)a) * simd::to_float((uint16_t)b);
                odd += simd::to_float((uint16_t)(a >> 16)) * simd::to_float((uint16_t)(b >> 16));
            }
            memory(C)[m][n] += even + odd;
        }
}
template <int C, int A, int B>
void dot_bytes() {
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            std::memcpy(&sum, &memory(C)[m][n], 4);
            for (int k = 0; k < 16; k++) {
                int8_t a[4];
                uint8_t b[4];
                std::memcpy(a, &memory(A)[m][k], 4);
                std::memcpy(b, &memory(B)[k][n], 4);
                for (int j = 0; j < 4; j++) sum += a[j] * b[j];
            }
            std::memcpy(&memory(C)[m][n], &sum, 4);
        }
}

#else

// Linux grants the tile registers only on request, once per process.
inline bool permitted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}
// Configure all eight tiles at full size. The configuration belongs to the thread.
inline void begin() {
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = ROW_BYTES, config.rows[i] = ROWS;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void end() { asm volatile("tilerelease"); }

// In assembly, because the compilers' intrinsics accept only a literal as a tile's number.
template <int T>
void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
void load(const void* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"((int64_t)ROW_BYTES), "i"(T) : "memory");
}
template <int T>
void save(void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"((int64_t)ROW_BYTES), "i"(T) : "memory");
}
template <int C, int A, int B>
void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Products of signed bytes of A with unsigned bytes of B, summed in 32 bits.
template <int C, int A, int B>
void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace tiles

#endif
