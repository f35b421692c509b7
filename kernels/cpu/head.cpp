// From the residual stream to logits: the last norm, the product, and the extremes of each row, in one pass.
#include "api.h"
#include "linear/linear.h"

extern "C" {

void twostroke_head(Threads* threads, const Matrix* matrix, const float* weight, float eps, const Rows* x, const Rows* h,
                    const Rows* out, uint32_t* scratch, float* least, float* greatest, int32_t* best) {
    twostroke_rms_norm(threads, x, nullptr, weight, eps, 1, matrix->inner, h);
    extremes::Search search(*out, matrix->columns);
    linear::multiply(*threads, *matrix, *h, *out, NO_ACTIVATION, matrix->columns, scratch, &search);
    search.settle(least, greatest, best);
}

}  // extern "C"
