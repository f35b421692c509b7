// The values that cross from Python: plain structs, mirrored field by field in library.py. Owns nothing.
#pragma once

#include <cstdint>

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FP8 = 3, CODED = 4 };

// A matrix [columns, inner] as panels of 16 columns, one every panel_bytes; see linear.cpp.
struct Matrix {
    const void* panels;
    const float* scales;  // INT8: one per column; else null
    const float* bias;    // or null
    int64_t panel_bytes;
    int32_t kind, columns, inner, reserved;
};

// Rows in memory: row r starts at data + r * stride numbers.
struct Rows {
    void* data;
    int64_t stride;  // in numbers
    int32_t rows, kind;
};

// One component of one layer in the cache: payload [blocks, heads, block_tokens, row bytes], scales [blocks, heads, block_tokens].
struct Plane {
    const uint8_t *payload, *scales;
    int32_t codec, heads, block_tokens, width;
};

// One part of what tokens leave in the cache: x [rows, heads * width], into such planes.
struct StorePart {
    Rows x;
    uint8_t *payload, *scales;
    int32_t heads, width, codec, block_tokens;
};

// Rows of one sequence, `count` from batch row `row` on, the first at position `start`; its blocks.
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
