#pragma once

/* Standardisation and products of one plane. */

#include "activations.h"
#include "vectors.h"

INLINE float product_of(const float *x, const float *times, long i) { return times ? x[i] * times[i] : x[i]; }

/* Mean and biased variance of a plane of x, or of its product with `times`; the second sum corrects the first. */
INLINE void plane_moments(const float *x, const float *times, long points, float *mean, float *var) {
    float sum = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < points; i++) sum += product_of(x, times, i);
    float middle = sum / points;
#pragma omp simd reduction(+ : rest, squares)
    for (long i = 0; i < points; i++) {
        float apart = product_of(x, times, i) - middle;
        rest += apart;
        squares += apart * apart;
    }
    rest /= points;
    *mean = fabsf(middle) <= FLT_MAX ? middle + rest : middle;
    *var = squares / points - rest * rest;
}

/* y <- (x times - mean) scale for a plane, or gelu of that plus bias (NULL: no gelu); y may be x. */
INLINE void plane_scale(const float *x, const float *times, const float *bias, float *y, float mean, float scale,
                        long points) {
#pragma omp simd
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale;
        y[i] = bias ? gelu(z) + bias[i] : z;
    }
}

/* The same with the plane's own moments. Returns 1, and leaves y unchanged, if the variance is not finite. */
INLINE int plane_standardise(const float *x, const float *times, const float *bias, float *y, long points, float eps) {
    float mean, var;
    plane_moments(x, times, points, &mean, &var);
    if (!is_variance(var)) return 1;
    plane_scale(x, times, bias, y, mean, 1 / sqrtf(var + eps), points);
    return 0;
}

/* Some rows of y <- w z, for the columns of COL_TILE vectors; `step` is the row stride of z. */
INLINE void square_rows(const float *w, const float *z, float *y, long side, long step, long cols, const int rows) {
    lanes sum[ROW_TILE][COL_TILE] = {{{0}}};
    for (long k = 0; k < side; k++) {
        lanes row[COL_TILE];
        for (int s = 0; s < COL_TILE; s++) row[s] = *(const anywhere *)(z + k * step + s * LANES);
        for (int r = 0; r < rows; r++)
            for (int s = 0; s < COL_TILE; s++) sum[r][s] += w[r * side + k] * row[s];
    }
    for (int r = 0; r < rows; r++) store(sum[r], y + r * side, cols);
}

/* y <- w z for square matrices; `panel` is working memory for the last columns of z. */
static inline void square_product(const float *w, const float *z, float *y, long side, lanes *panel) {
    for (long j = 0; j < side; j += COL_TILE * LANES) {
        long cols = least(COL_TILE * LANES, side - j), step = side, i = 0;
        const float *from = z + j;
        if (cols < COL_TILE * LANES) {
            for (long k = 0; k < side; k++) memcpy(panel + k * COL_TILE, z + k * side + j, cols * sizeof(float));
            from = (const float *)panel, step = COL_TILE * LANES;
        }
        for (; i + ROW_TILE <= side; i += ROW_TILE) square_rows(w + i * side, from, y + i * side + j, side, step, cols, ROW_TILE);
        for (; i < side; i++) square_rows(w + i * side, from, y + i * side + j, side, step, cols, 1);
    }
}

/* y[0] to y[2] + at <- w times the planes z[0] to z[2] + at, and y[3] + at <- silu of the first. */
static inline void plane_products(const float *w, const float *const z[3], float *const y[4], long at, long side,
                           lanes *panel) {
    for (int i = 0; i < 3; i++) square_product(w, z[i] + at, y[i] + at, side, panel);
#pragma omp simd
    for (long i = at; i < at + side * side; i++) y[3][i] = y[0][i] * sigmoid(y[0][i]);
}
