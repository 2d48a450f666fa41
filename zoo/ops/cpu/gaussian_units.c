/* Gaussian units exp(-|L^T (x - c)|^2 / 2) and their gradient. */

#include "activations.h"
#include "gemm.h"

/* The factor L (dim, rank) with all its entries; its lower triangle may be packed, row by row. To be freed. */
static float *whole_factor(const float *factor, long dim, long rank, long packed) {
    float *whole = calloc(dim * rank, sizeof(float));
    for (long i = 0; i < dim; i++) {
        long width = packed ? i + 1 : rank;
        memcpy(whole + i * rank, factor, width * sizeof(float));
        factor += width;
    }
    return whole;
}

/* near <- points - origin, in_metric <- near L, half[i] <- half of the square of row i. */
static void to_metric(const float *points, const float *origin, const float *L, float *near, float *in_metric,
                      float *half, long count, long dim, long rank, long packed) {
    for (long i = 0; i < count; i++)
        for (long d = 0; d < dim; d++) near[i * dim + d] = points[i * dim + d] - origin[d];
    memset(in_metric, 0, count * rank * sizeof(float));
    product((matrix){near, dim, 1}, (matrix){L, rank, 1}, in_metric, count, dim, rank, packed, 0);
    for (long i = 0; i < count; i++) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long r = 0; r < rank; r++) squares += in_metric[i * rank + r] * in_metric[i * rank + r];
        half[i] = 0.5f * squares;
    }
}

/* phi (points, units), and what its derivatives need: x and centers (.., dim) with the origin moved into the centres,
   z and k (.., rank) in the coordinates of the metric. Returns 1, without kernel values, if points or centres lie so far
   out that differences between them would lose digits. */
long gaussian_units(const float *x, const float *centers, const float *factor, float *phi, float *near_x,
                    float *near_centers, float *z, float *k, long points, long units, long dim, long rank, long packed) {
    float *L = whole_factor(factor, dim, rank, packed), *origin = calloc(dim, sizeof(float));
    float *half_z = malloc((points + units) * sizeof(float)), *half_k = half_z + points;
    for (long m = 0; m < units; m++)
        for (long d = 0; d < dim; d++) origin[d] += centers[m * dim + d];
    for (long d = 0; d < dim; d++) origin[d] /= units;
    to_metric(x, origin, L, near_x, z, half_z, points, dim, rank, packed);
    to_metric(centers, origin, L, near_centers, k, half_k, units, dim, rank, packed);
    int far = 0; /* also if something is infinite or no number: zeros of a triangle would meet it */
    for (long i = 0; i < points + units; i++) far |= !(half_z[i] <= 32);
    if (far) {
        free(L), free(origin), free(half_z);
        return 1;
    }
    for (long n = 0; n < points; n++)
        for (long m = 0; m < units; m++) phi[n * units + m] = -half_z[n] - half_k[m];
    product((matrix){z, rank, 1}, (matrix){k, 1, rank}, phi, points, rank, units, 0, 0);
#pragma omp simd
    for (long i = 0; i < points * units; i++)
        phi[i] = capped_exponential(phi[i]); /* rounding may leave a distance just below zero */
    free(L);
    free(origin);
    free(half_z);
    return 0;
}

/* d_x and d_centers (zeros at first, or NULL) and d_factor, as it is stored, from the gradient of phi and from what
   `gaussian_units` found. With r = grad phi: d_z = r k - (r 1) z, d_k = r^T z - (r^T 1) k, d_L = x^T d_z + centers^T d_k. */
void gaussian_units_gradient(const float *grad, const float *phi, const float *x, const float *centers, const float *z,
                             const float *k, const float *factor, float *d_x, float *d_centers, float *d_factor,
                             long points, long units, long dim, long rank, long packed) {
    float *r = malloc(points * units * sizeof(float)), *of_units = calloc(units, sizeof(float));
    float *d_z = malloc((points + units) * rank * sizeof(float)), *d_k = d_z + points * rank;
    for (long n = 0; n < points; n++) {
        float of_point = 0;
#pragma omp simd reduction(+ : of_point)
        for (long m = 0; m < units; m++) {
            float value = grad[n * units + m] * phi[n * units + m];
            r[n * units + m] = value;
            of_point += value;
            of_units[m] += value;
        }
        for (long j = 0; j < rank; j++) d_z[n * rank + j] = -of_point * z[n * rank + j];
    }
    for (long m = 0; m < units; m++)
        for (long j = 0; j < rank; j++) d_k[m * rank + j] = -of_units[m] * k[m * rank + j];
    product((matrix){r, units, 1}, (matrix){k, rank, 1}, d_z, points, units, rank, 0, 0);
    product((matrix){r, 1, units}, (matrix){z, rank, 1}, d_k, units, points, rank, 0, 0);

    float *L = whole_factor(factor, dim, rank, packed);
    if (d_x) product((matrix){d_z, rank, 1}, (matrix){L, 1, rank}, d_x, points, rank, dim, 0, 0);
    if (d_centers) product((matrix){d_k, rank, 1}, (matrix){L, 1, rank}, d_centers, units, rank, dim, 0, 0);
    memset(L, 0, dim * rank * sizeof(float)); /* now its gradient */
    product((matrix){x, 1, dim}, (matrix){d_z, rank, 1}, L, dim, points, rank, 0, packed);
    product((matrix){centers, 1, dim}, (matrix){d_k, rank, 1}, L, dim, units, rank, 0, packed);
    for (long i = 0; i < dim; i++) {
        long width = packed ? i + 1 : rank;
        memcpy(d_factor, L + i * rank, width * sizeof(float));
        d_factor += width;
    }
    free(r);
    free(of_units);
    free(d_z);
    free(L);
}
