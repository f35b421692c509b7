// From the residual stream to logits: the last norm, the product, and where each row's extremes are, in one pass.
#include "linear.h"

extern "C" {

void twostroke_rms_norm(Threads*, const Rows*, const Rows*, const float*, float, int32_t, int32_t, const Rows*);

// out [rows, columns] float32 = norm(x) times the matrix; least, greatest, best [rows]: see extremes.h. `h` [rows, inner], of
// x's kind, and scratch, as twostroke_linear wants it, are overwritten.
void twostroke_head(Threads* threads, const Matrix* matrix, const float* weight, float eps, const Rows* x, const Rows* h,
                    const Rows* out, uint32_t* scratch, float* least, float* greatest, int32_t* best) {
    twostroke_rms_norm(threads, x, nullptr, weight, eps, 1, matrix->inner, h);
    extremes::Search search(*out, matrix->columns);
    linear::multiply(*threads, *matrix, *h, *out, simd::NONE, matrix->columns, scratch, &search);
    search.settle(least, greatest, best);
}

}  // extern "C"
