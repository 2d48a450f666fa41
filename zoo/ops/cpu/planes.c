/* Standardisation of many planes, forward and backward. */

#include "planes.h"

/* x (planes, points), mean and var (planes). */
void moments(const float *x, float *mean, float *var, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++) plane_moments(x + p * points, NULL, points, mean + p, var + p);
}

/* Moments for the standardisation, from those of every plane: channels of even groups share theirs over the batch, or
   use known_mean and known_var (channels of even groups). mean and var (batch, chans) are replaced by mean and
   1 / standard deviation. */
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

/* y <- (x times - mean) scale of every plane, or gelu of that, plus bias.
   x, times (NULL: ones) and y (planes, points); bias (points; NULL: no gelu); mean and scale (planes; NULL: each
   plane's own). Returns the number of planes left out because their variance is not finite. */
long standardise(const float *x, const float *times, const float *bias, float *y, const float *mean, const float *scale,
                 long planes, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (mean)
            plane_scale(x + at, NULL, bias, y + at, mean[p], scale[p], points);
        else if (times)
            strange += plane_standardise(x + at, times + at, bias, y + at, points, eps);
        else
            strange += plane_standardise(x + at, NULL, NULL, y + at, points, eps);
    }
    return strange;
}

/* d_x <- gradient in the standardised z; `flat` <- its mean, `tilt` <- the mean of its product with z. */
INLINE void plane_slopes(const float *x, const float *times, float mean, float scale, const float *grad, float *d_x,
                         float *flat, float *tilt, long points, const int activated) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = activated ? grad[i] * gelu_derivative(z) : grad[i];
        d_x[i] = slope;
        sum += slope;
        dot += slope * z;
    }
    *flat = sum / points;
    *tilt = dot / points;
}

/* d_x <- gradient in x, and d_times <- gradient in times, from these. */
INLINE void plane_gradient(const float *x, const float *times, float mean, float scale, float flat, float tilt,
                           float *d_x, float *d_times, long points) {
#pragma omp simd
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = scale * (d_x[i] - flat - tilt * z);
        if (times) d_times[i] = slope * x[i];
        d_x[i] = times ? slope * times[i] : slope;
    }
}

INLINE int plane_backward(const float *x, const float *times, const float *grad, float *d_x, float *d_times,
                          long points, float eps, const int activated) {
    float mean, var, scale, flat, tilt;
    plane_moments(x, times, points, &mean, &var);
    if (!is_variance(var)) return 1;
    scale = 1 / sqrtf(var + eps);
    plane_slopes(x, times, mean, scale, grad, d_x, &flat, &tilt, points, activated);
    if (!all_finite(&flat, 1)) flat = NAN; /* as in torch */
    plane_gradient(x, times, mean, scale, flat, tilt, d_x, d_times, points);
    return 0;
}

/* Gradient of `standardise` with own moments: in x only, or in x and times with gelu.
   x, times (or NULL), grad, d_x and d_times (planes, points). Returns the number of planes left out because their
   variance is not finite. */
long standardise_backward(const float *x, const float *times, const float *grad, float *d_x, float *d_times,
                          long planes, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (times)
            strange += plane_backward(x + at, times + at, grad + at, d_x + at, d_times + at, points, eps, 1);
        else
            strange += plane_backward(x + at, NULL, grad + at, d_x + at, NULL, points, eps, 0);
    }
    return strange;
}

/* Gradient of `standardise` with given moments and gelu, first half: gradient in z, and two means per plane.
   x, grad and d_x (planes, points), mean, scale, flat and tilt (planes). */
void shared_slopes(const float *x, const float *mean, const float *scale, const float *grad, float *d_x, float *flat,
                   float *tilt, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++)
        plane_slopes(x + p * points, NULL, mean[p], scale[p], grad + p * points, d_x + p * points, flat + p, tilt + p,
                     points, 1);
}

/* Between the halves: channels of even groups share the batch means, or need none (zero) if their moments were known.
   mean (batch, chans) is overwritten. */
void shared_means(float *mean, long batch, long chans, long groups, long known) {
    for (long c = 0; c < chans; c++) {
        int even = c * groups / chans % 2 == 0;
        double sum = 0;
        for (long b = 0; b < batch; b++) sum += mean[b * chans + c] / batch;
        for (long b = 0; b < batch; b++) {
            float own = mean[b * chans + c];
            mean[b * chans + c] = even ? (known ? 0 : sum) : all_finite(&own, 1) ? own : NAN; /* as in torch */
        }
    }
}

/* Second half. */
void shared_backward(const float *x, const float *mean, const float *scale, const float *flat, const float *tilt,
                     float *d_x, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++)
        plane_gradient(x + p * points, NULL, mean[p], scale[p], flat[p], tilt[p], d_x + p * points, NULL, points);
}
