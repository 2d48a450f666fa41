/* Layer norm over the channels of each pixel; see zoo/ops/channel_norm.py. */

#include "activations.h"
#include "vectors.h"

/* y <- layer norm of each row, optionally followed by gelu. x and y (rows, cols), weight and bias (cols). Returns the
   number of rows whose variance is not finite. */
long layer_norm(const float *x, const float *weight, const float *bias, float *y, long rows, long cols, float eps,
                long activate) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * cols;
        float *to = y + row * cols, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < cols; i++) sum += from[i];
        float mean = sum / cols;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < cols; i++) squares += (from[i] - mean) * (from[i] - mean);
        float scale = 1 / sqrtf(squares / cols + eps);
        strange += !is_variance(squares);
        if (activate) {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = gelu((from[i] - mean) * scale * weight[i] + bias[i]);
        } else {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
        }
    }
    return strange;
}
