// The values that cross from Python: plain structs, mirrored field by field in library.py. Owns nothing.
#pragma once

#include <cstdint>

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FP8 = 3 };

// A matrix [columns, inner] as panels of 16 columns; see linear.cpp.
struct Matrix {
    const void* panels;
    const float* scales;  // INT8: one per column; else null
    const float* bias;    // or null
    int32_t kind, columns, inner, reserved;
};

// Rows in memory: row r starts at data + r * stride numbers.
struct Rows {
    void* data;
    int64_t stride;  // in numbers
    int32_t rows, kind;
};
