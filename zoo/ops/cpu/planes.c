/* Standardisation, gates and products of many planes, for slow-fast networks. */

#include "planes.h"

/* x (planes, points), mean and var (planes). */
void moments(const float *x, float *mean, float *var, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++) plane_moments(x + p * points, NULL, points, mean + p, var + p);
}

/* From mean and var of every plane those to standardise with, and 1 / standard deviation: channels of the even groups
   share theirs over the batch, or have known ones, (these channels).
   mean and var (batch, chans), overwritten. */
void shared_moments(float *mean, float *var, const float *known_mean, const float *known_var, long batch, long chans,
                    long groups, float eps) {
    for (long c = 0, even = 0; c < chans; c++) {
        if (c * groups / chans % 2 == 0) {
            double middle = 0, spread = 0;
            for (long b = 0; b < batch; b++) middle += mean[b * chans + c] / batch;
            for (long b = 0; b < batch; b++) {
                double apart = mean[b * chans + c] - middle;
                spread += (var[b * chans + c] + apart * apart) / batch;
            }
            for (long b = 0; b < batch; b++) {
                mean[b * chans + c] = known_mean ? known_mean[even] : middle;
                var[b * chans + c] = known_var ? known_var[even] : spread;
            }
            even++;
        }
        for (long b = 0; b < batch; b++) var[b * chans + c] = 1 / sqrtf(var[b * chans + c] + eps);
    }
}

/* y <- (x times - mean) scale of every plane, or gelu of that, plus bias; its own moments if asked.
   x, times (or NULL: ones) and y (planes, points), y may be x; bias (points), or NULL: no gelu; mean and scale (planes),
   written with its own moments, read otherwise. Returns how many planes were left as they are, with a scale of 0, for
   their own variance is not finite. */
long standardise(const float *x, const float *times, const float *bias, float *y, float *mean, float *scale,
                 long planes, long points, float eps, long own) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (times)
            strange += plane_standardise(x + at, times + at, bias, y + at, mean + p, scale + p, points, eps, own);
        else if (bias)
            strange += plane_standardise(x + at, NULL, bias, y + at, mean + p, scale + p, points, eps, own);
        else
            strange += plane_standardise(x + at, NULL, NULL, y + at, mean + p, scale + p, points, eps, own);
    }
    return strange;
}

/* The same of many planes: key, query and y (planes, points), key_bias and query_bias (chans), bias (points), scale
   (planes). Returns how many were left at their products, with a scale of 0. */
long gate(const float *key, const float *query, const float *key_bias, const float *query_bias, const float *bias,
          float *y, float *scale, long planes, long chans, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        strange += plane_gate(key + at, query + at, key_bias[p % chans], query_bias[p % chans], bias, y + at, scale + p,
                              points, eps);
    }
    return strange;
}

/* out <- x sigmoid(along m^2 across s^2), with m the mean of every plane of y and s that of every pixel over the planes
   of its sample.
   y, x and out (batch, chans, points), along (chans), across (points). */
void hyper_interaction(const float *y, const float *x, const float *along, const float *across, float *out, long batch,
                       long chans, long points) {
    float *plane = malloc(batch * chans * sizeof(float)), *pixel = malloc(batch * points * sizeof(float));
    long parts = (points + 255) / 256;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long p = 0; p < batch * chans; p++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < points; i++) sum += y[p * points + i];
            plane[p] = along[p % chans] * (sum / points) * (sum / points);
        }
#pragma omp for schedule(static)
        for (long part = 0; part < batch * parts; part++) {
            long sample = part / parts, from = part % parts * 256, to = least(from + 256, points);
            float *sum = pixel + sample * points;
            memset(sum + from, 0, (to - from) * sizeof(float));
            for (long c = 0; c < chans; c++) {
                const float *row = y + (sample * chans + c) * points;
#pragma omp simd
                for (long i = from; i < to; i++) sum[i] += row[i];
            }
#pragma omp simd
            for (long i = from; i < to; i++) sum[i] = across[i] * (sum[i] / chans) * (sum[i] / chans);
        }
#pragma omp for schedule(static)
        for (long p = 0; p < batch * chans; p++) {
            const float *score = pixel + p / chans * points;
#pragma omp simd
            for (long i = 0; i < points; i++) out[p * points + i] = x[p * points + i] * sigmoid(plane[p] * score[i]);
        }
    }
    free(plane);
    free(pixel);
}

/* y <- the standardised x sigmoid(along m^2), with m the mean of every plane of x; x_mean and y_mean <- the means of x and
   y over the batch.
   x and y (batch, chans, points), along (chans), x_mean and y_mean (chans, points). Returns how many planes have a
   variance that is not finite. */
long channel_interaction(const float *x, const float *along, float *y, float *x_mean, float *y_mean, long batch,
                         long chans, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long c = 0; c < chans; c++) {
        float *of_x = x_mean + c * points, *of_y = y_mean + c * points, share = 1.0f / batch;
        memset(of_x, 0, points * sizeof(float));
        memset(of_y, 0, points * sizeof(float));
        for (long b = 0; b < batch; b++) {
            const float *from = x + (b * chans + c) * points;
            float *to = y + (b * chans + c) * points, mean, var;
            plane_moments(from, NULL, points, &mean, &var);
            float factor = sigmoid(along[c] * mean * mean); /* one for the plane: it scales the moments */
            float scale = factor / sqrtf(factor * factor * var + eps);
            strange += !is_variance(var);
#pragma omp simd
            for (long i = 0; i < points; i++) {
                to[i] = (from[i] - mean) * scale;
                of_x[i] += from[i] * share;
                of_y[i] += to[i] * share;
            }
        }
    }
    return strange;
}

/* d_x <- gradient of x, and d_times of times, with flat and tilt the means of the gradient of the standardised z and of
   that times z. */
INLINE void plane_gradient(const float *x, const float *times, float mean, float scale, float flat, float tilt,
                           float *d_x, float *d_times, long points) {
#pragma omp simd
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = scale * (d_x[i] - flat - tilt * z);
        if (times) d_times[i] = slope * x[i];
        d_x[i] = times ? slope * times[i] : slope;
    }
}

INLINE void plane_slopes(const float *x, const float *times, float mean, float scale, const float *grad, float *d_x,
                         float *d_times, float *flat, float *tilt, long points, long own, long activate) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = activate ? grad[i] * gelu_slope(z) : grad[i];
        d_x[i] = slope;
        sum += slope;
        dot += slope * z;
    }
    *flat = sum / points;
    *tilt = dot / points;
    if (own && !all_finite(flat, 1)) *flat = NAN; /* as in the library's order of sums */
    if (own) plane_gradient(x, times, mean, scale, *flat, *tilt, d_x, d_times, points);
}

/* First half of the gradient of `standardise`, and all of it with its own moments; gelu if asked.
   x, times (or NULL), grad, d_x and d_times (planes, points); mean, scale, flat and tilt (planes). */
void standardise_slopes(const float *x, const float *times, const float *mean, const float *scale, const float *grad,
                        float *d_x, float *d_times, float *flat, float *tilt, long planes, long points, long own,
                        long activate) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (times)
            plane_slopes(x + at, times + at, mean[p], scale[p], grad + at, d_x + at, d_times + at, flat + p, tilt + p,
                         points, own, 1);
        else if (activate)
            plane_slopes(x + at, NULL, mean[p], scale[p], grad + at, d_x + at, NULL, flat + p, tilt + p, points, own,
                         1);
        else
            plane_slopes(x + at, NULL, mean[p], scale[p], grad + at, d_x + at, NULL, flat + p, tilt + p, points, own,
                         0);
    }
}

/* Second half, for moments that planes share: flat and tilt are now means over all of those. */
void standardise_gradient(const float *x, const float *mean, const float *scale, const float *flat, const float *tilt,
                          float *d_x, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++)
        plane_gradient(x + p * points, NULL, mean[p], scale[p], flat[p], tilt[p], d_x + p * points, NULL, points);
}

/* The same of many planes: all (planes, side, side). */
void global_products(const float *w, const float *z1, const float *z2, const float *z3, float *y1, float *y2, float *y3,
                     float *silu, long planes, long side) {
#pragma omp parallel
    {
        lanes *panel = zeros(side * COL_TILE);
#pragma omp for schedule(static)
        for (long p = 0; p < planes; p++) {
            long at = p * side * side;
            plane_products(w + at, (const float *[]){z1, z2, z3}, (float *[]){y1, y2, y3, silu}, at, side, panel);
        }
        free(panel);
    }
}
